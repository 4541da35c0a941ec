"""Whoever runs the layers of a rewritten model runs AttnRes, or gets `NotRewrittenError`; plain residuals never.

Every test here has random queries, so that AttnRes and plain residuals give different logits, and says which of
the two outcomes it expects.
"""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import (
    WIDTH,
    Tower,
    chain_of,
    embeddings,
    export,
    llama,
    logits,
    mostly_slow,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar

LAYERS, BLOCKS = 2, 2
IDS = token_ids()
ROOT = Path(__file__).parent.parent


def plain_llama() -> nn.Module:
    # Without a cache in its output, so that tracers other than Dynamo can follow it.
    model = prepared(llama(LAYERS))
    model.config.use_cache = False
    return model


def rewritten_llama(**options: object) -> nn.Module:
    return randomise_sites(ar.rewrite(plain_llama(), BLOCKS, **{"backend": "eager", **options}))


@pytest.fixture(name="model")
def _model() -> nn.Module:
    return rewritten_llama()


def outcome(model: nn.Module, run: Callable[[], object], ids: Tensor = IDS) -> str:
    """``"attnres"``, ``"plain"`` or the name of the error of this package that stopped the run."""
    queries, gains = site_parameters(model)
    reference = reference_llama(model, ids, queries, gains, blocks=BLOCKS)
    plain = reference_llama(model, ids)
    assert relative_error(reference, plain) > 1e-2
    try:
        result = logits(run())
    except Exception as error:
        names = [type(e).__name__ for e in chain_of(error) if isinstance(e, ar.AttnResError)]
        if not names:
            raise
        return names[0]
    if relative_error(result, reference) < 1e-5:
        return "attnres"
    assert relative_error(result, plain) < 1e-5, "neither AttnRes nor plain residuals"
    return "plain"


def test_the_outcomes_can_be_told_apart(model) -> None:
    assert outcome(model, lambda: model(IDS)) == "attnres"
    assert outcome(model, lambda: reference_llama(model, IDS)) == "plain"
    with pytest.raises(AssertionError, match="neither"):
        outcome(model, lambda: 2 * reference_llama(model, IDS))


# torch.compile switched off


def run_python(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_environment_variable_disables_compilation(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(rewritten_llama(), path)
    printed = run_python(
        f"""
        import torch, attnres_rewrite as ar
        from test_never_silent import IDS, BLOCKS, plain_llama, outcome
        model = torch.load({str(path)!r}, weights_only=False)
        print(outcome(model, lambda: model(IDS)))
        print(outcome(model, lambda: ar.rewrite(plain_llama(), BLOCKS)(IDS)))
        """,
        TORCH_COMPILE_DISABLE="1",
    )
    assert printed.split() == ["NotRewrittenError", "NotRewrittenError"]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_dynamo_disabled_by_its_configuration(model, warm) -> None:
    if warm:
        model(IDS)
    with torch._dynamo.config.patch(disable=True):
        # What is compiled already goes on running.
        assert outcome(model, lambda: model(IDS)) == ("attnres" if warm else "NotRewrittenError")
    assert outcome(model, lambda: model(IDS)) == "attnres"


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_stance_force_eager(model, warm) -> None:
    if warm:
        model(IDS)
    with torch.compiler.set_stance("force_eager"):
        assert outcome(model, lambda: model(IDS)) == "NotRewrittenError"
        with pytest.raises(ar.NotRewrittenError, match="switched off"):
            ar.rewrite(plain_llama(), BLOCKS)
    assert outcome(model, lambda: model(IDS)) == "attnres"


def test_stance_eager_on_recompile(model) -> None:
    model(token_ids(3, 5))
    with torch.compiler.set_stance("eager_on_recompile"):
        assert outcome(model, lambda: model(IDS)) == "NotRewrittenError"


@pytest.mark.slow
def test_recompile_limit_with_fixed_shapes() -> None:
    model = rewritten_llama(dynamic=False)
    seen = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (3, 4, 5, 6, 7):
            ids = token_ids(2, length)
            seen.append(outcome(model, lambda ids=ids: model(ids), ids))
    assert set(seen) == {"attnres", "NotRewrittenError"}
    assert seen.index("NotRewrittenError") >= 2
    assert "attnres" not in seen[seen.index("NotRewrittenError") :]


def test_suppressed_errors(model) -> None:
    with torch._dynamo.config.patch(suppress_errors=True):
        assert outcome(model, lambda: model(IDS)) == "attnres"


@pytest.mark.slow
def test_suppressed_errors_of_a_backend_that_fails() -> None:
    def fails(*_: object) -> None:
        raise ValueError("this backend always fails")

    model = rewritten_llama(backend=fails)
    with pytest.raises(Exception, match="this backend always fails"):
        model(IDS)
    with torch._dynamo.config.patch(suppress_errors=True):
        assert outcome(model, lambda: model(IDS)) == "NotRewrittenError"


def test_called_from_a_function_with_compilation_disabled(model) -> None:
    """That keeps other compilers away; the model brings its own."""
    function = torch.compiler.disable(lambda ids: model(ids))
    assert outcome(model, lambda: function(IDS)) == "attnres"
    assert outcome(model, lambda: torch.compile(lambda ids: function(ids), backend="eager")(IDS)) == "attnres"


# Another compiler


@pytest.mark.parametrize("backend", mostly_slow(["eager", "aot_eager", "inductor"], "aot_eager"))
def test_compiled_once_more_by_another_backend(model, backend) -> None:
    """That backend gets the whole graph, and does not know what to do with it."""
    assert outcome(model, lambda: torch.compile(model, backend=backend)(IDS)) == "NotRewrittenError"


def test_compiled_once_more_by_the_backend_with_another_inner_one(model) -> None:
    """It is not the backend from the rewrite that runs then, but the one that was asked for."""
    sites = []

    def inner(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        sites.append(sum(n.target is torch.ops.attnres.block_attn_res.default for n in module.graph.nodes))
        return module.forward

    assert outcome(model, lambda: torch.compile(model, backend=ar.AttnResBackend(inner))(IDS)) == "attnres"
    assert sites == [2 * LAYERS]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("eager", "NotRewrittenError"), ("aot_eager", "NotRewrittenError"), ("attnres", "attnres")],
)
def test_a_function_around_the_model_compiled_by_a_backend(model, backend, expected) -> None:
    """Here the model is inlined into the function's graph, which that backend has to run."""
    used = ar.AttnResBackend("eager") if backend == "attnres" else backend
    assert outcome(model, lambda: torch.compile(lambda ids: model(ids), backend=used)(IDS)) == expected


@pytest.mark.slow
def test_inductor_meets_the_layers_without_the_rewrite(model) -> None:
    """Inductor may not drop the call that guards the layers as dead code."""
    compiled = torch.compile(lambda ids: model(ids), backend="inductor")
    with torch.no_grad():
        assert outcome(model, lambda: compiled(IDS)) == "NotRewrittenError"


def test_compile_method_called_by_the_user_afterwards(model) -> None:
    model.compile(backend="eager")
    assert outcome(model, lambda: model(IDS)) == "NotRewrittenError"
    model.compile(backend=ar.AttnResBackend("eager"))
    assert outcome(model, lambda: model(IDS)) == "attnres"


def test_compile_method_of_single_layers(model) -> None:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert outcome(model, lambda: model(IDS)) == "attnres"


def test_compile_method_of_the_owner(model) -> None:
    model.model.compile(backend="eager")
    assert outcome(model, lambda: model(IDS)) == "attnres"
    assert outcome(model, lambda: head(model, model.model(IDS))) == "NotRewrittenError"


@pytest.mark.parametrize("backend", ["attnres", ar.AttnResBackend("eager")], ids=["string", "object"])
def test_backend_on_a_model_that_was_never_rewritten(backend) -> None:
    model = plain_llama()
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(ar.NotRewrittenError, match=r"Call rewrite\(model, blocks=8\) before torch\.compile"):
        compiled(IDS)


# Tracers and exporters


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "function"])
def test_jit_trace(model, wrapped) -> None:
    model.config.return_dict = False
    traced = (lambda ids: model(ids)[0]) if wrapped else model
    error = outcome(model, lambda: torch.jit.trace(traced, IDS, check_trace=False, strict=False)(IDS))
    assert error == "NotRewrittenError"
    # A copy is compiled at its owner only.
    twin = copy.deepcopy(model)
    error = outcome(model, lambda: torch.jit.trace(twin, IDS, check_trace=False, strict=False)(IDS))
    assert error == "NotRewrittenError"


@pytest.mark.parametrize("strict", [False, True])
def test_plain_export(model, strict) -> None:
    def run() -> object:
        return torch.export.export(model, (IDS,), strict=strict).module()(IDS)

    assert outcome(model, run) == "NotRewrittenError"


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.filterwarnings("ignore")
def test_plain_onnx_export(model, dynamo) -> None:
    pytest.importorskip("onnxscript")
    model.config.return_dict = False
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the exporter wraps what it meets
        torch.onnx.export(model, (IDS,), io.BytesIO(), dynamo=dynamo)
    met = [error for error in chain_of(raised.value) if isinstance(error, ar.NotRewrittenError)]
    assert met or "use attnres_rewrite.export_onnx" in str(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_the_onnx_exporter_does_not_lose_the_error_in_its_second_try() -> None:
    """After an ordinary trace it tries a strict one, which once succeeded and failed later with a KeyError."""
    pytest.importorskip("onnxscript")
    tower = ar.rewrite(Tower(2).eval(), 2, example_inputs=embeddings(), backend="eager")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"use attnres_rewrite\.export_onnx") as raised:
        torch.onnx.export(tower, (embeddings(),), io.BytesIO(), dynamo=True, verbose=False)
    assert any(isinstance(error, ar.NotRewrittenError) for error in chain_of(raised.value))
    with pytest.raises(Exception, match=r"use attnres_rewrite\.export_onnx"):
        torch.export.export(tower, (embeddings(),), strict=True)


def test_make_fx(model) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    assert outcome(model, lambda: make_fx(lambda ids: model(ids).logits)(IDS)(IDS)) == "NotRewrittenError"


def test_symbolic_trace(model) -> None:
    assert outcome(model, lambda: torch.fx.symbolic_trace(model)(IDS)) == "NotRewrittenError"


def test_symbolic_trace_of_an_owner() -> None:
    """It runs the forward of the class, past that of the instance."""
    tower = randomise_sites(ar.rewrite(prepared(Tower(2)), 2, example_inputs=embeddings(), backend="eager"))
    assert next(name for name, _ in ar.attnres_parameters(tower)) == "attn_res.0.query"
    with pytest.raises(ar.NotRewrittenError):
        torch.fx.symbolic_trace(tower)
    with ar.disabled(tower):
        traced = torch.fx.symbolic_trace(tower)
        assert torch.equal(traced(embeddings()), tower(embeddings()))


def test_vmap(model) -> None:
    def run() -> object:
        return torch.func.vmap(lambda ids: model(ids[None]).logits[0])(IDS)

    assert outcome(model, run) == "NotRewrittenError"


def test_export_with_attnres_disabled_is_the_plain_model(model) -> None:
    with ar.disabled(model):
        program = export(model, IDS)
        assert outcome(model, lambda: model(IDS)) == "plain"
    assert outcome(model, lambda: program.module()(IDS)) == "plain"
    assert outcome(model, lambda: model(IDS)) == "attnres"
    # The parameters are in the program, so that rewriting it restores the model.
    assert outcome(model, lambda: ar.rewrite(program, BLOCKS).module()(IDS)) == "attnres"


def test_disabled_ends_with_an_exception(model) -> None:
    with pytest.raises(KeyError), ar.disabled(model):
        raise KeyError
    assert outcome(model, lambda: model(IDS)) == "attnres"


# Other ways to call it


def head(model: nn.Module, output: object) -> Tensor:
    return model.lm_head(output.last_hidden_state)


CALLS: dict[str, Callable[[nn.Module], Tensor]] = {
    "model.forward": lambda model: model.forward(IDS).logits,
    "owner": lambda model: head(model, model.model(IDS)),
    "owner.forward": lambda model: head(model, model.model.forward(IDS)),
    "owner in another module": lambda model: nn.Sequential(model.model, Head(model))(IDS),
    "functional_call": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (IDS,)).logits,
}


class Head(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, output: object) -> Tensor:
        return head(self, output)


@pytest.mark.parametrize("call", CALLS)
def test_called_in_another_way(model, call) -> None:
    assert outcome(model, lambda: CALLS[call](model)) == "attnres"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(model, mode) -> None:
    with mode():
        assert outcome(model, lambda: model(IDS)) == "attnres"


def test_a_single_layer_is_run_by_its_owner_alone(model) -> None:
    x = torch.randn(2, 9, WIDTH)
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    with pytest.raises(ar.NotRewrittenError, match=r"a layer \(LlamaDecoderLayer\) is run past the module"):
        model.model.layers[0](x, position_embeddings=position)
    with ar.disabled(model):
        plain = model.model.layers[0](x, position_embeddings=position)
    assert torch.equal(plain, plain_llama().model.layers[0](x, position_embeddings=position))


# Copies


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


# A shallow copy shares its parts with the original, and is compiled at its owner.
KEEPING = {
    **{name: way for name, way in COPIES.items() if name != "copy"},
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("warm", mostly_slow([False, True], False), ids=["cold", "warm"])
def test_copies(model, way, warm) -> None:
    if warm:
        model(IDS)
    twin = COPIES[way](model)
    assert outcome(model, lambda: twin(IDS)) == "attnres"


TARGETS = (torch._C._nn.linear, torch.ops.attnres.block_attn_res.default)
SEEN: list[torch.fx.GraphModule] = []


def keeps_graphs(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
    SEEN.append(module)
    return module.forward


@pytest.mark.parametrize("way", mostly_slow([*KEEPING, "nothing"], "deepcopy"))
def test_a_copy_keeps_the_head_in_the_graph(way) -> None:
    """It is outside of the owner: without the root's compilation it would run eagerly."""
    model = rewritten_llama(backend=keeps_graphs)
    twin = KEEPING.get(way, lambda same: same)(model)
    SEEN.clear()
    assert outcome(model, lambda: twin(IDS)) == "attnres"
    (graph,) = SEEN
    counts = [sum(n.target is target for n in graph.graph.nodes) for target in TARGETS]
    assert counts == [7 * LAYERS + 1, 2 * LAYERS]
    if way != "nothing":
        ar.undo(twin)
        assert relative_error(twin(IDS).logits, plain_llama()(IDS).logits) < 1e-6
        assert outcome(model, lambda: model(IDS)) == "attnres"


def test_a_deep_copy_is_independent(model) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.attn_res[0].query.zero_()
        twin.model.embed_tokens.weight.mul_(2)
    assert outcome(model, lambda: model(IDS)) == "attnres"
    assert outcome(twin, lambda: twin(IDS)) == "attnres"
    assert relative_error(twin(IDS).logits, model(IDS).logits) > 1e-2
    with ar.disabled(twin):
        assert outcome(twin, lambda: twin(IDS)) == "plain"
        assert outcome(model, lambda: model(IDS)) == "attnres"
    ar.undo(twin)
    assert outcome(model, lambda: model(IDS)) == "attnres"


def test_two_rewritten_models_of_one_class_keep_apart() -> None:
    """Dynamo keys its cache by code, which they share; their blocks differ."""
    first = rewritten_llama()
    second = randomise_sites(ar.rewrite(plain_llama(), 1, backend="eager"), seed=9)
    assert outcome(first, lambda: first(IDS)) == "attnres"
    queries, gains = site_parameters(second)
    reference = reference_llama(second, IDS, queries, gains, blocks=1)
    assert relative_error(second(IDS).logits, reference) < 1e-5
    assert outcome(first, lambda: first(IDS)) == "attnres"


def test_a_compiled_function_follows_disabled(model) -> None:
    compiled = torch.compile(lambda ids: model(ids), backend=ar.AttnResBackend("eager"))
    assert outcome(model, lambda: compiled(IDS)) == "attnres"
    with ar.disabled(model):
        assert outcome(model, lambda: compiled(IDS)) == "plain"
    assert outcome(model, lambda: compiled(IDS)) == "attnres"


def test_hidden_states_of_the_layers(model) -> None:
    """Hugging Face installs hooks at the first such call, behind a lock, which would break the graph in the owner."""

    def run() -> object:
        return model(IDS, output_hidden_states=True)

    assert outcome(model, run) == "attnres"
    assert len(run().hidden_states) == LAYERS + 1


def test_layers_taken_out_after_the_rewrite(model) -> None:
    """The stream is no longer the one that the parameters were made for."""
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ar.GraphBreakError, match="rewritten with 4 AttnRes sites, but the compiler sees 2 of them"):
        model(IDS)
