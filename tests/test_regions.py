"""Parts of a model that run without gradients or under autocast: one stream goes through them, and queries train."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from models import WIDTH, Block, embeddings, export, mostly_slow, prepared, randomise_sites, relative_error
from reference_models import block_attn_res
from torch import Tensor, nn
from torch.export import ExportedProgram

import attnres_rewrite as ar
from attnres_rewrite.forms.exported import flattened
from attnres_rewrite.graph.nodes import op_name
from attnres_rewrite.passes import InlineRegions
from attnres_rewrite.pipeline import find_streams

X = embeddings()
LAYERS = 4


class Stack(nn.Module):
    """Four blocks, of which the first two run within ``mode``."""

    def __init__(self, mode: Callable[[], object]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        with self.mode():
            for layer in self.layers[:2]:
                x = layer(x)
        for layer in self.layers[2:]:
            x = layer(x)
        return self.norm(x)


def autocast() -> object:
    return torch.autocast("cpu", dtype=torch.bfloat16)


MODES = {"no_grad": torch.no_grad, "autocast": autocast}
REGIONS = {"no_grad": "wrap_with_set_grad_enabled", "autocast": "wrap_with_autocast"}


def regions(program: ExportedProgram) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if op_name(node).startswith("wrap_with")]


def rewritten(mode: str) -> tuple[ExportedProgram, nn.Module]:
    """A program and the live model, with the same random queries."""
    model = prepared(Stack(MODES[mode]))
    program = ar.rewrite(export(model, X), 2)
    randomise_sites(program)
    live = ar.rewrite(model, 2, example_inputs=X, backend="eager")
    assert not live.load_state_dict(program.state_dict).missing_keys
    return program, live


@pytest.mark.parametrize("mode", MODES)
def test_a_program_is_rewritten_through_its_regions(mode: str) -> None:
    model = prepared(Stack(MODES[mode]))
    plain = export(model, X)
    assert regions(plain) == [REGIONS[mode]]
    before = str(plain.graph)
    (stream,) = ar.explain(plain, 2).streams
    assert stream.branches == 2 * LAYERS
    config = ar.AttnResConfig(blocks=2, aggregation="sum")
    tolerance = 1e-5 if mode == "no_grad" else 1e-2
    assert relative_error(ar.rewrite(plain, config=config).module()(X), model(X)) < tolerance
    # The program itself keeps its region, and so does the new one.
    assert str(plain.graph) == before
    assert set(regions(ar.rewrite(plain, 2))) == {REGIONS[mode]}


@pytest.mark.parametrize("mode", MODES)
def test_the_program_and_the_live_model_agree(mode: str) -> None:
    program, live = rewritten(mode)
    torch.testing.assert_close(program.module()(X), live(X))


@pytest.mark.parametrize("mode", MODES)
def test_such_a_program_can_be_saved_and_decomposed(mode: str) -> None:
    program, live = rewritten(mode)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(X), live(X))
    torch.testing.assert_close(program.run_decompositions().module()(X), live(X))


def test_regions_become_part_of_one_flat_graph() -> None:
    class Nested(Stack):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.layers[0](self.embed(x))
                with torch.enable_grad():
                    x = self.layers[1](x)
                with autocast():
                    x = self.layers[2](x)
            return self.layers[3](x)

    model = prepared(Nested(torch.no_grad))
    module = flattened(export(model, X)).graph_module
    assert torch.equal(module(*export(model, X).state_dict.values(), X)[0], model(X))
    module = export(model, X).graph_module
    assert InlineRegions()(module) == 3
    assert InlineRegions()(module) == 0
    modes = [(op_name(n), n.args[0]) for n in module.graph.nodes if op_name(n) == "_set_grad_enabled"]
    assert [enabled for _, enabled in modes] == [False, True, False, True]
    assert [op_name(n) for n in module.graph.nodes if "autocast" in op_name(n)] == ["_enter_autocast", "_exit_autocast"]
    assert len(find_streams(module).streams[0].branches) == 2 * LAYERS


def reference(model: Stack, x: Tensor, queries: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """Two blocks of two layers; what is read in the layers above is read with gradients."""
    sources, partial, k = [model.embed(x)], None, 0
    for i, layer in enumerate(model.layers):
        for j, sublayer in enumerate((layer.first, layer.second)):
            if i == 2 and j == 0:
                sources, partial = [*sources, partial], None
            with torch.set_grad_enabled(i >= 2):
                given = [*sources, *([] if partial is None else [partial])]
                h = given[0] if len(given) == 1 else block_attn_res(given, queries[k], gains[k])
                k += len(given) > 1
                f = sublayer(h)
                partial = f if partial is None else partial + f
    return model.norm(block_attn_res([*sources, partial], queries[k], gains[k]))


def gradients(output: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    (output * output.detach().cos()).sum().backward()
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
@pytest.mark.parametrize("form", ["eager", "aot_eager", "program"])
def test_a_query_above_frozen_layers_trains(form: str, schedule: str) -> None:
    """The first trainable layer reads what the last frozen one adds."""
    plain = prepared(Stack(torch.no_grad)).double()
    x = X.double()
    config = ar.AttnResConfig(blocks=2, schedule=schedule)
    if form == "program":
        program = ar.rewrite(export(plain, x), config=config)
        model = program.module()
    else:
        model = ar.rewrite(prepared(Stack(torch.no_grad)).double(), config=config, example_inputs=x, backend=form)
    randomise_sites(model)
    sites = dict(ar.attnres_parameters(model))
    queries, gains = ([p for name, p in sites.items() if name.endswith(leaf)] for leaf in ("query", "gain"))
    expected_queries, expected_gains = (
        [p.detach().clone().requires_grad_() for p in parameters] for parameters in (queries, gains)
    )
    weights = dict(model.named_parameters())
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    output = model(x)
    expected = reference(plain, x, expected_queries, expected_gains)
    assert relative_error(output, expected) < 1e-9
    actual = gradients(output, [*queries, *gains])
    wanted = gradients(expected, [*expected_queries, *expected_gains])
    # Three reads are in the frozen layers.
    assert [grad is None for grad in wanted] == [True] * 3 + [False] * 5 + [True] * 3 + [False] * 5
    for mine, theirs in zip(actual, wanted, strict=True):
        if theirs is None:
            assert mine is None or not mine.any()
        else:
            assert mine is not None
            assert relative_error(mine, theirs) < 1e-7


class Frozen(Stack):
    """The whole forward runs without gradients."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", mostly_slow([Stack, Frozen]))
@pytest.mark.parametrize("form", mostly_slow(["live", "program"], "live"))
def test_export_to_onnx(kind: type[Stack], form: str, tmp_path: Path) -> None:
    """Every site is a node of the one graph."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = prepared(kind(torch.no_grad))
    if form == "live":
        model = randomise_sites(ar.rewrite(model, 2, example_inputs=X, backend="eager"))
    else:
        model = randomise_sites(ar.rewrite(export(model, X), 2))
    assert ar.export_onnx(model, tmp_path / "model.onnx", X).max_difference < 1e-4
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "BlockAttnRes" for node in nodes) == 2 * LAYERS
