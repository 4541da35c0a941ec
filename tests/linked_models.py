"""Models whose stream values are linked across layers, and the same in eager algebra, by hand.

What links the values is written once for both: ordinary arithmetic, which acts on tensors in the plain model and on
:class:`Parts` in the reference. The reference shares nothing else with the library.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from models import WIDTH, Feed, prepared
from reference_models import block_attn_res, partition_layers
from torch import Tensor, nn

LAYERS = 6


class Parts:
    """A value of a stream as the root's part, number 0, and one part a block; arithmetic acts on each."""

    def __init__(self, parts: Mapping[int, Tensor]) -> None:
        self.parts = dict(parts)

    def __add__(self, other: "Parts") -> "Parts":
        parts = dict(self.parts)
        for n, part in other.parts.items():
            parts[n] = parts[n] + part if n in parts else part
        return Parts(parts)

    def __mul__(self, factor: Tensor | float) -> "Parts":
        return Parts({n: part * factor for n, part in self.parts.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Tensor | float) -> "Parts":
        return self * (1.0 / divisor)

    def __neg__(self) -> "Parts":
        return self * -1.0

    def __sub__(self, other: "Parts") -> "Parts":
        return self + -other

    def join(self, term: Tensor, block: int) -> "Parts":
        """With a new term in the part of ``block``."""
        return self + Parts({block: term})

    def sources(self) -> list[Tensor]:
        return [self.parts[n] for n in sorted(self.parts)]

    def total(self) -> Tensor:
        return functools.reduce(operator.add, self.sources())


Value = Tensor | Parts
# Before layer i: what the layer reads, from x, from the values before every layer so far, and from the model's weights.
Link = Callable[["Linked", int, list], Value]


class LinkedBlock(nn.Module):
    """Two sublayers, with their residual connections unless the caller makes these."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Feed(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Linked(nn.Module):
    """A stack of layers; ``link`` makes the input of each from the values before, ``end`` what the norm reads."""

    def __init__(self, link: Link, end: Link | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(LinkedBlock() for _ in range(LAYERS))
        self.norm, self.link, self.end = nn.LayerNorm(WIDTH), link, end
        generator = torch.Generator().manual_seed(3)
        # A number a layer, and one for every pair of them; vectors over channels.
        self.a = nn.Parameter(0.5 + torch.rand(LAYERS + 1, generator=generator))
        self.b = nn.Parameter(0.5 + torch.rand(LAYERS + 1, generator=generator))
        self.w = nn.Parameter(torch.rand(LAYERS + 1, LAYERS + 1, generator=generator) - 0.3)
        self.v = nn.Parameter(0.5 + torch.rand(LAYERS + 1, WIDTH, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        # What comes out of the embedding and of every layer.
        values = [self.embed(x)]
        for i, layer in enumerate(self.layers):
            values.append(layer(self.link(self, i, values)))
        return self.norm(values[-1] if self.end is None else self.end(self, LAYERS, values))


def linked(name: str, dtype: torch.dtype = torch.float32) -> Linked:
    """The model with the links of that name, always with the same weights."""
    torch.manual_seed(0)
    model = Linked(*LINKS[name])
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "." not in n}
    prepared(model, dtype)
    with torch.no_grad():
        for n, value in kept.items():
            model.get_parameter(n).copy_(value)
    return model


def reference(
    model: Linked,
    x: Tensor,
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    blocks: int,
    trace: list[int],
    attend: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor] = block_attn_res,
) -> Tensor:
    """The rewritten model by the algebra of parts; ``trace`` receives the number of sources of every site."""
    block_of = [n for n, size in enumerate(partition_layers(LAYERS, blocks), start=1) for _ in range(size)]
    sites = zip(queries, gains, strict=True)

    def read(value: Parts) -> Tensor:
        sources = value.sources()
        if len(sources) == 1:
            return sources[0]
        trace.append(len(sources))
        return attend(sources, *next(sites))

    values = [Parts({0: model.embed(x)})]
    for i, layer in enumerate(model.layers):
        value = model.link(model, i, values)
        for sublayer in (layer.first, layer.second):
            value = value.join(sublayer(read(value)), block_of[i])
        values.append(value)
    output = read(values[-1] if model.end is None else model.end(model, LAYERS, values))
    assert next(sites, None) is None
    return model.norm(output)


def lerp(x: Value, y: Value, weight: Tensor | float) -> Value:
    return x + weight * (y - x) if isinstance(x, Parts) else torch.lerp(x, y, weight)


def addcmul(x: Value, y: Value, weight: Tensor) -> Value:
    return x + weight * y if isinstance(x, Parts) else torch.addcmul(x, weight, y)


def weighted(values: list, weights: Tensor, spelling: Callable[[list[Tensor], Tensor], Tensor]) -> Value:
    """A weighted sum of values, which the plain model writes over their stack."""
    if not isinstance(values[0], Parts):
        return spelling(values, weights)
    return functools.reduce(operator.add, (weights[j] * value for j, value in enumerate(values)))


def skips(model: Linked, i: int, values: list) -> Value:
    """The second half adds the values of the first half, last first, as a U-net does."""
    half = LAYERS // 2
    return values[-1] if i < half else values[-1] + model.a[i] * values[LAYERS - i]


def dense(spelling: Callable[[list[Tensor], Tensor], Tensor]) -> Link:
    """Every layer reads a weighted sum of all the values before it, as in DenseFormer."""
    return lambda m, i, h: weighted(h, m.w[i, : i + 1], spelling) if i else h[-1]


def plain(model: Linked, i: int, values: list) -> Value:
    return values[-1]


LINKS: dict[str, tuple[Link, Link | None]] = {
    "the embedding mixed in": (lambda m, i, h: m.a[i] * h[-1] + m.b[i] * h[0], None),
    "the embedding mixed in from layer 1 on": (lambda m, i, h: h[-1] + m.b[i] * h[0] if i else h[-1], None),
    "the embedding added": (lambda m, i, h: h[-1] + h[0], None),
    "U-net skips": (skips, None),
    "one skip": (lambda m, i, h: h[-1] + h[1] if i == 4 else h[-1], None),
    "a middle value taken off": (plain, lambda m, i, h: h[-1] - m.a[0] * h[3]),
    "a middle value taken off in the middle": (lambda m, i, h: h[-1] - 0.5 * h[2] if i == 5 else h[-1], None),
    "lerp by a number": (lambda m, i, h: lerp(h[-1], h[0], 0.25) if i else h[-1], None),
    "lerp by a parameter": (lambda m, i, h: lerp(h[-1], h[0], m.a[i]) if i else h[-1], None),
    "lerp by a vector": (lambda m, i, h: lerp(h[-1], h[i // 2], m.v[i]) if i else h[-1], None),
    "addcmul": (lambda m, i, h: addcmul(h[-1], h[i // 2], m.v[i]) if i else h[-1], None),
    "vectors": (lambda m, i, h: m.v[i] * h[-1] + m.v[-1] * h[0], None),
    "negated": (lambda m, i, h: -(m.a[i] * h[0] - h[-1]), None),
    "divided": (lambda m, i, h: h[-1] * (1.0 / m.a[i]) + 0.5 * h[0], None),
    "dense, added up": (lambda m, i, h: sum((m.w[i, j] * v for j, v in enumerate(h[1:])), m.b[0] * h[0]), None),
    "dense, tensordot": (dense(lambda h, w: torch.tensordot(w, torch.stack(h), dims=1)), None),
    "dense, einsum": (dense(lambda h, w: torch.einsum("n,nbtd->btd", w, torch.stack(h))), None),
    "dense, sum": (dense(lambda h, w: (w.view(-1, 1, 1, 1) * torch.stack(h)).sum(0)), None),
    "dense, matmul": (dense(lambda h, w: torch.stack(h, -1) @ w), None),
}
# Of every site of six layers in three blocks. The first read has one source, the root's part, and no site.
SOURCES = (2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4)
