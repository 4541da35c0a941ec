"""Shapes that the analyses recognise, one family a file.

Each pattern is a small object with a ``name``, the chain it matches drawn in its docstring, and
``match(node)``, which returns the parts or a :class:`~attnres_rewrite.patterns.base.Rejection` with the
reason and the culprit.
"""

from attnres_rewrite.patterns.base import Pattern, Rejection
from attnres_rewrite.patterns.residual_add import AddMatch, ResidualAdd
from attnres_rewrite.patterns.stream_bias import BiasMatch, StreamBias
from attnres_rewrite.patterns.stream_scale import ScaleMatch, StreamScale
from attnres_rewrite.patterns.transparent import Transparent, through_transparent

__all__ = [
    "AddMatch",
    "BiasMatch",
    "Pattern",
    "Rejection",
    "ResidualAdd",
    "ScaleMatch",
    "StreamBias",
    "StreamScale",
    "Transparent",
    "through_transparent",
]
