"""The pipeline, one pass a file.

In order: :mod:`inline_regions`, :mod:`resolve_inplace_ops`, :mod:`spell_out_sums`, :mod:`find_streams` (which chooses
among :mod:`linear_values` by their :mod:`nesting`), :mod:`refuse_non_sums`, :mod:`refuse_depth_attention`,
:mod:`account_for_sublayers`, :mod:`group_layers` (with :mod:`blocks_for_size`), :mod:`sum_gradients`,
:mod:`insert_attnres` (which writes with :mod:`parts`), :mod:`schedule_reads`, :mod:`place_sites`, :mod:`check_rewrite`,
and where a graph is compiled :mod:`outline_layers` (with :mod:`shared_masks`, :mod:`align_reads`, :mod:`sections` and
:mod:`bodies`). :mod:`attnres_rewrite.pipeline` runs them; :mod:`reads_without_norm` tells what an inserted site is read
by.
"""

from attnres_rewrite.passes.account_for_sublayers import AccountForSublayers, Leftover
from attnres_rewrite.passes.base import Pass, PostconditionError, Refusal
from attnres_rewrite.passes.check_rewrite import CheckRewrite, Expansion
from attnres_rewrite.passes.find_streams import FindStreams, StreamAnalysis
from attnres_rewrite.passes.group_layers import GroupLayers
from attnres_rewrite.passes.inline_regions import InlineRegions
from attnres_rewrite.passes.insert_attnres import InsertAttnRes, Site, SiteParameters
from attnres_rewrite.passes.outline_layers import Outlined, OutlineLayers
from attnres_rewrite.passes.place_sites import PlaceSites
from attnres_rewrite.passes.refuse_depth_attention import RefuseDepthAttention
from attnres_rewrite.passes.refuse_non_sums import RefuseNonSums
from attnres_rewrite.passes.resolve_inplace_ops import ResolveInplaceOps
from attnres_rewrite.passes.schedule_reads import ScheduleReads
from attnres_rewrite.passes.spell_out_sums import SpellOutSums
from attnres_rewrite.passes.sum_gradients import SumGradients

__all__ = [
    "AccountForSublayers",
    "CheckRewrite",
    "Expansion",
    "FindStreams",
    "GroupLayers",
    "InlineRegions",
    "InsertAttnRes",
    "Leftover",
    "OutlineLayers",
    "Outlined",
    "Pass",
    "PlaceSites",
    "PostconditionError",
    "Refusal",
    "RefuseDepthAttention",
    "RefuseNonSums",
    "ResolveInplaceOps",
    "ScheduleReads",
    "Site",
    "SiteParameters",
    "SpellOutSums",
    "StreamAnalysis",
    "SumGradients",
]
