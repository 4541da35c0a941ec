"""A chain of adds, and whether it may be a part of a residual stream of which another is the rest."""

from __future__ import annotations

import dataclasses
import itertools
import string

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Piece:
    """A chain of adds ``x + f(x)``: a residual stream, or what may be a part of one.

    Attributes:
        first_module: The module that its first add runs in.
        last_module: That of its last add.
        root: The value that it begins with.
        values: Its stream values.
        ends: The last of them, before and after trailing scales.
        is_stream: Whether it is a stream by itself.
    """

    first_module: str
    last_module: str
    root: Node
    values: frozenset[Node]
    ends: frozenset[Node]
    is_stream: bool

    def may_go_on_in(self, other: Piece) -> bool:
        """Whether ``other`` could be the rest of the stream that this is a piece of, and not another tower."""
        if not (self.is_stream or other.is_stream):
            return True
        paths = [path.split(".") if path else [] for path in (self.last_module, other.first_module)]
        here, there = next(((a, b) for a, b in itertools.zip_longest(*paths) if a != b), (None, None))
        if here is None or there is None:
            # One lies within the other. Of two streams it then is a tower; a single add is a part.
            return here is there or not (self.is_stream and other.is_stream)
        # layers.3 and layers.4, or layer_3 and layer_4.
        return here[-1].isdigit() and there[-1].isdigit() and here.rstrip(string.digits) == there.rstrip(string.digits)
