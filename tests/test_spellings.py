"""Sums by other names: subtractions, interpolations, fused sums, in place or not, in every dialect."""

import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from models import WIDTH, Feed, embeddings, export, prepared, randomise_sites, relative_error, site_parameters
from reference_models import block_attn_res
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.capture.dynamo import Call, capture
from attnres_rewrite.forms.graph_module import with_metadata
from attnres_rewrite.passes import RefuseNonSums
from attnres_rewrite.pipeline import find_streams

X = embeddings()
TOLERANCE = 1e-5  # float32


def into(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place, on a copy: autograd and the caller of the model keep what they have."""
    return lambda x, f, m: function(x.clone(), f, m)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A way to write ``x_factor * x + f_factor * f``; factors may be the parameter or the vector of the model."""

    write: Callable[[Tensor, Tensor, nn.Module], Tensor]
    f_factor: Callable[[nn.Module], Tensor | float] = lambda m: 1.0
    x_factor: Callable[[nn.Module], Tensor | float] = lambda m: 1.0


def minus(m: nn.Module) -> float:
    return -1.0


def isub(x: Tensor, f: Tensor) -> Tensor:
    x -= f
    return x


def eye(x: Tensor) -> Tensor:
    """[D, D] or, for a batched product, [B, D, D]."""
    return torch.eye(WIDTH, dtype=x.dtype).expand(2, WIDTH, WIDTH)


def flat_addmm(x: Tensor, f: Tensor, m: nn.Module, **factors: float) -> Tensor:
    return torch.addmm(x.reshape(-1, WIDTH), f.reshape(-1, WIDTH), m.square, **factors).view(2, 9, WIDTH)


SPELLINGS = {
    "x - f": Spelling(lambda x, f, m: x - f, minus),
    "torch.sub": Spelling(lambda x, f, m: torch.sub(x, f), minus),
    "torch.sub, alpha": Spelling(lambda x, f, m: torch.sub(x, f, alpha=0.5), lambda m: -0.5),
    "torch.subtract": Spelling(lambda x, f, m: torch.subtract(x, f), minus),
    "method sub": Spelling(lambda x, f, m: x.sub(f, alpha=2), lambda m: -2.0),
    "f - x": Spelling(lambda x, f, m: f - x, x_factor=minus),
    "torch.rsub": Spelling(lambda x, f, m: torch.rsub(x, f), x_factor=minus),
    "torch.rsub, turned": Spelling(lambda x, f, m: torch.rsub(f, x, alpha=0.5), lambda m: -0.5),
    "x.__rsub__(f)": Spelling(lambda x, f, m: x.__rsub__(f), x_factor=minus),
    "operator.sub": Spelling(lambda x, f, m: operator.sub(x, f), minus),
    "x -= f": Spelling(into(lambda x, f, m: isub(x, f)), minus),
    "sub_": Spelling(into(lambda x, f, m: x.sub_(f)), minus),
    "x + -f": Spelling(lambda x, f, m: x + -f, minus),
    "neg": Spelling(lambda x, f, m: torch.neg(f - x), minus),
    "negative": Spelling(lambda x, f, m: (f - x).negative(), minus),
    "neg_": Spelling(into(lambda x, f, m: x.neg_() + f), x_factor=minus),
    "add, alpha on the stream": Spelling(lambda x, f, m: torch.add(f, x, alpha=0.5), x_factor=lambda m: 0.5),
    "aten.sub": Spelling(lambda x, f, m: torch.ops.aten.sub.Tensor(x, f), minus),
    "lerp": Spelling(lambda x, f, m: torch.lerp(x, f, 0.25), lambda m: 0.25, lambda m: 0.75),
    "method lerp": Spelling(lambda x, f, m: x.lerp(f, weight=0.25), lambda m: 0.25, lambda m: 0.75),
    "lerp_": Spelling(into(lambda x, f, m: x.lerp_(f, 0.25)), lambda m: 0.25, lambda m: 0.75),
    "lerp by a parameter": Spelling(lambda x, f, m: torch.lerp(x, f, m.c), lambda m: m.c, lambda m: 1 - m.c),
    "lerp by a vector": Spelling(lambda x, f, m: torch.lerp(x, f, m.v), lambda m: m.v, lambda m: 1 - m.v),
    "lerp_ by a vector": Spelling(into(lambda x, f, m: x.lerp_(f, m.v)), lambda m: m.v, lambda m: 1 - m.v),
    "addcmul": Spelling(lambda x, f, m: torch.addcmul(x, m.v, f), lambda m: m.v),
    "addcmul, value": Spelling(lambda x, f, m: torch.addcmul(x, f, m.v, value=0.5), lambda m: 0.5 * m.v),
    "addcmul_": Spelling(into(lambda x, f, m: x.addcmul_(m.v, f)), lambda m: m.v),
    "addcdiv": Spelling(lambda x, f, m: torch.addcdiv(x, f, m.v), lambda m: 1 / m.v),
    "addmm": Spelling(flat_addmm, lambda m: m.square),
    "addmm, factors": Spelling(
        lambda x, f, m: flat_addmm(x, f, m, beta=0.5, alpha=2), lambda m: 2 * m.square, lambda m: 0.5
    ),
    "baddbmm": Spelling(lambda x, f, m: torch.baddbmm(x, f, eye(x) * 2), lambda m: 2.0),
    "sum of a list": Spelling(lambda x, f, m: sum([x, f])),
    "stack and sum": Spelling(lambda x, f, m: torch.stack([x, f]).sum(0)),
    "stack and torch.sum": Spelling(lambda x, f, m: torch.sum(torch.stack((x, f), dim=-1), dim=-1)),
    "stack and mean": Spelling(lambda x, f, m: torch.stack([x, f], 1).mean(dim=1), lambda m: 0.5, lambda m: 0.5),
    "half of each": Spelling(lambda x, f, m: (x + f) / 2, lambda m: 0.5, lambda m: 0.5),
    "multiply and divide": Spelling(
        lambda x, f, m: torch.multiply(torch.divide(x, m.c), 0.5) + f, x_factor=lambda m: 0.5 / m.c
    ),
    "a parameter less": Spelling(lambda x, f, m: x - m.c * x + f, x_factor=lambda m: 1 - m.c),
}


class Chain(nn.Module):
    """Four sublayers in one forward, joined to the stream as ``write`` says."""

    def __init__(self, write: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.feeds = nn.ModuleList(Feed() for _ in range(4))
        prepared(self)
        self.c, self.v = nn.Parameter(torch.tensor(0.75)), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for feed in self.feeds:
            x = self.write(x, feed(x), self)
        return self.norm(x)


def times(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """A matrix is multiplied by, anything else multiplies."""
    return tensor @ factor if isinstance(factor, Tensor) and factor.dim() == 2 else tensor * factor


def reference(model: Chain, spelling: Spelling, queries: list[Tensor], gains: list[Tensor]) -> Tensor:
    """Every sublayer a block of its own: sources are the root and every branch output, each with its factors."""
    sources = [model.embed(X)]
    for i, feed in enumerate(model.feeds):
        h = sources[0] if i == 0 else block_attn_res(sources, queries[i - 1], gains[i - 1])
        f = times(feed(h), spelling.f_factor(model))
        sources = [times(source, spelling.x_factor(model)) for source in sources] + [f]
    return model.norm(block_attn_res(sources, queries[-1], gains[-1]))


def by_dynamo(model: nn.Module) -> torch.fx.GraphModule:
    return capture(model, Call((X,), {})).modules[0]


DIALECTS = {
    "dynamo": by_dynamo,
    "export": lambda model: export(model, X).graph_module,
    "fx": lambda model: with_metadata(torch.fx.symbolic_trace(model), X),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_every_sum_is_found(spelling: str, dialect: str) -> None:
    module = DIALECTS[dialect](Chain(SPELLINGS[spelling].write))
    found = find_streams(module)
    (stream,) = found.streams
    assert [len(branch.adds) for branch in stream.branches] == [1] * 4
    assert not RefuseNonSums()(module, found)
    assert len(stream.branch_outputs) == 4
    assert {step.node for step in stream.steps} < stream.values


@pytest.mark.parametrize("form", ["exported", "graph module"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_every_sum_gives_the_numbers(spelling: str, form: str) -> None:
    model = Chain(SPELLINGS[spelling].write)
    if form == "exported":
        rewritten = randomise_sites(ar.rewrite(export(model, X), "full"))
        run = rewritten.module()
    else:
        rewritten = run = randomise_sites(ar.rewrite(torch.fx.symbolic_trace(model), "full", example_inputs=X))
    expected = reference(model, SPELLINGS[spelling], *site_parameters(rewritten))
    assert relative_error(run(X), expected) < TOLERANCE
