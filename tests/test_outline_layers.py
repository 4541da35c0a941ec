"""Layers that are compiled once: the numbers are those of the inline form, alike branches share a body, and what cannot
be moved stays, with its reason in the log."""

import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    WIDTH,
    Feed,
    Tower,
    embeddings,
    gpt_neox,
    llama,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    token_ids,
)
from torch import Tensor, distributed, fx, nn
from torch._inductor.utils import fresh_inductor_cache
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from attnres_rewrite import _compat
from attnres_rewrite.forms import backend as backend_module
from attnres_rewrite.forms import saved_activations
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.graph.nodes import GraphBuilder, indices, op_name, value_of
from attnres_rewrite.ops import attend_blocks_cpp
from attnres_rewrite.passes import Outlined, OutlineLayers, PostconditionError
from attnres_rewrite.passes.bodies import Body
from attnres_rewrite.passes.outline_layers import BODY
from attnres_rewrite.passes.sections import Section, nodes_between, wants_gradients, why_it_stays

aten = torch.ops.aten
INVOKE = torch.ops.higher_order.invoke_subgraph
SWITCH = "_supports_training_input_mutation"
TOLERANCE = 1e-6  # float32
EXACT = 1e-11  # float64


@pytest.fixture
def outlined(monkeypatch: pytest.MonkeyPatch) -> list[Outlined]:
    """What the pass made of every graph."""
    found: list[Outlined] = []
    call = OutlineLayers.call

    def kept(self: OutlineLayers, *inputs: object) -> Outlined:
        found.append(call(self, *inputs))
        return found[-1]

    monkeypatch.setattr(OutlineLayers, "call", kept)
    return found


def rewritten(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    how: str,
    blocks: object,
    backend: str = "aot_eager",
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> nn.Module:
    # Biases keep something of what they start from.
    torch.manual_seed(0)
    model = prepared(make()).to(dtype)
    config = ar.AttnResConfig(**{"blocks": blocks, "schedule": "two_phase", **options}, compile_layers=how)
    ar.rewrite(model, config=config, example_inputs=(inputs,), backend=backend)
    return randomise_sites(model).train()


def step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of a training step and the gradients of all parameters that have one."""
    torch.manual_seed(0)
    output = logits(model(inputs))
    wide = output if output.dtype == torch.float64 else output.float()
    (wide * torch.linspace(-1, 1, wide.shape[-1], dtype=wide.dtype)).square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_as_inline(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    blocks: object,
    prepare: Callable[[nn.Module], nn.Module | None] = lambda model: None,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> None:
    """Output and gradients of a training step are those of the inline form.

    Before it, ``prepare`` may change the model, or give what runs it. In float32 the two differ by rounding: each is
    some 1e-5 from what float64 gives for the gradients of a tower.
    """
    tolerance, found = EXACT if dtype == torch.float64 else TOLERANCE, []
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    for how in ("inline", "once"):
        model = rewritten(make, inputs, how, blocks, dtype=dtype, **options)
        model = prepare(model) or model
        found.append(step(model, inputs))
        torch._dynamo.reset()
    (expected, gradients), (output, own) = found
    assert relative_error(output, expected) < tolerance
    assert own.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        assert relative_error(own[name], gradient) < tolerance, name


class Branchy(Tower):
    """Feeds whose forward is ``branch``, which may do what a body cannot."""

    def __init__(self, branch: Callable[[Feed, Tensor], Tensor], layers: int = 2) -> None:
        super().__init__(layers)
        for feed in self.modules():
            if isinstance(feed, Feed):
                feed.register_buffer("seen", torch.zeros(WIDTH))
                feed.forward = branch.__get__(feed)


# The last block of one layer begins and ends with it; uneven blocks have layers of every kind.
@pytest.mark.parametrize("sizes", mostly_slow([(2, 1), (3, 1), (2, 2, 2)], (2, 1)))
@pytest.mark.parametrize("schedule", mostly_slow(["per_read", "two_phase"], "two_phase"))
def test_numbers_of_the_inline_form(outlined, sizes: tuple[int, ...], schedule: str) -> None:
    layers, blocks = sum(sizes), list(sizes)
    assert_as_inline(lambda: Tower(layers), embeddings(), blocks, schedule=schedule)
    assert [(found.calls, found.inline) for found in outlined] == [((2 * layers,), ())]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs with the calls."""
    found: list[fx.GraphModule] = []
    monkeypatch.setattr(OutlineLayers, "ensures", lambda self, module, *_: found.append(module))
    return found


def names(graph: fx.Graph) -> list[str]:
    return [op_name(node) for node in graph.nodes]


# Blocks that end within a layer have MLPs that begin one.
@pytest.mark.parametrize(
    ("blocks", "settings", "attended"),
    [
        ("full", {}, 6),
        pytest.param([2, 1], {}, 2, marks=pytest.mark.slow),
        pytest.param([2, 1], {"aggregation": "sum", "key_gain": False}, 2, marks=pytest.mark.slow),
        pytest.param(8, {"sublayers_per_block": 3}, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("native", mostly_slow([True, False], True))
def test_reads_are_in_the_bodies(outlined, graphs, monkeypatch, blocks, settings, attended: int, native: bool) -> None:
    """Between the calls there is phase one, and the read after the last layer."""
    if not native:
        monkeypatch.setattr(attend_blocks_cpp, "library", lambda dtype: None)
    assert_as_inline(lambda: Tower(3), embeddings(), blocks, **settings)
    (found,), (module,) = outlined, graphs
    assert (found.calls, found.inline) == ((6,), ())
    outside = names(module.graph)
    assert outside.count("merge_partial") == 1
    assert outside.count("attend_blocks_native" if native else "attend_blocks") == attended
    assert names(getattr(module, f"{BODY}_0").graph).count("merge_partial") == 1


def test_reads_of_another_form_stay_between_the_calls(outlined, graphs) -> None:
    assert_as_inline(lambda: Tower(3), embeddings(), [2, 1], aggregation="add", gate=True)
    (found,), (module,) = outlined, graphs
    assert sum(found.calls) == 6
    assert names(module.graph).count("merge_partial") == 6


@pytest.mark.slow
def test_nothing_is_inserted_where_all_reads_are_alike(outlined, graphs) -> None:
    """With a layer a block no attention has a partial, and every MLP has one."""

    class Kinds(Tower):
        def __init__(self) -> None:
            super().__init__(3)
            for layer in self.layers:
                layer.second.norm = nn.LayerNorm(WIDTH, eps=1e-3)

    assert_as_inline(Kinds, embeddings(), 3)
    assert outlined[-1].calls == (3, 3)
    assert names(graphs[-1].graph).count("add") == 0


def test_zeros_without_an_epsilon_have_no_norm(outlined, graphs) -> None:
    assert_as_inline(lambda: Tower(2), embeddings(), 2, eps=0.0)
    assert outlined[-1].calls == (4,)
    assert names(graphs[-1].graph).count("no_partial") == 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
@pytest.mark.parametrize("layers", [4, 6])
@pytest.mark.parametrize(("make", "branches"), [(llama, 2), (gpt_neox, 1)])
def test_numbers_of_models(outlined, make: Callable[..., nn.Module], branches: int, layers: int, schedule: str) -> None:
    assert_as_inline(lambda: make(layers), token_ids(), 3, schedule=schedule, aggregation="sum")
    assert outlined[-1].calls == (layers,) * branches


def test_only_queries_train() -> None:
    """What a body is given requires gradients that nothing in the plain model did."""

    def freeze(model: nn.Module) -> None:
        sites = {id(parameter) for _, parameter in ar.attnres_parameters(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in sites)

    assert_as_inline(lambda: Tower(2), embeddings(), 2, freeze)


@pytest.mark.slow
def test_frozen_layers_have_a_body_of_their_own(outlined) -> None:
    """A body is differentiated once, so it cannot serve calls of which other gradients are wanted."""

    def freeze(model: Tower) -> None:
        model.layers[:2].requires_grad_(False)

    assert_as_inline(lambda: Tower(4), embeddings(), 2, freeze)
    assert sorted(outlined[-1].calls) == [4, 4]


class Tied(Tower):
    """All layers are one module, as in ALBERT, but the last one, in which two weights are one tensor."""

    def __init__(self) -> None:
        super().__init__(4)
        for feed in self.modules():
            if isinstance(feed, Feed):
                feed.up, feed.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers[1] = self.layers[0]
        for feed in (self.layers[3].first, self.layers[3].second):
            feed.up.weight = feed.down.weight


@pytest.mark.slow
def test_tied_weights(outlined) -> None:
    """Two operands that are one tensor in the call that is traced stay two for the others."""
    assert_as_inline(Tied, embeddings(), 2)
    assert outlined[-1].calls == (8,)


@pytest.mark.slow
def test_structure_decides_what_is_shared(outlined) -> None:
    class Hybrid(Tower):
        def __init__(self) -> None:
            super().__init__(4)
            for layer in self.layers[1::2]:
                layer.second.norm = nn.LayerNorm(WIDTH, eps=1e-3)
            self.layers[3].second.up = nn.Linear(WIDTH, 3 * WIDTH)
            self.layers[3].second.down = nn.Linear(3 * WIDTH, WIDTH)

    assert_as_inline(Hybrid, embeddings(), 2)
    (found,) = outlined
    # Six of one epsilon; of the other there is one, and one that is wider.
    assert found.calls == (6,)
    assert [reason for _, reason in found.inline] == ["no other branch is computed like it"] * 2


def random(feed: Feed, x: Tensor) -> Tensor:
    return nn.functional.dropout(feed.down(feed.up(feed.norm(x)).tanh()), 0.5, True)


def writing(feed: Feed, x: Tensor) -> Tensor:
    feed.seen.add_(1)
    y = feed.norm(x)
    feed.seen.add_(y.detach().mean())
    return feed.down(feed.up(y + feed.seen).tanh())


def without_gradients(feed: Feed, x: Tensor) -> Tensor:
    y = feed.norm(x)
    with torch.no_grad():
        scale = y.square().mean()
    return feed.down(feed.up(y * scale).tanh())


def under_autocast(feed: Feed, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return feed.down(feed.up(feed.norm(x)).tanh()).to(x.dtype)


def checkpointed(feed: Feed, x: Tensor) -> Tensor:
    return checkpoint(lambda x: feed.down(feed.up(feed.norm(x)).tanh()), x, use_reentrant=False)


def assembling(feed: Feed, x: Tensor) -> Tensor:
    """Puts a tensor together as the keys of latent attention are, which nothing but writes leads to."""
    parts = feed.up(feed.norm(x)).chunk(2, -1)
    whole = parts[0].new_empty((*x.shape[:-1], 2 * parts[0].shape[-1]))
    whole[..., ::2] = parts[0]
    whole[..., 1::2] = parts[1].tanh()
    whole /= whole.square().sum(-1, keepdim=True) + 1
    return feed.down(whole)


def test_a_branch_may_write_into_what_it_makes(outlined) -> None:
    assert_as_inline(lambda: Branchy(assembling), embeddings(), 2)
    assert (outlined[-1].calls, outlined[-1].inline) == ((4,), ())


def test_what_is_written_wants_the_gradients_of_what_is_put_in() -> None:
    graph = fx.Graph()
    x, made, after = (
        graph.placeholder("x"),
        graph.call_function(torch.zeros, (2,)),
        graph.call_function(torch.zeros, (2,)),
    )
    written = graph.call_method("copy_", (made, x))
    used, other = graph.call_function(torch.relu, (made,)), graph.call_function(torch.relu, (after,))
    with FakeTensorMode():
        for node in (made, after, used, other):
            node.meta["example_value"] = torch.zeros(2)
        x.meta["example_value"], written.meta["example_value"] = torch.zeros(2).requires_grad_(), value_of(made)
    wanted = wants_gradients(graph)
    assert [wanted[node] for node in (x, made, used, after, other)] == [True, True, True, False, False]


@pytest.mark.parametrize("read_before", [False, True])
def test_memory_that_is_read_outside_before_it_is_written_stays(read_before: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.relu, (x,))
    reads = [graph.call_function(torch.tanh, (made,)) for _ in range(read_before)]
    written = graph.call_method("mul_", (made, 2))
    reads.append(graph.call_function(torch.tanh, (made,)))
    graph.output(tuple(reads))
    with FakeTensorMode():
        for node in (x, made, *reads):
            node.meta["example_value"] = torch.zeros(2)
        written.meta["example_value"] = value_of(made)
    index = indices(graph)
    nodes = nodes_between(x, [made], index)
    assert nodes == [made]
    reason = why_it_stays(Section.of([made, written], (True,)), index)
    assert reason == ("mul_ (mul_) writes into memory that is not the branch's alone" if read_before else None)


def rotating(feed: Feed, x: Tensor) -> Tensor:
    """As rotary embeddings are written with complex numbers."""
    turned = torch.view_as_complex(feed.up(feed.norm(x)).unflatten(-1, (-1, 2)))
    angles = torch.linspace(0, 1, turned.shape[-1], dtype=x.dtype)
    return feed.down(torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2))


def test_what_is_given_a_complex_number_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(torch.view_as_real, (x,))
    graph.output(parts)
    with FakeTensorMode():
        x.meta["example_value"] = torch.zeros(2, dtype=torch.complex64)
        parts.meta["example_value"] = torch.zeros(2, 2)
    assert "x is complex" in str(why_it_stays(Section.of([parts], (True,)), indices(graph)))


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (random, "draws random numbers"),
        pytest.param(rotating, "is complex", marks=pytest.mark.slow),
        pytest.param(writing, "writes into memory that is not the branch's alone", marks=pytest.mark.slow),
        pytest.param(without_gradients, "runs in the midst of it", marks=pytest.mark.slow),
        pytest.param(under_autocast, "under autocast", marks=pytest.mark.slow),
        pytest.param(checkpointed, "activation checkpointing", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_moved_stays(outlined, branch: Callable[[Feed, Tensor], Tensor], reason: str) -> None:
    assert_as_inline(lambda: Branchy(branch), embeddings(), 2)
    found = outlined[-1]
    assert found.calls == ()
    assert len(found.inline) == 4
    assert all(reason in why for _, why in found.inline)


def masked_attention(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, x @ x.t() > 0)


def fused_attention(x: Tensor) -> Tensor:
    """One operator on a CPU, which has the tag of those that are random."""
    x = x[None, None]
    return nn.functional.scaled_dot_product_attention(x, x, x)


def built(*operators: Callable[[Tensor], Tensor]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A graph in which every operator is applied to the result of the one before, and their nodes."""
    module, mode = fx.GraphModule({}, fx.Graph()), FakeTensorMode()
    node = source = module.graph.placeholder("x")
    source.meta["example_value"] = mode.from_tensor(torch.ones(2, WIDTH))
    nodes = [node := GraphBuilder(module).call(operator, node, like=source) for operator in operators]
    module.graph.output(tuple(nodes))
    return module, nodes


@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        ((torch.tanh, torch.relu), None),
        ((torch.tanh, masked_attention), None),
        ((torch.tanh, fused_attention), None),
        ((torch.detach, torch.relu), "a view of an operand"),
        ((torch.relu, torch.t), "views of one tensor"),
        ((torch.relu, torch.bernoulli), "draws random numbers"),
    ],
)
def test_a_body_is_tried_on_fake_values(operators: tuple[Callable[[Tensor], Tensor], ...], reason: str | None) -> None:
    _, nodes = built(*operators)
    found = Body([Section.of(nodes, (True,))] * 2).why_it_stays()
    assert found == reason if reason is None else reason in found


def test_numbers_that_are_operands_are_compared() -> None:
    graph, structures = fx.Graph(), set()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    x.meta["example_value"] = torch.ones(2)
    product = graph.call_function(operator.mul, (x, n))
    graph.output(product)
    for number in (2, 3, 3):
        n.meta["example_value"] = number
        structures.add(Section.of([product], (True,)).structure)
    assert len(structures) == 2


def test_a_body_that_cannot_be_tried_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no\nmore")

    monkeypatch.setattr(_compat, "operators_run", fail)
    _, nodes = built(torch.tanh)
    assert Body([Section.of(nodes, (True,))] * 2).why_it_stays() == "it cannot be tried on fake values: no"


def test_operands_are_taken_from_outside() -> None:
    """What a called graph returns of its operands, or views of them, is what was given; the rest stays."""
    mode = FakeTensorMode()
    body = fx.Graph()
    x, w = body.placeholder("x"), body.placeholder("w")
    x.meta["val"], w.meta["val"] = mode.from_tensor(torch.ones(2, 3)), mode.from_tensor(torch.ones(4, 3))
    turned = body.call_function(aten.t.default, (w,))
    product = body.call_function(aten.mm.default, (x, turned))
    turned.meta["val"] = w.meta["val"].t()
    product.meta["val"] = x.meta["val"] @ turned.meta["val"]
    body.output((product, x, turned))
    graph = fx.Graph()
    given = [graph.placeholder("a"), graph.placeholder("b")]
    call = graph.call_function(INVOKE, (graph.get_attr("body"), BODY, *given))
    graph.output(tuple(graph.call_function(operator.getitem, (call, i)) for i in range(3)))
    module = fx.GraphModule({"body": fx.GraphModule({}, body)}, graph)

    assert saved_activations.take_operands_from_outside(module.graph) == 2
    module.graph.lint()
    result, first, second = module.graph.output_node().args[0]
    assert (result.args, first) == ((call, 0), given[0])
    assert (second.target, second.args) == (aten.t.default, (given[1],))


@pytest.mark.parametrize("backend", ["eager", lambda module, inputs: module.forward])
def test_a_backend_that_takes_no_calls(outlined, caplog, backend: object) -> None:
    with caplog.at_level(logging.INFO, logger="attnres_rewrite"):
        step(rewritten(lambda: Tower(2), embeddings(), "once", 2, backend), embeddings())
    assert outlined == []
    assert "is not known to take calls of graphs" in caplog.text


class Region(nn.Module):
    """``inner`` in a region of PyTorch's, which runs twice: one that runs once is inlined."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.region = inner, torch.compiler.nested_compile_region(lambda x: inner(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.region(x) + self.region(x)


@pytest.mark.skipif(not hasattr(INVOKE, SWITCH), reason="this release of torch looks in any case")
@pytest.mark.parametrize("region", [False, True])
def test_calls_are_looked_at_for_writes_where_a_region_of_the_user_is(monkeypatch, region: bool) -> None:
    """A body is traced anew to look. Those of the pass write nothing; what a region of the user's does is not known."""
    traced, gen_schema = [], type(INVOKE).gen_schema

    def counted(operator: Any, subgraph: object, identifier: str, *operands: object) -> object:
        traced.append(identifier)
        return gen_schema(operator, subgraph, identifier, *operands)

    monkeypatch.setattr(type(INVOKE), "gen_schema", counted)
    before, model = getattr(INVOKE, SWITCH), rewritten(lambda: Tower(2), embeddings(), "once", 2)
    if region:
        model.head = Region(model.head)
    step(model, embeddings())
    # To make it functional, a body is traced once.
    assert traced.count(f"fw_{BODY}_0") == 1
    assert traced.count(f"{BODY}_0") == (8 if region else 0)
    assert getattr(INVOKE, SWITCH) is before is False


def test_inductor_takes_no_calls_with_a_cpp_wrapper() -> None:
    assert AttnResBackend()._why_inline(None) is None
    assert "cpp_wrapper" in str(AttnResBackend()._why_inline({"cpp_wrapper": True}))


def test_the_postcondition_counts_calls() -> None:
    module, _ = built(torch.tanh)
    with pytest.raises(PostconditionError, match=r"bodies have \[\] calls in the graph instead of \[2\]"):
        OutlineLayers().ensures(module, Outlined((2,), (), {}), [])


def test_values_of_the_field() -> None:
    with pytest.raises(ValueError, match="compile_layers must be one of"):
        ar.AttnResConfig(compile_layers="twice")


@pytest.mark.slow
def test_dynamic_length(outlined) -> None:
    """One graph for every length, with bodies that take the length too."""
    inline, model = (
        rewritten(lambda: Tower(2), embeddings().double(), how, 2, dtype=torch.float64) for how in ("inline", "once")
    )
    expected = {}
    for length in (5, 7):
        inline.zero_grad()
        expected[length] = step(inline, embeddings(2, length).double())
        torch._dynamo.reset()
    for length, (output, gradients) in expected.items():
        model.zero_grad()
        inputs = embeddings(2, length).double()
        torch._dynamo.mark_dynamic(inputs, 1)
        own, found = step(model, inputs)
        assert relative_error(own, output) < EXACT
        assert max(relative_error(found[name], gradients[name]) for name in gradients) < EXACT
    assert [found.calls for found in outlined] == [(4,)]


@pytest.mark.slow
def test_dynamic_length_of_a_model(outlined) -> None:
    model, inline = (
        rewritten(lambda: llama(3), token_ids(), how, 2, dtype=torch.float64) for how in ("once", "inline")
    )
    for length in (5, 9, 17):
        own, expected = (step(each, token_ids(2, length))[0] for each in (model, inline))
        assert relative_error(own, expected) < EXACT
    assert all(found.calls == (3, 3) for found in outlined)


def half_precision() -> torch.autocast:
    return torch.autocast("cpu", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "calls"), [(torch.no_grad, (3, 4)), (half_precision, (4,))])
def test_modes_around_layers(outlined, mode: Callable[[], Any], calls: tuple[int, ...]) -> None:
    """The lower layers run without gradients, and of the first read alone some are wanted; or in a dtype that autocast
    has not by default, and so stay inline."""

    class Within(Tower):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            with mode():
                for layer in self.layers[:2]:
                    x = layer(x)
            for layer in self.layers[2:]:
                x = layer(x)
            return self.head(self.norm(x))

    # Autocast leaves float64 as it is.
    assert_as_inline(lambda: Within(4), embeddings(), 2, dtype=torch.float32, schedule="per_read")
    assert outlined[-1].calls == calls


@pytest.mark.slow
def test_autocast() -> None:
    found = []
    for how in ("inline", "once"):
        model = rewritten(lambda: llama(3), token_ids(), how, 2)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(model, token_ids()))
        torch._dynamo.reset()
    (expected, gradients), (output, own) = found
    assert relative_error(output, expected) < 2**-8
    assert max(relative_error(own[name], gradients[name]) for name in gradients) < 2**-8


@pytest.mark.slow
def test_distributed_data_parallel() -> None:
    """One rank; the gradients go through its buckets."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=False):
            assert_as_inline(lambda: Tower(3), embeddings(), 2, nn.parallel.DistributedDataParallel)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_generate_with_a_cache(outlined) -> None:
    tokens = []
    for how in ("inline", "once"):
        model = rewritten(lambda: llama(3), token_ids(), how, 2).eval()
        tokens.append(model.generate(token_ids(2, 5).clamp_min(1), max_new_tokens=6, do_sample=False))
        torch._dynamo.reset()
    assert torch.equal(*tokens)
    assert outlined[0].calls == (3, 3)
    # Once lengths are dynamic, the cache of every layer has one of its own, so that attention over it is not alike.
    assert outlined[-1].calls == (3,)


class Masked(Tower):
    """Layers that attend under a mask of booleans, which is the same for all unless each makes its ``own``."""

    def __init__(self, layers: int = 3, own: bool = False) -> None:
        super().__init__(layers)
        self.own = own
        for layer in self.layers:
            layer.first.forward = functools.partial(self.attend, layer.first)

    def attend(self, feed: Feed, x: Tensor) -> Tensor:
        query, key = feed.up(feed.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(2, 1)
        mask = self.make_mask(x) if self.own else self.mask
        value = nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return feed.down(torch.cat([value, value.sin()], 1).transpose(1, 2).flatten(2))

    def make_mask(self, x: Tensor) -> Tensor:
        """Whom a token attends to: itself, and every other token before it."""
        tokens = torch.arange(x.shape[1], device=x.device)
        distance = tokens[:, None] - tokens
        return (distance >= 0) & (distance % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        self.mask = self.make_mask(x)
        return super().forward(x)


def test_a_mask_is_made_outside_of_the_bodies(outlined, graphs) -> None:
    assert_as_inline(Masked, embeddings(), 2)
    module = graphs[-1]
    assert names(module.graph).count("where") == 1
    for i in range(len(outlined[-1].calls)):
        placeholders = getattr(module, f"{BODY}_{i}").graph.find_nodes(op="placeholder")
        assert torch.bool not in {node.meta["example_value"].dtype for node in placeholders}


def test_a_mask_of_one_layer_stays_in_it(outlined, graphs) -> None:
    assert_as_inline(lambda: Masked(own=True), embeddings(), 2)
    assert names(graphs[-1].graph).count("where") == 0


class Overwritten(Masked):
    """Tokens attend to themselves only, from the second layer on."""

    def attend(self, feed: Feed, x: Tensor) -> Tensor:
        found = super().attend(feed, x)
        self.mask.copy_(torch.eye(x.shape[1], dtype=torch.bool))
        return found


def test_a_mask_that_changes_stays_a_mask() -> None:
    found = []
    for how in ("inline", "once"):
        model = rewritten(Overwritten, inputs := embeddings().double(), how, 2, dtype=torch.float64)
        with torch.no_grad():
            found.append(model(inputs))
        torch._dynamo.reset()
    assert relative_error(*found) < EXACT


def test_a_shared_mask_is_kept_once() -> None:
    """A body keeps no mask for the backward that another call has too."""
    kept, length = {}, embeddings().shape[1]
    for how in ("inline", "once"):
        model = rewritten(lambda: Masked(4), embeddings(), how, 2, "aot_eager_decomp_partition")
        masks = set[int]()

        def seen(tensor: Tensor, masks: set[int] = masks) -> Tensor:
            if tensor.shape[-2:] == (length, length):
                masks.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
            model(embeddings())
        kept[how] = len(masks)
        torch._dynamo.reset()
    assert kept["once"] == kept["inline"] == 1


@pytest.mark.parametrize(
    ("used", "branches", "numbers", "reason"),
    [
        (AttnResBackend(), 4, 1, None),
        (AttnResBackend(mode="default", options={}), 4, 1, None),
        (AttnResBackend("aot_eager"), 4, 1, "compiles no kernels"),
        (AttnResBackend(mode="max-autotune"), 4, 1, "a mode or options"),
        (AttnResBackend(options={"max_autotune": True}), 4, 1, "a mode or options"),
        (AttnResBackend(), 5, 1, "there are 4 branches, fewer than 5"),
        (AttnResBackend(), 4, 10**6, "fewer than 1000000"),
    ],
    ids=["once", "defaults", "backend", "mode", "options", "branches", "numbers"],
)
def test_auto_goes_by_size(
    outlined, monkeypatch, caplog, used: AttnResBackend, branches: int, numbers: int, reason: str | None
) -> None:
    monkeypatch.setattr(backend_module, "_MANY_BRANCHES", branches)
    monkeypatch.setattr(backend_module, "_MANY_NUMBERS", numbers)
    monkeypatch.setattr(_compat, "inductor_compile", lambda module, *_: module.forward)
    model = torch.compile(rewritten(lambda: Tower(2), embeddings(), "auto", 2, "eager"), backend=used)
    with caplog.at_level(logging.INFO, logger="attnres_rewrite"):
        model(embeddings())
    assert [found.calls for found in outlined] == ([(4,)] if reason is None else [])
    assert ("layers are compiled once" if reason is None else "layers are compiled inline: ") in caplog.text
    assert (reason or "") in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_inductor_compiles_a_body_once(outlined, monkeypatch, training: bool) -> None:
    """Of four layers two bodies are compiled, and their backwards; the numbers are those of the inline form."""
    called: set[str] = set()
    real = saved_activations.take_operands_from_outside

    def counted(graph: fx.Graph) -> int:
        called.update(str(node.args[1]) for node in graph.find_nodes(op="call_function", target=INVOKE))
        return real(graph)

    monkeypatch.setattr(saved_activations, "take_operands_from_outside", counted)
    found = []
    for how in ("inline", "once"):
        # In float64, as rounding differs between kernels; but the norms of a Llama are in float32 there too.
        model = rewritten(lambda: llama(4), token_ids(), how, 3, "inductor", torch.float64).train(training)
        with torch.set_grad_enabled(training), fresh_inductor_cache():
            found.append(step(model, token_ids()) if training else (logits(model(token_ids())), {}))
        torch._dynamo.reset()
    (expected, gradients), (output, own) = found
    assert relative_error(output, expected) < TOLERANCE
    # The inline form differs as much from eager mode.
    assert max((relative_error(own[name], gradients[name]) for name in gradients), default=0.0) < 3e-5
    assert outlined[-1].calls == (4, 4)
    assert len(called) == (4 if training else 2)


@pytest.mark.slow
def test_inductor_without_the_compiled_function(monkeypatch) -> None:
    """Phase one is expanded, and its log-sums, which are parts of one tensor there, are copied for the bodies."""
    monkeypatch.setattr(attend_blocks_cpp, "library", lambda dtype: None)
    assert_as_inline(lambda: Tower(3), embeddings(), [2, 1], backend="inductor")


@pytest.mark.parametrize(
    ("how", "blocks", "warns"), [("inline", "full", True), ("once", "full", False), ("inline", 2, False)]
)
def test_a_long_compilation_is_announced(monkeypatch, caplog, how: str, blocks: object, warns: bool) -> None:
    monkeypatch.setattr(backend_module, "_MANY_SOURCES", 4)
    monkeypatch.setattr(_compat, "inductor_compile", lambda module, *_: module.forward)
    model = rewritten(lambda: Tower(2), embeddings(), how, blocks, "inductor")
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        model(embeddings())
    assert ("up to 5 sources, 14 in all" in caplog.text) == warns
    assert ('compile_layers="once"' in caplog.text) == warns
