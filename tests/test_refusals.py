"""Models of which only a part could be rewritten, or rewritten wrongly: refused as a whole, or done right."""

import pytest
import torch
from models import WIDTH, Block, Feed, embeddings, llama, randomise_sites, relative_error, site_parameters, token_ids
from models import Encoder as TorchEncoder
from torch import Tensor, nn

import attnres_rewrite as ar

SUM = ar.AttnResConfig(blocks=2, aggregation="sum")


@pytest.mark.slow
def test_a_tower_that_the_example_left_out_is_an_error_when_it_runs() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = Encoder(3)
            self.vision = Encoder(3)

        def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
            return self.text(x if image is None else torch.cat([self.vision(image), x], 1))

    model = ar.rewrite(Towers(), config=SUM, example_inputs=embeddings(), backend="eager")
    assert next(name for name, _ in ar.attnres_parameters(model)) == "text.attn_res.0.query"
    model(embeddings())
    with pytest.raises(ar.NotRewrittenError, match=r"'vision' has a residual stream.* was not seen"):
        model(embeddings(), embeddings())
    # With an example that runs both towers, both are rewritten; a name leaves one plain on purpose.
    both = ar.rewrite(Towers(), config=SUM, example_inputs=(embeddings(), embeddings()), backend="eager")
    assert len(site_parameters(both)[0]) == 12
    one = ar.AttnResConfig(blocks=2, streams=("text",))
    only_text = ar.rewrite(Towers(), config=one, example_inputs=(embeddings(), embeddings()), backend="eager")
    assert len(site_parameters(only_text)[0]) == 6
    only_text(embeddings(), embeddings())
    torch.compile(lambda x: only_text(x, x), backend=ar.AttnResBackend("eager"))(embeddings())


class Encoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_a_plain_stream_inside_a_rewritten_owner() -> None:
    class Outer(Encoder):
        def __init__(self) -> None:
            super().__init__(2)
            self.inner = Encoder(2)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.inner(x)

    config = ar.AttnResConfig(blocks=2, streams=("",))
    model = ar.rewrite(Outer(), config=config, example_inputs=embeddings(), backend="eager")
    assert len(site_parameters(model)[0]) == 4
    model(embeddings())


class Checked(nn.Module):
    """Two towers, and between them a value that is computed from the first one's output and taken out of its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Encoder(2), Encoder(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scale = x.abs().amax().item()
        return self.second(x / scale)


@pytest.mark.slow
def test_towers_with_a_scalar_between_them_are_one_graph() -> None:
    model = Checked()
    before = model(embeddings())
    ar.rewrite(model, config=SUM, example_inputs=embeddings(), backend="eager")
    assert len(site_parameters(model)[0]) == 8
    assert relative_error(model(embeddings()), before) < 1e-6
    assert ar.verify(model, example_inputs=embeddings()).sites == 8
    randomise_sites(model)
    changed = model(embeddings())
    assert relative_error(changed, before) > 1e-3
    assert len(ar.depth_attention(model, example_inputs=embeddings()).weights) == 8
    # For a compiler that leaves scalars out each tower is a graph of its own, and whole.
    compiled = torch.compile(model, backend=ar.AttnResBackend("eager"))
    assert relative_error(compiled(embeddings()), changed) < 1e-6


class Broken(nn.Module):
    """Towers of one class, between which the graph breaks; the second one's graph breaks in every layer as well."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.first, self.second = Encoder(2), (BrokenEncoder if inside else Encoder)(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class BrokenEncoder(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return self.norm(x)


@pytest.mark.slow
def test_towers_in_graphs_of_their_own_are_both_rewritten() -> None:
    model = Broken(inside=False)
    before = model(embeddings())
    ar.rewrite(model, config=SUM, example_inputs=embeddings(), backend="eager")
    assert [name for name, _ in ar.attnres_parameters(model)][::8] == [
        "first.attn_res.0.query",
        "second.attn_res.0.query",
    ]
    assert relative_error(model(embeddings()), before) < 1e-6
    assert ar.verify(model, example_inputs=embeddings()).sites == 8
    for tower in (model.first, model.second):
        with torch.no_grad():
            tower.attn_res[-1].query.normal_()
        changed = model(embeddings())
        assert relative_error(changed, before) > 1e-3
        before = changed
    assert len(ar.depth_attention(model, example_inputs=embeddings()).weights) == 8
    ar.undo(model)
    assert relative_error(model(embeddings()), Broken.forward(model, embeddings())) == 0


def test_a_tower_that_breaks_inside_can_be_left_plain_by_name() -> None:
    model = Broken(inside=True)
    before = model(embeddings())
    with pytest.raises(ar.GraphBreakError, match=r"AttnResConfig\(streams=\('first',\)\)"):
        ar.rewrite(model, config=SUM, example_inputs=embeddings(), backend="eager")
    config = ar.AttnResConfig(blocks=2, aggregation="sum", streams=("first",))
    ar.rewrite(model, config=config, example_inputs=embeddings(), backend="eager")
    assert {name.split(".")[0] for name, _ in ar.attnres_parameters(model)} == {"first"}
    assert relative_error(model(embeddings()), before) < 1e-6
    randomise_sites(model)
    assert relative_error(model(embeddings()), before) > 1e-3


def test_a_stream_that_goes_on_in_the_next_graph_is_refused() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.first:
                x = block(x)
            torch._dynamo.graph_break()
            for block in self.second:
                x = block(x)
            return x

    with pytest.raises(ar.GraphBreakError, match="not one of them holds a whole residual stream"):
        ar.rewrite(Stages(), config=SUM, example_inputs=embeddings(), backend="eager")


def test_reversible_layers_are_refused() -> None:
    class Reversible(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            left, right = self.embed(x).repeat(1, 1, 2).chunk(2, dim=-1)
            for layer in self.layers:
                left = left + layer.first(right)
                right = right + layer.second(left)
            return left + right

    model = Reversible(3)
    with pytest.raises(ar.UnsupportedResidualError, match=r"coupled streams.*left = left"):
        ar.rewrite(model, blocks=2, example_inputs=embeddings())


class InPlace(Encoder):
    """Layers as ``x += f(x)``; ``keep`` holds on to something of the stream before they begin."""

    def __init__(self, keep: str) -> None:
        super().__init__(0)
        self.feeds = nn.ModuleList(Feed() for _ in range(4))
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if self.keep != "input":
            x = self.embed(x)
        first = x[:, 0] if self.keep == "view" else 0
        if self.keep == "reshaped":
            x = x.reshape(-1, WIDTH)
        for feed in self.feeds:
            x += feed(x)
        return self.norm(x) + (first[:, None] if self.keep == "view" else 0)


@pytest.mark.parametrize("keep", ["nothing", "reshaped"])
def test_in_place_adds_on_a_tensor_of_their_own(keep: str) -> None:
    model = InPlace(keep).double()
    x = embeddings().double()
    expected = model(x)
    ar.rewrite(model, config=SUM, example_inputs=x, backend="eager")
    assert len(site_parameters(model)[0]) == 4
    assert relative_error(model(x), expected) < 1e-12


@pytest.mark.parametrize("keep", ["view", "input"])
def test_in_place_adds_on_a_shared_tensor_are_refused(keep: str) -> None:
    with pytest.raises(ar.UnsupportedResidualError, match=r"overwrites in place .*write x = x \+ f\(x\)"):
        ar.rewrite(InPlace(keep), config=SUM, example_inputs=embeddings(), backend="eager")


class Interrupted(Encoder):
    """Something happens to the stream after its second layer."""

    def __init__(self, kind: str) -> None:
        super().__init__(4)
        self.kind = kind
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = start = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                if self.kind == "gate":
                    x = x * torch.sigmoid(self.gate(x))
                elif self.kind == "norm":
                    x = nn.functional.layer_norm(x, (WIDTH,))
                elif self.kind == "maximum":
                    x = torch.maximum(x, start)
                elif self.kind == "gated link":
                    x = torch.sigmoid(self.gate(x)) * x + start
                elif self.kind == "gated lerp":
                    x = torch.lerp(x, start, torch.sigmoid(self.gate(x)))
        return self.norm(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gate", "changed between its adds"),
        ("norm", "post-norm"),
        ("maximum", r"changed between its adds.*torch.maximum\(x, start\)"),
        ("gated link", r"attention over depth.*torch.sigmoid\(self.gate\(x\)\) \* x \+ start"),
        ("gated lerp", r"attention over depth.*torch.lerp\(x, start"),
    ],
)
def test_a_stream_that_is_interrupted_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(ar.UnsupportedResidualError, match=reason):
        ar.rewrite(Interrupted(kind), config=SUM, example_inputs=embeddings(), backend="eager")


@pytest.mark.parametrize("kind", ["highway", "narrow"])
def test_a_gated_stream_is_refused(kind: str) -> None:
    class Gated(Encoder):
        def __init__(self) -> None:
            super().__init__(0)
            self.feeds = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for feed in self.feeds:
                gate = torch.sigmoid(feed(x))
                x = gate * x + (1 - gate) * feed(x) if kind == "highway" else x * gate[..., :1] + feed(x)
            return x

    with pytest.raises(ar.UnsupportedResidualError, match=r"gated stream.*test_refusals\.py"):
        ar.rewrite(Gated(), config=SUM, example_inputs=embeddings(), backend="eager")


def test_a_chain_inside_the_last_branch_is_not_taken_for_the_stream() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Feed(), Feed(), Feed()

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.a(x)
            h = h + self.b(h)
            return x + self.c(h)

    model = Encoder(0).double()
    model.layers = nn.ModuleList(Nested() for _ in range(3)).double()
    x = embeddings().double()
    expected = model(x)
    ar.rewrite(model, config=SUM, example_inputs=x, backend="eager")
    assert len(site_parameters(model)[0]) == 3
    assert relative_error(model(x), expected) < 1e-12


def test_a_skip_around_the_whole_stream_leaves_it_one() -> None:
    class Around(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            y = x
            for layer in self.layers:
                y = layer(y)
            return x + self.norm(y)

    model = ar.rewrite(Around(3), config=SUM, example_inputs=embeddings(), backend="eager")
    assert len(site_parameters(model)[0]) == 6


@pytest.mark.parametrize("kind", ["siamese", "shared layer"])
def test_an_owner_that_runs_twice_is_refused_and_left_alone(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder(2) if kind == "siamese" else Block()

        def forward(self, x: Tensor) -> Tensor:
            if kind == "siamese":
                return self.encoder(x) * self.encoder(x.flip(1))
            return self.encoder(self.encoder(self.encoder(x * 2)))

    model = Twice()
    names = list(model.state_dict())
    expected = model(embeddings())
    with pytest.raises(ar.UnsupportedResidualError, match=r"'encoder', which holds .* runs more than once"):
        ar.rewrite(model, config=SUM, example_inputs=embeddings(), backend="eager")
    assert list(model.state_dict()) == names
    assert "forward" not in model.encoder.__dict__
    assert model._compiled_call_impl is None
    assert torch.equal(model(embeddings()), expected)


def test_layers_in_a_subclass_of_sequential() -> None:
    class Blocks(nn.Sequential):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(WIDTH, WIDTH)
            self.blocks = Blocks(*(Block() for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.embed(x))

    model = ar.rewrite(Model(), config=SUM, example_inputs=embeddings(), backend="eager")
    assert next(name for name, _ in ar.attnres_parameters(model)) == "attn_res.0.query"
    assert [block.layers for block in ar.explain(Model(), 3, example_inputs=embeddings()).streams] == [
        ("blocks.0", "blocks.1", "blocks.2")
    ]


def test_a_refusal_tells_what_was_seen() -> None:
    """Chains, and adds that are on none with reason and source line; what every layer does alike in one line."""
    with pytest.raises(ar.UnsupportedResidualError) as raised:
        ar.explain(TorchEncoder(3, norm_first=False), example_inputs=token_ids())
    reason, heading, *seen = str(raised.value).splitlines()
    assert reason.startswith("post-norm: ")
    assert heading == "What was seen (chains, and adds that are on none):"
    # Six norms and as many chains of one add, of which torch's own lines are not in the trace.
    assert [line.rpartition(": ")[2] for line in seen] == ["a chain of one add"]
    assert seen[0].startswith("     6x module 'encoder.layers.0'")


def test_an_explanation_lists_the_adds_that_are_on_no_stream() -> None:
    report = ar.explain(llama(3), 2)
    (rotary,) = {reason for _, reason in report.rejected}
    assert rotary == "within a branch of a stream"
    text = str(report)
    assert f"{len(report.rejected)} other adds, by source line:" in text
    assert len([line for line in text.splitlines() if rotary in line]) < len(report.rejected)


class Dropped(Encoder):
    """A graph that calls modules has dropout in it that is off, and may be on later."""

    def __init__(self, where: str) -> None:
        super().__init__(0)
        self.feeds = nn.ModuleList(Feed() for _ in range(4))
        self.drops = nn.ModuleList(nn.Dropout(0.5) for _ in range(4))
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.drops[0](x) if self.where == "root" else x
        for i, feed in enumerate(self.feeds):
            x = x + (self.drops[i](feed(x)) if self.where == "branch" else feed(x))
            x = self.drops[i](x) if self.where == "stream" or (self.where == "end" and i == 3) else x
        return self.norm(x)


@pytest.mark.parametrize("where", ["root", "branch", "end"])
def test_a_graph_module_rewritten_in_eval_keeps_its_dropout(where: str) -> None:
    model = Dropped(where).double().eval()
    x = embeddings().double()
    rewritten = ar.rewrite(torch.fx.symbolic_trace(model), config=SUM, example_inputs=x)
    assert len(site_parameters(rewritten)[0]) == 4
    assert relative_error(rewritten(x), model(x)) < 1e-12
    rewritten.train(), model.train()
    outputs = []
    for one in (rewritten, model):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert relative_error(*outputs) < 1e-12
    assert relative_error(model.eval()(x), outputs[1]) > 0.1


def test_dropout_on_the_stream_of_a_graph_module_is_refused() -> None:
    graph = torch.fx.symbolic_trace(Dropped("stream").eval())
    with pytest.raises(ar.UnsupportedResidualError, match=r"dropout on the residual stream itself.*drops_0"):
        ar.rewrite(graph, config=SUM, example_inputs=embeddings())
    model = Dropped("stream").eval()
    for drop in model.drops:
        drop.p = 0.0
    rewritten = ar.rewrite(torch.fx.symbolic_trace(model), config=SUM, example_inputs=embeddings())
    assert len(site_parameters(rewritten)[0]) == 4
