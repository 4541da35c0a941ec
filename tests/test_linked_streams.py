"""Streams whose values are linked across layers: linear algebra, part by part."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from linked_models import LINKS, SOURCES, Linked, linked, reference
from models import WIDTH, Feed, embeddings, mostly_slow, randomise_sites, relative_error, site_parameters
from reference_models import block_attn_res
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from attnres_rewrite.passes import PostconditionError
from attnres_rewrite.passes.parts import PartWriter

X = embeddings()
TOLERANCE = 1e-5  # float32


def live(model: Linked, config: ar.AttnResConfig) -> Callable:
    return ar.rewrite(model, config=config, example_inputs=X.to(model.a.dtype), backend="eager")


def exported(model: Linked, config: ar.AttnResConfig) -> torch.export.ExportedProgram:
    return ar.rewrite(torch.export.export(model, (X.to(model.a.dtype),)), config=config)


def graph_module(model: Linked, config: ar.AttnResConfig) -> torch.fx.GraphModule:
    return ar.rewrite(torch.fx.symbolic_trace(model), config=config, example_inputs=X.to(model.a.dtype))


FORMS = {"live": live, "exported": exported, "graph module": graph_module}


def run(form: object) -> torch.Tensor:
    module = form.module() if isinstance(form, torch.export.ExportedProgram) else form
    with torch.no_grad():
        return module(X)


@pytest.mark.parametrize("name", LINKS)
def test_explain_counts_sites_and_sources(name: str) -> None:
    report = ar.explain(linked(name), 3, example_inputs=X)
    (stream,) = report.streams
    assert (stream.branches, len(stream.layers), stream.sources) == (12, 6, SOURCES)
    assert stream.blocks == tuple((f"layers.{i}", f"layers.{i + 1}") for i in (0, 2, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
@pytest.mark.parametrize("name", mostly_slow(LINKS, "the embedding mixed in", "U-net skips"))
@torch.no_grad()
def test_every_form_agrees_with_the_algebra(name: str, schedule: str, form: str) -> None:
    config = ar.AttnResConfig(blocks=3, schedule=schedule)
    model = linked(name)
    rewritten = randomise_sites(FORMS[form](linked(name), config))
    queries, gains = site_parameters(rewritten)
    trace: list[int] = []
    expected = reference(model, X, queries, gains, 3, trace)
    assert tuple(trace) == SOURCES
    assert relative_error(run(rewritten), expected) < TOLERANCE


@pytest.mark.parametrize("name", mostly_slow(LINKS, "the embedding mixed in", "U-net skips", "negated"))
@torch.no_grad()
def test_zero_queries_give_the_original(name: str) -> None:
    model = linked(name, torch.float64)
    expected = model(X.double())
    config = ar.AttnResConfig(blocks=3, aggregation="sum")
    assert relative_error(live(model, config)(X.double()), expected) < 1e-12


@pytest.mark.parametrize("name", ["the embedding mixed in", "U-net skips", "lerp by a vector", "dense, einsum"])
def test_zero_queries_give_the_original_gradients(name: str) -> None:
    """Of the weights that link the values too; random queries give gradients to every site."""
    plain = linked(name, torch.float64)
    model = live(linked(name, torch.float64), ar.AttnResConfig(blocks=3, aggregation="sum"))
    for each in (plain, model):
        output = each(X.double())
        (output * output.detach().cos()).sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert {"a", "v", "w"} & expected.keys()
    found = dict(model.named_parameters())
    errors = {n: relative_error(found[n].grad, gradient) for n, gradient in expected.items()}
    assert max(errors.values()) < 1e-9, errors
    randomise_sites(model)
    model.zero_grad()
    model(X.double()).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for _, p in ar.attnres_parameters(model))


class Checkpointed(Linked):
    """Every layer is a checkpointed region; the links lie between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.embed(x)]
        for i, layer in enumerate(self.layers):
            values.append(checkpoint(layer, self.link(self, i, values), use_reentrant=False))
        return self.norm(values[-1])


@pytest.mark.parametrize("schedule", mostly_slow(["per_read", "two_phase"], "two_phase"))
@pytest.mark.parametrize("name", mostly_slow(["the embedding mixed in", "U-net skips"], "U-net skips"))
def test_checkpointed_layers(name: str, schedule: str) -> None:
    model, plain = linked(name, torch.float64), linked(name, torch.float64)
    model.__class__ = Checkpointed
    config = ar.AttnResConfig(blocks=3, schedule=schedule)
    rewritten, other = (randomise_sites(live(each, config)) for each in (model, plain))
    for each in (rewritten, other):
        each(X.double()).cos().sum().backward()
    gradients = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    found = dict(rewritten.named_parameters())
    assert max(relative_error(found[n].grad, gradient) for n, gradient in gradients.items()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", mostly_slow(["the embedding mixed in", "U-net skips", "a middle value taken off"], "U-net skips")
)
def test_the_verbs_know_linked_models(name: str) -> None:
    model = randomise_sites(live(linked(name), ar.AttnResConfig(blocks=3)))
    assert ar.verify(model, X).passed
    weights = ar.depth_attention(model, X).weights
    assert tuple((~weights.isnan()).sum(1).tolist()) == SOURCES
    names = [n for n, _ in ar.attnres_parameters(model)]
    assert names == [n for n, _ in ar.attnres_parameters(exported(linked(name), ar.AttnResConfig(blocks=3)))]
    before = linked(name)(X)
    assert torch.equal(ar.undo(model)(X), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the embedding mixed in", "U-net skips"])
@torch.no_grad()
def test_linked_models_through_inductor(name: str) -> None:
    model = randomise_sites(ar.rewrite(linked(name), 3, example_inputs=X))
    trace: list[int] = []
    expected = reference(linked(name), X, *site_parameters(model), 3, trace)
    assert relative_error(model(X), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the embedding mixed in", "U-net skips"])
def test_linked_models_go_to_onnx(name: str, tmp_path: Path) -> None:
    """Which compares itself with the model, on random inputs, in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    model = randomise_sites(live(linked(name), ar.AttnResConfig(blocks=3)))
    exported = ar.export_onnx(model, tmp_path / "model.onnx", X)
    assert exported.max_difference < 1e-4


@pytest.mark.parametrize(
    ("method", "instead", "name", "match"),
    [
        ("scaled", lambda self, part, number: part, "a middle value taken off", "other coefficients"),
        ("scaled_by", lambda self, part, factor, **_: part, "U-net skips", "other coefficients"),
        ("total", lambda self, left, right, *, like: left, "U-net skips", "sums .* instead of"),
        ("total", lambda self, left, right, *, like: left, "the embedding mixed in", "sums .* instead of|coefficients"),
        ("_product", lambda self, node, coefficient, like: node, "vectors", "other coefficients"),
        ("_sum", lambda self, left, right, like: left, "one skip", "other coefficients"),
    ],
    ids=itertools.count(),
)
def test_check_rewrite_catches_wrong_arithmetic(
    method: str, instead: Callable, name: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ar.AttnResConfig(blocks=3)
    graph_module(linked(name), config)
    monkeypatch.setattr(PartWriter, method, instead)
    with pytest.raises(PostconditionError, match=match):
        graph_module(linked(name), config)


class Scaled(nn.Module):
    """Eight layers, every one of which scales the stream and mixes the embedding in, in as many blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.feeds = nn.ModuleList(Feed() for _ in range(8))
        self.a = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x0 = x
        for i, feed in enumerate(self.feeds):
            x = self.a[i] * x + 0.5 * x0
            x = x + feed(x)
        return x


def test_coefficients_are_kept_apart_from_sums() -> None:
    """A layer multiplies as many numbers as there are sources, and as many tensors where it is read, no more."""
    module = graph_module_of(Scaled(), "full")
    products = [n for n in module.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    numbers = [n for n in products if n.meta["val"].dim() == 0]
    # Layer i reads the root's part and i blocks, of which the last is not scaled before the read at its end.
    assert len(products) - len(numbers) == sum(1 + i for i in range(8)) - 1
    assert len(numbers) <= sum(1 + i for i in range(8))
    # No tensor of the stream is scaled twice on the way to a site.
    assert not [n for n in products if n not in numbers and n.args[0] in products]


def graph_module_of(model: nn.Module, blocks: int | str) -> torch.fx.GraphModule:
    return ar.rewrite(torch.fx.symbolic_trace(model), blocks, example_inputs=X)


class AddsAgain(nn.Module):
    """The branch output of the first layer is added a second time, scaled, in the last one."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.feeds = nn.Linear(32, 32), nn.ModuleList(Feed() for _ in range(4))
        self.c, self.cast = nn.Parameter(torch.tensor(0.75)), cast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, first = self.embed(x), None
        for i, feed in enumerate(self.feeds):
            f = feed(x)
            f = f.to(torch.float64) if self.cast else f
            first = f if i == 0 else first
            x = x + f
            if i == 3:
                x = x + self.c * first
        return x.tanh()


@pytest.mark.parametrize("cast", [False, True])
@torch.no_grad()
def test_a_branch_output_that_is_added_again_stays_in_its_block(cast: bool) -> None:
    model = AddsAgain(cast)
    if cast:
        model.double()
    x = X.double() if cast else X
    rewritten = randomise_sites(ar.rewrite(torch.fx.symbolic_trace(model), 2, example_inputs=x))
    queries, gains = site_parameters(rewritten)
    assert len(queries) == 4
    root = model.embed(x)
    f1 = model.feeds[0](root)
    f2 = model.feeds[1](block_attn_res([root, f1], queries[0], gains[0]))
    f3 = model.feeds[2](block_attn_res([root, f1 + f2], queries[1], gains[1]))
    f4 = model.feeds[3](block_attn_res([root, f1 + f2, f3], queries[2], gains[2]))
    last = block_attn_res([root, f1 + f2 + model.c * f1, f3 + f4], queries[3], gains[3])
    assert relative_error(rewritten(x), last.tanh()) < TOLERANCE


class OwnNorm(nn.Module):
    """A norm by hand, which is a product with the stream, and a residual chain on it in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        for linear in self.inner:
            n = n + linear(n)
        return n


def test_a_norm_by_hand_is_no_scale() -> None:
    """Or the stream would be taken for what the root of the inner chain is a sum of."""
    model = Scaled()
    model.feeds = nn.ModuleList(OwnNorm() for _ in range(8))
    (stream,) = ar.explain(torch.fx.symbolic_trace(model), 2, example_inputs=X).streams
    assert (stream.branches, len(stream.layers)) == (8, 8)


class Filled(nn.Module):
    """A row of the embedding is overwritten before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.feeds = nn.Linear(32, 32), nn.ModuleList(Feed() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 2.0 * self.embed(x)
        x[:, 0] = 1.0
        for feed in self.feeds:
            x = x + feed(x)
        return x


@torch.no_grad()
def test_an_embedding_may_be_filled_in_before_the_stream_begins() -> None:
    model = Filled().double()
    expected = model(X.double())
    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    ar.rewrite(model, config=config, example_inputs=X.double(), backend="eager")
    assert relative_error(model(X.double()), expected) < 1e-12


def test_what_is_looked_up_by_an_index_of_the_stream_begins_no_stream() -> None:
    """A residual vector quantiser: what is left over goes on to the next table."""

    class Quantiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ParameterList(torch.randn(8, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            found = torch.zeros_like(x)
            for table in self.tables:
                nearest = table[(x @ table.T).argmax(-1)]
                x, found = x - nearest, found + nearest
            return found

    with pytest.raises(ar.NoResidualStreamError):
        ar.rewrite(Quantiser(), 2, example_inputs=embeddings(), backend="eager")


class Scattered(nn.Module):
    """Every other layer writes what it makes into a tensor of zeros, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Feed() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            made = layer(x)
            if i % 2:
                made, whole = torch.zeros_like(made), made
                made[:, ::2] = whole[:, ::2]
            x = x + made
        return self.norm(x)


@pytest.mark.parametrize("dialect", ["torch", "aten"])
def test_what_is_written_into_a_tensor_is_the_output_of_a_branch(dialect: str) -> None:
    model = Scattered()
    if dialect == "aten":
        report = ar.explain(torch.export.export(model, (embeddings(),)), 2)
    else:
        report = ar.explain(model, 2, example_inputs=embeddings())
    assert "4 layers, 4 branch outputs, 4 sites" in str(report)
    assert "sources per site: 2 2 3 3" in str(report)


def test_the_last_read_is_of_what_the_embedding_was_mixed_into() -> None:
    """Also where the value before is read as well, and the root is a scaled embedding."""

    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Feed() for _ in range(2))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = 0.5 * x
            for layer in self.layers:
                h = h + layer(h)
            return self.norm(0.7 * h + 0.5 * x), h

    (stream,) = ar.explain(Ending(), 2, example_inputs=embeddings()).streams
    assert stream.sources == (2, 3, 3)
