"""The pipeline, one pass a file.

In order: :mod:`inline_regions`, :mod:`resolve_inplace_ops`, :mod:`find_streams`, :mod:`group_layers`,
:mod:`insert_attnres`, :mod:`schedule_reads`, :mod:`check_rewrite`. :mod:`attnres_rewrite.pipeline` runs them.
"""

from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.check_rewrite import CheckRewrite
from attnres_rewrite.passes.find_streams import FindStreams, Refusal, StreamAnalysis
from attnres_rewrite.passes.group_layers import GroupLayers
from attnres_rewrite.passes.inline_regions import InlineRegions
from attnres_rewrite.passes.insert_attnres import InsertAttnRes, Site, SiteParameters
from attnres_rewrite.passes.resolve_inplace_ops import ResolveInplaceOps
from attnres_rewrite.passes.schedule_reads import ScheduleReads

__all__ = [
    "CheckRewrite",
    "FindStreams",
    "GroupLayers",
    "InlineRegions",
    "InsertAttnRes",
    "Pass",
    "PostconditionError",
    "Refusal",
    "ResolveInplaceOps",
    "ScheduleReads",
    "Site",
    "SiteParameters",
    "StreamAnalysis",
]
