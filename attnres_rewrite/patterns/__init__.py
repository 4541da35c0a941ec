"""Shapes that the analyses recognise, one family a file.

Each pattern is a small object with a ``name``, the chain it matches drawn in its docstring, and
``match(node)``, which returns the parts or a :class:`~attnres_rewrite.patterns.base.Mismatch` with the
reason and the culprit.
"""

from attnres_rewrite.patterns.base import Mismatch, Pattern
from attnres_rewrite.patterns.linear_sum import LinearSum, SumMatch
from attnres_rewrite.patterns.stream_scale import ScaleMatch, StreamScale
from attnres_rewrite.patterns.transparent import Transparent, reads_of, through_transparent

__all__ = [
    "LinearSum",
    "Mismatch",
    "Pattern",
    "ScaleMatch",
    "StreamScale",
    "SumMatch",
    "Transparent",
    "reads_of",
    "through_transparent",
]
