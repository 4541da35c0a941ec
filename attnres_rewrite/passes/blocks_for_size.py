"""How many blocks a model of a given size should have, and why: ``blocks="auto"``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from attnres_rewrite.config import partition_layers

# The paper takes about eight blocks, and reports less than 2% of an inference step for them.
MOST, FEWEST = 8, 2
MOST_SHARE = 0.02
# Floating-point operations of a layer that take as long as one byte of a block at a read.
OPERATIONS_A_BYTE = 7.5
_BYTES = 4


@dataclasses.dataclass(frozen=True)
class BlocksForSize:
    """A number of blocks.

    Attributes:
        blocks: N.
        why: A sentence that says what it costs, and what more would.
    """

    blocks: int
    why: str


def blocks_for_size(branches: Sequence[int], width: int, multiply_adds: int) -> BlocksForSize:
    """The most blocks, up to the paper's eight, that are estimated to cost at most 2% of the layers in inference.

    Never fewer than two, where there are two layers.

    Args:
        branches: Number of branch outputs of every layer.
        width: D, the width of the stream.
        multiply_adds: Of all layers together, a token; 0 if they are not known.
    """
    layers = len(branches)
    most = min(MOST, layers)
    if not multiply_adds:
        return BlocksForSize(most, f"{_counted(most)}, since what the layers compute could not be seen")
    shares = {n: share_of(n, branches, width, multiply_adds) for n in range(min(FEWEST, layers), most + 1)}
    fitting = [n for n, share in shares.items() if share <= MOST_SHARE]
    blocks = max(fitting, default=min(shares))
    more = f" ({most} would take {shares[most]:.1%})" if blocks < most else ""
    limit = f"at most {MOST_SHARE:.0%} is aimed for" + ("" if fitting else ", but fewer blocks are not chosen")
    cost = f"about {shares[blocks]:.1%} of what the layers take in inference on a CPU{more}"
    return BlocksForSize(blocks, f"{_counted(blocks)}, at {cost}; {limit}")


def _counted(blocks: int) -> str:
    return f"{blocks} block{'s' * (blocks != 1)}"


def share_of(blocks: int, branches: Sequence[int], width: int, multiply_adds: int) -> float:
    """What the sites cost in inference, as an estimated share of what the layers take.

    A site is charged for the embedding and the finished blocks that it attends to; the running sum is read in a plain
    model too. They count at every site, in two phases as well: there a block comes from memory once for all reads of a
    block, but its dot product and its weighted sum are computed for each. (Counting what comes from memory predicts the
    same measurements worse.) A layer is charged for its weights alone, two operations each, and not for attention.

    The constant is the least-squares fit to 26 inference ratios, ``benchmarks/results/end_to_end_inline.json``, in
    float32 on two CPU cores, weighted by rounds and spread. Mean cost by width, estimated and measured: 4.0% and 3.9%
    (256), 1.9% and 1.8% (512), 1.0% and 1.2% (1024). Single sizes are 1.2 points off in the median, and move by one
    to three from run to run. Fitted without one of the widths it is 7.4 to 7.7. On another machine, with layers
    compiled once (``end_to_end.json``), the figures are 1.9% and 1.9% (512), 1.0% and 0.6% (1024), but 3.9% and 4.8%
    (256): there calls cost, and not bytes alone. A GPU computes more in the time of a byte, so that sites cost a
    greater share there.

    Args:
        blocks: N.
        branches: Number of branch outputs of every layer.
        width: D, the width of the stream.
        multiply_adds: Of all layers together, a token; not 0.
    """
    following, sizes = iter(branches), partition_layers(len(branches), blocks=blocks)
    attended = sum(n * sum(itertools.islice(following, size)) for n, size in enumerate(sizes, start=1))
    return OPERATIONS_A_BYTE * _BYTES * width * attended / (2 * multiply_adds)
