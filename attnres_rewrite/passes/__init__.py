"""The pipeline, one pass a file.

In order: :mod:`inline_regions`, :mod:`resolve_inplace_ops`, :mod:`spell_out_sums`, :mod:`find_streams` (which searches
with :mod:`linear_values`), :mod:`group_layers`, :mod:`insert_attnres` (which writes with :mod:`parts`),
:mod:`schedule_reads`, :mod:`check_rewrite`. :mod:`attnres_rewrite.pipeline` runs them.
"""

from attnres_rewrite.passes.base import Pass, PostconditionError
from attnres_rewrite.passes.check_rewrite import CheckRewrite, Expansion
from attnres_rewrite.passes.find_streams import FindStreams, Refusal, StreamAnalysis
from attnres_rewrite.passes.group_layers import GroupLayers
from attnres_rewrite.passes.inline_regions import InlineRegions
from attnres_rewrite.passes.insert_attnres import InsertAttnRes, Site, SiteParameters
from attnres_rewrite.passes.resolve_inplace_ops import ResolveInplaceOps
from attnres_rewrite.passes.schedule_reads import ScheduleReads
from attnres_rewrite.passes.spell_out_sums import SpellOutSums

__all__ = [
    "CheckRewrite",
    "Expansion",
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
    "SpellOutSums",
    "StreamAnalysis",
]
