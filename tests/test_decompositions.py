"""Rewritten programs for those who do not know the operators of this package."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tower, embeddings
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import attnres_rewrite as ar

B, T, D = 2, 3, 8
OPERATORS = ("block_attn_res", "attend_blocks", "merge_partial")


def own_operators(graph: torch.fx.Graph) -> set[str]:
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return {name for name in names if name.startswith("attnres")}


def program(schedule: str = "per_read", dynamic: bool = False) -> torch.export.ExportedProgram:
    """A rewritten tower with random queries."""
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) if dynamic else None
    plain = torch.export.export(Tower(4).eval(), (embeddings(),), dynamic_shapes=sizes)
    rewritten = ar.rewrite(plain, config=ar.AttnResConfig(blocks=2, schedule=schedule))  # type: ignore[arg-type]
    for name, value in rewritten.state_dict.items():
        if name.endswith(".query"):
            torch.nn.init.normal_(value)
    return rewritten


def test_the_table_has_every_operator_and_is_the_callers_own() -> None:
    table = ar.decompositions()
    ops = torch.ops.attnres
    assert set(table) == {getattr(ops, name + suffix).default for name in OPERATORS for suffix in ("", "_backward")}
    table.clear()
    assert len(ar.decompositions()) == 6


@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_a_program_is_expanded(schedule: str) -> None:
    rewritten = program(schedule)
    assert own_operators(rewritten.graph) == {
        f"attnres.{name}.default" for name in (OPERATORS if schedule == "two_phase" else OPERATORS[:1])
    }
    expanded = rewritten.run_decompositions(ar.decompositions())
    assert own_operators(expanded.graph) == set()
    x = embeddings(seed=1)
    expected = rewritten.module()(x)
    torch.testing.assert_close(expanded.module()(x), expected, rtol=1e-5, atol=1e-5)
    # Another query would be seen.
    next(v for n, v in expanded.state_dict.items() if n.endswith("3.query")).data.normal_()
    assert not torch.allclose(expanded.module()(x), expected, rtol=1e-3)


def _block_attn_res(tensors: Sequence[Tensor]) -> Any:
    *sources, query, gain = tensors
    return torch.ops.attnres.block_attn_res(sources, query, gain, 1e-6, 0.7, True)


def _attend_blocks(tensors: Sequence[Tensor]) -> Any:
    *blocks, query, other, gain, another = tensors
    return torch.ops.attnres.attend_blocks(blocks, [query, other], [gain, another], 1e-6, 0.7)


def _merge_partial(tensors: Sequence[Tensor]) -> Any:
    mixed, partial, query, gain = tensors
    return torch.ops.attnres.merge_partial(mixed, mixed[..., :1] * 2, partial, query, gain, 1e-6, 0.7, 2.0)


@pytest.mark.parametrize(
    ("call", "rows", "vectors"), [(_block_attn_res, 3, 2), (_attend_blocks, 3, 4), (_merge_partial, 2, 2)]
)
def test_forward_and_backward_of_every_operator(call: Callable[..., Any], rows: int, vectors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, D)] * rows + [(D,)] * vectors
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def gradients(*given: Tensor) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in given]
        outputs = call(inputs)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [*outputs, *torch.autograd.grad(sum(out.sin().sum() for out in outputs), inputs)]

    kept = make_fx(gradients, tracing_mode="fake")(*tensors)
    expanded = make_fx(gradients, decomposition_table=ar.decompositions(), tracing_mode="fake")(*tensors)
    assert len(own_operators(kept.graph)) == 2
    assert own_operators(expanded.graph) == set()
    for actual, expected in zip(expanded(*tensors), kept(*tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


LOAD = """
import sys
sys.modules["attnres_rewrite"] = None
import torch
inputs, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(inputs), expected, rtol=1e-5, atol=1e-5)
print("loaded without", hasattr(torch.ops.attnres, "block_attn_res"))
"""


@pytest.mark.slow
def test_a_saved_program_loads_without_the_package(tmp_path: Path) -> None:
    rewritten, x = program(), embeddings(seed=1)
    torch.export.save(rewritten.run_decompositions(ar.decompositions()), tmp_path / "model.pt2")
    torch.save((x, rewritten.module()(x).detach()), tmp_path / "numbers.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, "model.pt2", "numbers.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("loaded without False", 0), done.stderr


def test_sizes_that_are_not_known_cost_no_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would run the decomposition to learn a shape; what says it at once is asked first."""
    calls = []
    table = torch._decomp.decomposition_table
    op = torch.ops.attnres.block_attn_res.default
    original = table[op]
    monkeypatch.setitem(table, op, lambda *args: calls.append(args) or original(*args))
    dynamic = program(dynamic=True)
    assert own_operators(dynamic.graph)
    assert calls == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", ["per_read", "two_phase"])
def test_pytorchs_own_exporter_takes_a_rewritten_program(tmp_path: Path, schedule: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rewritten = program(schedule, dynamic=True)
    torch.onnx.export(rewritten, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = embeddings(3, 9, seed=1)
    actual = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(actual, rewritten.module()(x).detach(), rtol=1e-5, atol=1e-5)
