"""Each pass by itself: it changes what it should, leaves alone what it should, and the numbers stay the same."""

import copy
import operator
import re
import textwrap
from collections.abc import Callable

import pytest
import torch
from models import (
    VOCAB,
    WIDTH,
    Block,
    Feed,
    Tower,
    activations_kept,
    embeddings,
    export,
    llama,
    logits,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import block_attn_res, run_stream
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar
from attnres_rewrite import _compat
from attnres_rewrite.capture.dynamo import capture
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.forms.graph_module import with_metadata
from attnres_rewrite.graph.nodes import GraphBuilder, op_name
from attnres_rewrite.passes import (
    CheckRewrite,
    Expansion,
    FindStreams,
    GroupLayers,
    InlineRegions,
    InsertAttnRes,
    PostconditionError,
    RefuseNonSums,
    ResolveInplaceOps,
    Site,
    SiteParameters,
)
from attnres_rewrite.pipeline import find_streams
from attnres_rewrite.streams import ResidualStream, StreamPlan

TOLERANCE = 1e-5  # float32
X = embeddings()


def by_dynamo(model: nn.Module) -> GraphModule:
    return capture(model, Call((X,), {})).modules[0]


def by_export(model: nn.Module) -> GraphModule:
    return export(model, X).graph_module


def by_fx(model: nn.Module) -> GraphModule:
    return with_metadata(torch.fx.symbolic_trace(model), X)


DIALECTS: dict[str, Callable[[nn.Module], GraphModule]] = {"dynamo": by_dynamo, "export": by_export, "fx": by_fx}
every_dialect = pytest.mark.parametrize("graph_of", DIALECTS.values(), ids=DIALECTS)


def nodes_named(module: GraphModule, name: str) -> list[Node]:
    return [node for node in module.graph.nodes if op_name(node) == name]


class Chain(nn.Module):
    """Four sublayers in one forward, joined to the stream by ``add(x, sublayer, i)``."""

    def __init__(self, add: Callable[..., Tensor], sublayers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.feeds = nn.ModuleList(Feed() for _ in range(sublayers))
        self.norm = nn.LayerNorm(WIDTH)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for feed in self.feeds:
            x = self.add(x, feed)
        return self.norm(x)


def chain(add: Callable[..., Tensor]) -> Chain:
    return prepared(Chain(add))


def rewritten_chain(model: nn.Module, blocks: int | str = "full") -> tuple[GraphModule, list[Tensor], list[Tensor]]:
    module = randomise_sites(ar.rewrite(torch.fx.symbolic_trace(model), blocks, example_inputs=X))
    return module, *site_parameters(module)


# Pass 1


class Checkpointed(Tower):
    """Every other layer is a checkpointed region."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = layer(x) if i % 2 else checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x))


def test_inline_regions_takes_every_region_apart() -> None:
    module = by_dynamo(Checkpointed(5))
    assert len([node for node in module.graph.nodes if _compat.is_checkpoint(node)]) == 3
    assert InlineRegions()(module) == 3
    assert not nodes_named(module, "tag_activation_checkpoint")
    tags = [node.meta["ac_graph_id"] for node in module.graph.nodes if "ac_graph_id" in node.meta]
    # What the compiler may recompute, region by region: two adds each, and what leads to them.
    assert sorted(set(tags)) == [1, 2, 3]
    tagged = [node.meta["ac_graph_id"] for node in nodes_named(module, "add") if "recompute" in node.meta]
    assert tagged == [1, 1, 2, 2, 3, 3]
    assert len(find_streams(module).streams[0].branches) == 10


def test_inline_regions_leaves_a_flat_graph_alone() -> None:
    module = by_dynamo(Tower(2))
    before = list(module.graph.nodes)
    assert InlineRegions()(module) == 0
    assert all(a is b for a, b in zip(before, module.graph.nodes, strict=True))


def test_inline_regions_keeps_the_numbers() -> None:
    model = prepared(Checkpointed(3))
    expected = model(X)
    graphs: list[GraphModule] = []

    def inlining(module: GraphModule, _: object) -> GraphModule:
        assert InlineRegions()(module) == 2
        graphs.append(module)
        return module

    assert torch.equal(torch.compile(model, backend=inlining, fullgraph=True)(X), expected)
    assert len(graphs) == 1


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that the forward keeps for the backward."""
    ids = token_ids(2, 12)
    model.zero_grad()
    model(ids)  # Compiled before it is measured.
    with activations_kept(model) as kept:
        loss = nn.functional.cross_entropy(logits(model(ids)).flatten(0, 1), ids.flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.slow
def test_checkpointed_training_of_a_hugging_face_model() -> None:
    """The same loss and gradients as without checkpoints, of the sites too, from less memory."""
    plain = prepared(llama(3), torch.float64).train()
    # Hugging Face warns of a cache beside checkpoints, which breaks the graph.
    plain.config.use_cache = False
    model = randomise_sites(ar.rewrite(copy.deepcopy(plain), 2, backend="aot_eager"))
    loss, gradients, size = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    again, recomputed, smaller = loss_and_gradients(model)
    assert relative_error(again, loss) < 1e-9
    assert {name for name in gradients if "attn_res" in name} == {name for name, _ in ar.attnres_parameters(model)}
    errors = {name: relative_error(recomputed[name], gradient) for name, gradient in gradients.items()}
    assert max(errors.values()) < 1e-9, errors
    assert smaller < size / 2
    # And the plain model, checkpointed by eager PyTorch, against zero queries.
    plain.gradient_checkpointing_enable()
    zero = copy.deepcopy(plain)
    ar.rewrite(zero, config=ar.AttnResConfig(blocks=2, aggregation="sum"), backend="aot_eager")
    expected, gradients, _ = loss_and_gradients(plain)
    loss, actual, _ = loss_and_gradients(zero)
    assert relative_error(loss, expected) < 1e-9
    assert max(relative_error(actual[name], gradient) for name, gradient in gradients.items()) < 1e-9


# Pass 2


def in_place(x: Tensor, feed: nn.Module) -> Tensor:
    x += feed(x)
    return x


IN_PLACE = (operator.iadd, torch.ops.aten.add_.Tensor, "add_")


@every_dialect
@pytest.mark.parametrize("spelling", ["operator, in place", "in-place method"])
def test_resolve_inplace_ops_changes_all_on_intermediates(spelling, graph_of) -> None:
    module = graph_of(chain(SPELLINGS[spelling]))
    # A symbolic trace has turned the operator into an add that is not in place.
    count = 0 if graph_of is by_fx and spelling.startswith("operator") else 4
    assert len([node for node in module.graph.nodes if node.target in IN_PLACE]) == count
    assert ResolveInplaceOps()(module) == count
    assert not [node for node in module.graph.nodes if node.target in IN_PLACE]
    (stream,) = FindStreams()(module).streams
    assert len(stream.branches) == 4


@pytest.mark.parametrize("verb", [ar.explain, ar.rewrite])
def test_an_exported_program_keeps_its_in_place_adds(verb) -> None:
    """They are resolved in a copy."""
    program = export(chain(in_place), X)
    before = str(program.graph)
    assert "add_" in before
    verb(program, "full")
    assert str(program.graph) == before


def test_resolve_inplace_ops_leaves_out_of_place_ones_alone() -> None:
    module = by_fx(chain(lambda x, feed: x + feed(x)))
    before = str(module.graph)
    assert ResolveInplaceOps()(module) == 0
    assert str(module.graph) == before


class Overwrites(nn.Module):
    """Adds in place into its own input, and into a tensor of which there is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Feed(), Feed(), Feed()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(self.first(x))
        y = x * 1.5
        view = y.view(-1, WIDTH)
        y.add_(self.second(y))
        return view, y + self.third(y)


def test_resolve_inplace_ops_leaves_shared_tensors_alone() -> None:
    model = prepared(Overwrites())
    module = by_fx(model)
    assert ResolveInplaceOps()(module) == 0
    reasons = {r.reason for r in FindStreams()(module).rejected}
    assert reasons >= {"it overwrites a tensor that something else shares"}
    left, right = X.clone(), X.clone()
    for actual, expected in zip(module(left), model(right), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(left, right)


def test_resolve_inplace_ops_keeps_the_numbers() -> None:
    model = chain(lambda x, feed: x.add_(feed(x)))
    module = by_fx(model)
    expected = model(X)
    assert ResolveInplaceOps()(module) == 4
    assert torch.equal(module(X), expected)
    rewritten, queries, gains = rewritten_chain(model, 2)
    layers = [(feed,) for feed in model.feeds]
    reference = model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=2))
    assert relative_error(rewritten(X), reference) < TOLERANCE


# Pass 3


SPELLINGS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "x + f": lambda x, feed: x + feed(x),
    "f + x": lambda x, feed: feed(x) + x,
    "operator": lambda x, feed: operator.add(x, feed(x)),
    "torch.add": lambda x, feed: torch.add(x, feed(x)),
    "torch.add, named": lambda x, feed: torch.add(input=x, other=feed(x)),
    "method": lambda x, feed: x.add(feed(x)),
    "in-place method": lambda x, feed: x.clone().add_(feed(x)),
    "operator, in place": in_place,
    "contiguous": lambda x, feed: x.contiguous() + feed(x),
    "cast": lambda x, feed: (x.float() + feed(x)).to(torch.float32),
    "reshaped": lambda x, feed: (x.reshape(-1, WIDTH) + feed(x.reshape(-1, WIDTH))).view(2, 9, WIDTH),
    "read twice": lambda x, feed: x + (feed(x) + feed(2 * x)),
}


@every_dialect
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_find_streams_in_every_spelling(spelling, graph_of) -> None:
    (stream,) = find_streams(graph_of(chain(SPELLINGS[spelling]))).streams
    assert len(stream.branches) == 4
    assert [len(branch.adds) for branch in stream.branches] == [1] * 4
    assert stream.width == WIDTH


@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_every_spelling_gives_the_same_numbers(spelling) -> None:
    model = chain(SPELLINGS[spelling])
    rewritten, queries, gains = rewritten_chain(model, 2)

    def branch(feed: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda h: feed(h) + feed(2 * h) if spelling == "read twice" else feed(h)

    layers = [(branch(feed),) for feed in model.feeds]
    reference = model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=2))
    assert relative_error(rewritten(X), reference) < TOLERANCE


@every_dialect
@torch.no_grad()
def test_alpha_belongs_to_the_branch(graph_of) -> None:
    model = chain(lambda x, feed: torch.add(x, feed(x), alpha=0.5))
    (stream,) = find_streams(graph_of(model)).streams
    outputs = [output for branch in stream.branches for add in branch.adds for output in add.outputs]
    assert [output.factor for output in outputs] == [0.5] * 4
    rewritten, queries, gains = rewritten_chain(model, 2)
    layers = [(lambda h, feed=feed: 0.5 * feed(h),) for feed in model.feeds]
    reference = model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=2))
    assert relative_error(rewritten(X), reference) < TOLERANCE


@every_dialect
@torch.no_grad()
def test_alpha_on_the_stream_scales_it(graph_of) -> None:
    model = chain(lambda x, feed: torch.add(feed(x), x, alpha=0.5))
    (stream,) = find_streams(graph_of(model)).streams
    assert [step.values[0].factor for step in stream.steps] == [0.5] * 4
    rewritten, queries, gains = rewritten_chain(model)
    sources = [model.embed(X)]
    for i, feed in enumerate(model.feeds):
        h = sources[0] if i == 0 else block_attn_res(sources, queries[i - 1], gains[i - 1])
        sources = [0.5 * source for source in sources] + [feed(h)]
    assert relative_error(rewritten(X), model.norm(block_attn_res(sources, queries[-1], gains[-1]))) < TOLERANCE


PARALLEL: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "left": lambda x, feed: (x + feed(x)) + feed(2 * x),
    "right": lambda x, feed: x + (feed(x) + feed(2 * x)),
    "turned": lambda x, feed: feed(2 * x) + (feed(x) + x),
}


@every_dialect
@pytest.mark.parametrize("association", PARALLEL)
@torch.no_grad()
def test_a_parallel_residual_is_one_branch(association, graph_of) -> None:
    model = chain(PARALLEL[association])
    (stream,) = find_streams(graph_of(model)).streams
    assert len(stream.branches) == 4
    rewritten, queries, gains = rewritten_chain(model, 3)
    layers = [(lambda h, feed=feed: feed(h) + feed(2 * h),) for feed in model.feeds]
    reference = model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=3))
    assert relative_error(rewritten(X), reference) < TOLERANCE


class Positions(nn.Module):
    """Embeddings that are added to the stream's root, and one to every layer's input; none is a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.position, self.kind = nn.Embedding(16, WIDTH), nn.Embedding(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], x.shape[1])
        x = self.embed(x)
        x = x + self.position(positions)
        x = x + self.kind(torch.zeros_like(x[..., 0], dtype=torch.long))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("graph_of", [by_dynamo, by_export])
def test_position_embeddings_are_no_branches(graph_of) -> None:
    found = find_streams(graph_of(prepared(Positions())))
    (stream,) = found.streams
    assert len(stream.branches) == 4
    # The root is what the last of them gives.
    assert op_name(stream.root) == "add"
    assert len(found.rejected) == 2
    assert {rejected.reason for rejected in found.rejected} == {"neither operand computes from the other"}


class Scaled(nn.Module):
    """A stream that is scaled before every add: by a number, a parameter, or a vector over the channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.feeds = nn.ModuleList(Feed() for _ in range(4))
        shape = {"number": (), "parameter": (1,), "vector": (WIDTH,), "division": ()}[kind]
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(shape) + 0.5) for _ in range(4))
        self.kind = kind

    def scale(self, x: Tensor, i: int) -> Tensor:
        if self.kind == "number":
            return 0.5 * x
        return x / 0.75 if self.kind == "division" else x * self.scales[i]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, feed in enumerate(self.feeds):
            x = self.scale(x, i) + feed(x)
        return self.norm(x)


def full_attnres_of_a_scaled_stream(model: Scaled, x: Tensor, queries: list[Tensor], gains: list[Tensor]) -> Tensor:
    """The scale of the stream is linear, so it scales every source."""
    sources = [model.embed(x)]
    for i, feed in enumerate(model.feeds):
        h = sources[0] if i == 0 else block_attn_res(sources, queries[i - 1], gains[i - 1])
        sources = [model.scale(source, i) for source in sources] + [feed(h)]
    return model.norm(block_attn_res(sources, queries[-1], gains[-1]))


@every_dialect
@pytest.mark.parametrize("kind", ["number", "parameter", "vector", "division"])
@torch.no_grad()
def test_a_scaled_stream_stays_one_stream(kind, graph_of) -> None:
    model = Scaled(kind).eval()
    (stream,) = find_streams(graph_of(model)).streams
    # What is scaled before the first add is the root alone, and belongs to no branch output.
    assert [step.kind for step in stream.steps] == ["scale", "add"] * 4
    assert [[step.kind for step in branch.steps] for branch in stream.branches] == [["add"]] + [["scale", "add"]] * 3
    rewritten, queries, gains = rewritten_chain(model)
    reference = full_attnres_of_a_scaled_stream(model, X, queries, gains)
    assert relative_error(rewritten(X), reference) < TOLERANCE


@every_dialect
@torch.no_grad()
def test_zero_queries_on_a_scaled_stream(graph_of) -> None:
    model = Scaled("vector").double().eval()
    program = torch.export.export(model, (X.double(),))
    config = ar.AttnResConfig(blocks="full", aggregation="sum")
    assert relative_error(ar.rewrite(program, config=config).module()(X.double()), model(X.double())) < 1e-9


@every_dialect
def test_a_gated_stream_is_refused(graph_of) -> None:
    module = graph_of(chain(lambda x, feed: x * torch.sigmoid(feed(x)) + feed(x)))
    found = find_streams(module)
    assert found.streams == ()
    refusal, *_ = RefuseNonSums()(module, found)
    assert isinstance(refusal.error, ar.UnsupportedResidualError)
    assert "gated stream: " in str(refusal.error)
    if graph_of is by_dynamo:
        assert "x * torch.sigmoid(feed(x))" in str(refusal.error)


def post_norm(x: Tensor, feed: nn.Module) -> Tensor:
    return feed.norm(x + feed(x))


@every_dialect
def test_a_norm_on_the_stream_is_refused(graph_of) -> None:
    module = graph_of(chain(post_norm))
    found = find_streams(module)
    assert found.streams == ()
    refusal, *_ = RefuseNonSums()(module, found)
    assert isinstance(refusal.error, ar.UnsupportedResidualError)
    assert "post-norm" in str(refusal.error)


class Nested(nn.Module):
    """A sublayer that has residual connections of its own, three deep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.ModuleList(Feed() for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for feed in self.inner:
            y = y + feed(y)
        return self.out(y)


@every_dialect
@torch.no_grad()
def test_residuals_inside_a_branch_are_not_a_stream(graph_of) -> None:
    model = prepared(Chain(lambda x, feed: x + feed(x)))
    model.feeds = nn.ModuleList(prepared(Nested()) for _ in range(4))
    (stream,) = find_streams(graph_of(model)).streams
    assert len(stream.branches) == 4
    rewritten, queries, gains = rewritten_chain(model, 2)
    layers = [(feed,) for feed in model.feeds]
    reference = model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=2))
    assert relative_error(rewritten(X), reference) < TOLERANCE


class TwoStreams(nn.Module):
    """One stack after the other, with a projection in between, as a vision tower before a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(2), Tower(3)
        self.between = nn.Linear(VOCAB, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@every_dialect
def test_two_streams(graph_of) -> None:
    first, second = find_streams(graph_of(prepared(TwoStreams()))).streams
    assert (len(first.branches), len(second.branches)) == (4, 6)
    assert (first.owner, second.owner) == ("first", "second")


def test_two_streams_are_rewritten_each_with_its_own_blocks() -> None:
    model = prepared(TwoStreams())
    plain = model(X)
    ar.rewrite(model, {"first": 1, "second": 3}, example_inputs=X, backend="eager")
    randomise_sites(model)
    names = [name for name, _ in ar.attnres_parameters(model) if name.endswith("query")]
    assert names == [f"{owner}.attn_res.{i}.query" for owner, n in (("first", 4), ("second", 6)) for i in range(n)]

    def tower(module: Tower, x: Tensor, blocks: int) -> Tensor:
        layers = [(block.first, block.second) for block in module.layers]
        stream = run_stream(module.embed(x), layers, *site_parameters(module), blocks=blocks)
        return module.head(module.norm(stream))

    reference = tower(model.second, model.between(tower(model.first, X, 1)), 3)
    assert relative_error(model(X), reference) < TOLERANCE
    ar.undo(model)
    assert torch.equal(model(X), plain)


def test_one_of_two_streams() -> None:
    model = prepared(TwoStreams())
    config = ar.AttnResConfig(blocks=2, streams=("second",), aggregation="sum")
    expected = model(X)
    ar.rewrite(model, config=config, example_inputs=X, backend="eager")
    assert {name.split(".")[0] for name, _ in ar.attnres_parameters(model)} == {"second"}
    assert relative_error(model(X), expected) < TOLERANCE
    # The other one is plain on purpose, also where it is the only one in a graph.
    torch.testing.assert_close(torch.compile(model.first, backend="eager")(X), model.first(X))


class BranchingOff(nn.Module):
    """From the middle of one stack another one branches off, which no later layer of the first one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Block() for _ in range(4))
        self.down = nn.Linear(WIDTH, WIDTH)
        self.side = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.trunk):
            x = block(x)
            if i == 1:
                y = self.down(x)
                for other in self.side:
                    y = other(y)
        return x, y


@every_dialect
def test_a_stack_that_branches_off_is_a_stream_of_its_own(graph_of) -> None:
    streams = find_streams(graph_of(prepared(BranchingOff()))).streams
    assert sorted(len(stream.branches) for stream in streams) == [4, 8]


def test_a_stream_value_that_nobody_reads_makes_no_site() -> None:
    def unread(x: Tensor, feed: nn.Module) -> Tensor:
        once = x + feed(x)
        return once + feed(x)

    (stream,) = find_streams(by_fx(chain(unread))).streams
    assert [len(branch.adds) for branch in stream.branches] == [2] * 4


def test_find_streams_changes_nothing() -> None:
    module = by_fx(prepared(Tower(2)))
    before = list(module.graph.nodes), str(module.graph)
    FindStreams()(module)
    assert (list(module.graph.nodes), str(module.graph)) == before


# Pass 4


def plan_of(module: GraphModule, blocks: int | str = 2, **options: object) -> StreamPlan:
    (stream,) = find_streams(module).streams
    return GroupLayers()(module, stream, ar.AttnResConfig(blocks=blocks, **options))


@every_dialect
def test_group_layers_by_the_module_tree(graph_of) -> None:
    plan = plan_of(graph_of(Tower(5)), 3)
    assert plan.layers == tuple(f"layers.{i}" for i in range(5))
    assert plan.layer_of == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert plan.block_of == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)
    assert plan.sources == (2, 2, 2, 2, 3, 3, 3, 3, 4, 4)


def without_module_metadata(module: GraphModule) -> GraphModule:
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return module


@every_dialect
def test_group_layers_by_the_period(graph_of) -> None:
    class Mixed(nn.Module):
        """Layers of three sublayers, of which no two are alike."""

        def __init__(self) -> None:
            super().__init__()
            self.feeds = nn.ModuleList(Feed() for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for a, b, c in zip(*[iter(self.feeds)] * 3, strict=True):
                x = x + a(x)
                x = x + b(x).relu()
                x = x + c(x).sigmoid()
            return x

    plan = plan_of(without_module_metadata(graph_of(Mixed())), 2)
    assert plan.layers == ("layer 0", "layer 1", "layer 2", "layer 3")
    assert plan.layer_of == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert plan.block_of == (0,) * 6 + (1,) * 6


def test_group_layers_where_the_adds_are_in_the_owner() -> None:
    """The layer is then the child that computes the branch, here one of a list."""
    plan = plan_of(by_dynamo(chain(lambda x, feed: x + feed(x))), 2)
    assert plan.layers == tuple(f"feeds.{i}" for i in range(4))
    assert plan.block_of == (0, 0, 1, 1)


def test_group_layers_without_repetition_takes_each_branch_for_a_layer() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feed = Feed()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.feed(x)
            x = x + self.feed(x).relu()
            return x + self.feed(x).sigmoid()

    plan = plan_of(without_module_metadata(by_fx(Uneven())), 3)
    assert plan.layer_of == (0, 1, 2)


def test_group_layers_full_and_by_size() -> None:
    module = by_fx(Tower(3))
    assert plan_of(module, "full").block_of == (0, 1, 2, 3, 4, 5)
    assert plan_of(module, 8, layers_per_block=2).block_of == (0, 0, 0, 0, 1, 1)


# Passes 5 and 6


def attach_parameters(module: GraphModule, stream: ResidualStream) -> list[SiteParameters]:
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    build, made = GraphBuilder(module), []
    with module.graph.inserting_before(first):
        for i in range(len(stream.branches)):
            values = {f"query_{i}": torch.randn(WIDTH), f"gain_{i}": 1 + 0.3 * torch.randn(WIDTH)}
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
            made.append(SiteParameters(*(build.attribute(n, v, fake_like=stream.root) for n, v in values.items())))
    return made


def inserted(module: GraphModule, blocks: int | str = 2) -> tuple[StreamPlan, list[Site], Expansion]:
    plan = plan_of(module, blocks)
    before = Expansion(plan)
    sites = InsertAttnRes()(module, plan, attach_parameters(module, plan.stream), ar.AttnResConfig(blocks=blocks))
    return plan, sites, before


@pytest.mark.parametrize(("blocks", "adds"), [(1, 9), (2, 8), (3, 7), (5, 5), ("full", 0)])
@every_dialect
def test_insert_attnres_counts(graph_of, blocks, adds) -> None:
    """S sites for S branches, no old add, and one add less than branch outputs in every block."""
    module = graph_of(Tower(5))
    assert len(nodes_named(module, "add")) == 10
    old = {step.node for branch in plan_of(module).stream.branches for step in branch.steps}
    plan, sites, before = inserted(module, blocks)
    assert len(sites) == len(nodes_named(module, "block_attn_res")) == 10
    assert len(nodes_named(module, "add")) == adds
    assert not old & set(module.graph.nodes)
    assert [len(site.sources) for site in sites] == list(plan.sources)
    assert CheckRewrite()(module, plan, sites, before) == 10


def test_insert_attnres_gives_new_nodes_their_provenance() -> None:
    module = by_dynamo(Tower(2))
    (stream,) = find_streams(module).streams
    origin = [(branch.value.meta["nn_module_stack"], branch.value.stack_trace) for branch in stream.branches]
    _, sites, _ = inserted(module)
    assert [(site.node.meta["nn_module_stack"], site.node.stack_trace) for site in sites] == origin
    for node in module.graph.nodes:
        if node.op == "call_function":
            assert "example_value" in node.meta, node
    assert all(site.node.meta["example_value"].shape == (2, 9, WIDTH) for site in sites)


def test_insert_attnres_leaves_the_rest_of_the_graph_alone() -> None:
    module = by_fx(Tower(2))
    others = [node for node in module.graph.nodes if op_name(node) != "add"]
    inserted(module)
    left = set(module.graph.nodes)
    assert all(node in left for node in others)
    # The first read is of the root alone, which is the identity and no site.
    embed, first_norm = (next(n for n in others if n.target == target) for target in ("embed", "layers.0.first.norm"))
    assert first_norm.args == (embed,)


@torch.no_grad()
def test_insert_attnres_numbers() -> None:
    model = prepared(Tower(3))
    module = by_fx(model)
    _, sites, _ = inserted(module)
    queries, gains = ([getattr(module, f"{part}_{i}") for i in range(len(sites))] for part in ("query", "gain"))
    layers = [(layer.first, layer.second) for layer in model.layers]
    reference = model.head(model.norm(run_stream(model.embed(X), layers, queries, gains, blocks=2)))
    assert relative_error(module(X), reference) < TOLERANCE


def test_the_rewritten_graph_as_text() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            x = x + self.b(x)
            x = x + self.c(x)
            return x.tanh()

    module = by_fx(Small())
    inserted(module, 2)
    lines = [line for line in str(module.graph).splitlines() if "get_attr" not in line]
    text = "\n".join(re.sub(r" : .*\[num_users=\d+\]|, kwargs = \{\}", "", line) for line in lines)
    expected = """\
        graph():
            %x = placeholder[target=x]
            %a = call_module[target=a](args = (%x,))
            %block_attn_res = SITE(args = ([%x, %a], %query_0, %gain_0, 1e-06, 1.0, False))
            %b = call_module[target=b](args = (%block_attn_res,))
            %add_tensor = call_function[target=torch.ops.aten.add.Tensor](args = (%a, %b))
            %block_attn_res_1 = SITE(args = ([%x, %add_tensor], %query_1, %gain_1, 1e-06, 1.0, False))
            %c = call_module[target=c](args = (%block_attn_res_1,))
            %block_attn_res_2 = SITE(args = ([%x, %add_tensor, %c], %query_2, %gain_2, 1e-06, 1.0, False))
            %tanh = call_method[target=tanh](args = (%block_attn_res_2,))
            return tanh"""
    text = text.replace("call_function[target=torch.ops.attnres.block_attn_res.default]", "SITE")
    assert text.replace("block_attn_res_default", "block_attn_res") == textwrap.dedent(expected)


def swap_two_sources(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    first, second, *rest = sites[-1].node.args[0]
    sites[-1].node.args = ([second, first, *rest], *sites[-1].node.args[1:])


def drop_a_source(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    sites[-1].node.args = (sites[-1].node.args[0][1:], *sites[-1].node.args[1:])


def count_the_embedding_twice(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    first, _, *rest = sites[-1].node.args[0]
    sites[-1].node.args = ([first, first, *rest], *sites[-1].node.args[1:])


def use_cumulative_sources(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    with module.graph.inserting_before(sites[-1].node):
        sources = sites[-1].node.args[0]
        running = module.graph.call_function(torch.ops.aten.add.Tensor, (sources[0], sources[1]))
    running.meta["val"] = sources[0].meta["val"]
    sites[-1].node.args = ([sources[0], running, *sources[2:]], *sites[-1].node.args[1:])


def leave_an_old_add(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    old = plan.stream.branches[0].value
    with module.graph.inserting_before(sites[0].node):
        new = module.graph.call_function(operator.add, tuple(sites[0].sources[:2]))
    plan.stream.branches[0].steps[0].__dict__["node"] = new
    assert old is not new


def forget_a_site(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    sites.pop()


def replace_a_site(module: GraphModule, plan: StreamPlan, sites: list[Site]) -> None:
    sites[0].node.target = torch.ops.aten.add.Tensor


@pytest.mark.parametrize(
    ("sabotage", "match"),
    [
        (swap_two_sources, r"site 9 sums \[\{1, 2.*\}, \{0\}.*instead of"),
        (drop_a_source, "site 9 has 3 sources instead of 4"),
        (count_the_embedding_twice, r"site 9 sums \[\{0\}, \{0\}"),
        (use_cumulative_sources, r"site 9 sums \[\{0\}, \{0, 1, 2.*instead of"),
        (leave_an_old_add, r"old adds are left in the graph: \['add"),
        (forget_a_site, "10 branches but 9 sites"),
        (replace_a_site, r"block_attn_res\S* is not a block_attn_res node but aten\.add\.Tensor"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_check_rewrite_catches_sabotage(sabotage, match) -> None:
    module = by_fx(Tower(5))
    plan, sites, before = inserted(module, 3)
    assert CheckRewrite()(module, plan, sites, before) == 10
    sabotage(module, plan, sites)
    with pytest.raises(PostconditionError, match=match):
        CheckRewrite()(module, plan, sites, before)
