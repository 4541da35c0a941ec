"""Models that attend over depth already, by hand and in transformers, and models that sum over depth in other ways."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.handwritten import LAYERS, MLP, VOCAB, WIDTH, CausalSelfAttention
from zoo.member import Accepted, Inputs, Member, Refused, token_ids

Read = Callable[[list[Tensor], nn.Parameter], Tensor]


def by_einsum(values: list[Tensor], query: Tensor) -> Tensor:
    """The listing of the paper."""
    stacked = torch.stack(values)
    keys = functional.rms_norm(stacked, (WIDTH,))
    logits = torch.einsum("d, n b t d -> n b t", query, keys)
    return torch.einsum("n b t, n b t d -> b t d", logits.softmax(0), stacked)


def by_attention(values: list[Tensor], query: Tensor) -> Tensor:
    """The same by the operator for attention, over a dimension of depth."""
    stacked = torch.stack(values, dim=-2)
    keys = functional.rms_norm(stacked, (WIDTH,))
    queries = query.expand(*stacked.shape[:2], 1, WIDTH)
    return functional.scaled_dot_product_attention(queries, keys, stacked, scale=1.0).squeeze(-2)


def by_loop(values: list[Tensor], query: Tensor) -> Tensor:
    """The same without a stack of the values: a product and an add for every one of them."""
    logits = torch.stack([(functional.rms_norm(value, (WIDTH,)) * query).sum(-1) for value in values])
    weights = logits.softmax(0).unsqueeze(-1)
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def by_product(values: list[Tensor], query: Tensor) -> Tensor:
    """The same by a product with broadcast weights, and a sum over the values."""
    stacked = torch.stack(values)
    weights = torch.softmax(functional.rms_norm(stacked, (WIDTH,)) @ query, 0)
    return (weights[..., None] * stacked).sum(0)


READS: dict[str, Read] = {"einsum": by_einsum, "attention": by_attention, "loop": by_loop, "product": by_product}


class Listing(nn.Module):
    """Block Attention Residuals as the paper's listing has them, of ``per_block`` sublayers a block."""

    def __init__(self, read: Read, per_block: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.read, self.per_block = read, per_block
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": CausalSelfAttention(), "mlp": MLP()}) for _ in range(layers))
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(WIDTH)) for _ in range(2 * layers + 1))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        blocks: list[Tensor] = [self.embed(ids)]
        partial: Tensor | None = None
        queries = iter(self.queries)
        sublayers = [sublayer for layer in self.layers for sublayer in layer.values()]
        for i, sublayer in enumerate(sublayers):
            if partial is not None and i % self.per_block == 0:
                blocks.append(partial)
                partial = None
            sources = blocks if partial is None else [*blocks, partial]
            f = sublayer(functional.rms_norm(self.read(sources, next(queries)), (WIDTH,)))
            partial = f if partial is None else partial + f
        assert partial is not None
        return self.head(self.norm(self.read([*blocks, partial], next(queries))))


class OverItsPast(nn.Module):
    """A stream that every layer adds an attention over all of its earlier values to: ``l(x + mix(past))``."""

    def __init__(self, read: Read = by_einsum) -> None:
        super().__init__()
        self.read = read
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(WIDTH)) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        past = [x]
        for layer, query in zip(self.layers, self.queries, strict=True):
            x = layer(x + self.read(past, query))
            past.append(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MixAtTheEnd(nn.Module):
    """The head reads a mix of all layers' outputs, with weights that compute from them; no layer does."""

    def __init__(self, read: Read = by_einsum) -> None:
        super().__init__()
        self.read = read
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.query = nn.Parameter(torch.ones(WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        values = []
        for layer in self.layers:
            x = layer(x)
            values.append(x)
        return self.head(self.norm(self.read(values, self.query)))


def ids(batch: int, length: int) -> Inputs:
    return (token_ids(batch, length),)


def over_depth(line: str) -> Refused:
    return Refused("attention over depth", "the model attends over depth already", line)


LINES = {
    "einsum": 'torch.einsum("n b t, n b t d -> b t d"',
    "attention": "scaled_dot_product_attention(queries, keys, stacked",
    "loop": "total = total + weight * value",
    "product": "(weights[..., None] * stacked).sum(0)",
}
MEMBERS = [
    *(
        Member(
            f"Attention Residuals by {name}",
            "hand-written",
            functools.partial(Listing, READS[name], 6),
            ids,
            over_depth(LINES[name]),
        )
        for name in READS
    ),
    Member("attention over its past", "hand-written", OverItsPast, ids, over_depth(LINES["einsum"])),
    Member("mix of all layers at the end", "hand-written", MixAtTheEnd, ids, Accepted({"": 8})),
]
