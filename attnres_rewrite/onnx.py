"""Export to ONNX, checked against ONNX Runtime before the file gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from attnres_rewrite import _compat
from attnres_rewrite.anchor import AnchorSpec
from attnres_rewrite.api import disabled, require_live
from attnres_rewrite.capture import Call, ExampleInputs, example_call
from attnres_rewrite.errors import AttnResError
from attnres_rewrite.exported import rewrite_exported
from attnres_rewrite.graph import tensor_of
from attnres_rewrite.verification import relative_difference

_TOLERANCE = 1e-4
# A protobuf message holds at most 2 GiB; what is not weights takes a part of it.
_LARGEST_FILE = 1_900_000_000


class OnnxExportError(AttnResError):
    """The model could not be exported, or ONNX Runtime computes something else than PyTorch."""


@dataclasses.dataclass(frozen=True)
class OnnxExport:
    """The result of :func:`export_onnx`.

    Attributes:
        path: The file written.
        max_difference: Largest difference between ONNX Runtime and PyTorch on fresh inputs, relative to
            the largest value of the output.
        differences: The same for every (batch, sequence) size that was tried.
        sites: Number of AttnRes sites in the model.
    """

    path: Path
    max_difference: float
    differences: dict[tuple[int, ...], float]
    sites: int


def export_onnx(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic_shapes: Any = None,
    opset_version: int = 20,
    tolerance: float = _TOLERANCE,
) -> OnnxExport:
    """Export a rewritten model to ONNX and compare it with PyTorch in ONNX Runtime.

    The model is exported in eval mode. The comparison runs on fresh random inputs of other batch and
    sequence sizes than the example's. The file appears under ``path`` only if it passes.

    Args:
        model: A rewritten ``nn.Module`` or ``ExportedProgram``.
        path: The file to write. Weights beyond ONNX's limit of 2 GB go to a file beside it.
        example_inputs: Tensors that the model runs on, as for :func:`attnres_rewrite.rewrite`.
        dynamic_shapes: As for ``torch.export.export``. By default the first two dimensions (batch and
            sequence) of every integer input, and the first of every other, are dynamic. Ignored for an
            ``ExportedProgram``, which has its own.
        opset_version: ONNX opset.
        tolerance: Largest relative difference that is accepted.

    Raises:
        OnnxExportError: The exporter failed, or the comparison exceeds ``tolerance``.
        AttnResError: ``model`` was not rewritten.
        ImportError: onnx, onnxscript or onnxruntime is missing (extra ``onnx``).
    """
    _require_packages()
    target = Path(path)
    if not target.parent.is_dir():
        raise OnnxExportError(f"cannot write {target.name}: the folder {target.parent} does not exist")
    if isinstance(model, ExportedProgram):
        program, call = model, _program_call(model, example_inputs)
    else:
        require_live(model, "export_onnx")
        call = example_call(model, example_inputs)
        program = export_rewritten(model, call, dynamic_shapes)
    sites = sum(node.target is torch.ops.attnres.block_attn_res.default for node in program.graph.nodes)
    if not sites:
        raise AttnResError("export_onnx: this ExportedProgram was not rewritten; call rewrite(program) first")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attnres-") as folder:
        temporary = Path(folder) / target.name
        _convert(program, temporary, opset_version)
        differences = _compare(program, temporary, call)
        worst = max(differences.values())
        if not worst <= tolerance:
            raise OnnxExportError(
                f"ONNX Runtime differs from PyTorch by {worst:.1e} (tolerance {tolerance:.1e}), relative to the "
                f"largest output, at sizes {differences}; no file was written"
            )
        for file in Path(folder).iterdir():
            os.replace(file, target.parent / file.name)
    return OnnxExport(target, worst, differences, sites)


def export_rewritten(model: nn.Module, call: Call, dynamic_shapes: Any = None) -> ExportedProgram:
    """The ``ExportedProgram`` of a rewritten ``nn.Module``, with its parameters as they are now.

    The plain path is exported and rewritten anew, with the parameters that the module has.
    """
    if dynamic_shapes is None:
        dynamic_shapes = _default_dynamic_shapes(call)
    specs = [AnchorSpec.from_json(forward.spec) for _, forward in require_live(model, "export_onnx")]
    if any(len(spec.sites) > 1 for spec in specs):
        names = [spec.owner for spec in specs if len(spec.sites) > 1]
        raise OnnxExportError(f"modules {names} hold several residual streams each, which cannot be exported yet")
    try:
        with disabled(model), _uncompiled(model), _without_cache(model), _evaluating(model):
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise OnnxExportError(
            f"torch.export cannot trace {type(model).__name__}: {error}\nTry other example_inputs, or "
            "dynamic_shapes with fewer dynamic dimensions"
        ) from error
    blocks: dict[str, Any] = {spec.owner: spec.blocks[0] for spec in specs}
    config = dataclasses.replace(specs[0].config, blocks=blocks, streams=tuple(blocks))
    return rewrite_exported(program, config)


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, as for any deployment; afterwards every module is back in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A Hugging Face model returns its key-value cache by default, which is no tensor."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]


def _default_dynamic_shapes(call: Call) -> Any:
    def dynamic(value: object) -> Any:
        if not isinstance(value, Tensor):
            return None
        count = 1 if value.is_floating_point() else 2
        return dict.fromkeys(range(min(count, value.dim())), Dim.DYNAMIC)

    if not call.kwargs:
        return tuple(dynamic(value) for value in call.args)
    if not call.args:
        return {name: dynamic(value) for name, value in call.kwargs.items()}
    raise OnnxExportError("example_inputs mix positional and keyword arguments: pass dynamic_shapes as well")


def _program_call(program: ExportedProgram, example_inputs: ExampleInputs | None) -> Call:
    if example_inputs is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Call(tuple(args), dict(kwargs))
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    return Call(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {})


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(f"export_onnx needs {name}: pip install 'attnres-rewrite[onnx]'") from error


def _convert(program: ExportedProgram, path: Path, opset_version: int) -> None:
    from attnres_rewrite.onnx_op import translation_table

    try:
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            opset_version=opset_version,
            custom_translation_table=translation_table(),
            optimize=True,
            verbose=False,
            external_data=_weight_bytes(program) > _LARGEST_FILE,
        )
    except Exception as error:
        raise OnnxExportError(f"torch.onnx.export failed: {error}") from error


def _weight_bytes(program: ExportedProgram) -> int:
    tensors = [*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compare(program: ExportedProgram, path: Path, call: Call) -> dict[tuple[int, ...], float]:
    """Relative differences between ONNX Runtime and PyTorch, by size of the fresh inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    module = program.module()
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for size in _sizes(program):
        fresh = _fresh_call(program, call, size, generator)
        with torch.no_grad():
            expected = _compat.tensors_in(fresh.run(module))
        given = [t.cpu().numpy() for t in _compat.tensors_in((fresh.args, fresh.kwargs))]
        actual = [torch.from_numpy(a) for a in session.run(None, dict(zip(names, given, strict=True)))]
        differences[size] = relative_difference(actual, [t.cpu() for t in expected])
    return differences


# Three sizes that were not traced: one more and one less, two more and half, one less and one more.
_BATCH_CHANGES: tuple[Callable[[int], int], ...] = (lambda b: b + 1, lambda b: b + 2, lambda b: b - 1)
_LENGTH_CHANGES: tuple[Callable[[int], int], ...] = (lambda t: t - 1, lambda t: t // 2, lambda t: t + 1)


def _sizes(program: ExportedProgram) -> list[tuple[int, ...]]:
    """Sizes to try, one entry for every dynamic dimension; inputs that were equally long stay so."""
    symbols = _symbols(program)
    if not symbols:
        return [()]
    return [
        tuple(max(symbol.smallest, (length if symbol.dim else batch)(symbol.hint)) for symbol in symbols)
        for batch, length in zip(_BATCH_CHANGES, _LENGTH_CHANGES, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Symbol:
    """A dynamic size of the inputs: its name, dimension, size when traced, and the smallest allowed."""

    name: str
    dim: int
    hint: int
    smallest: int


def _symbols(program: ExportedProgram) -> list[_Symbol]:
    ranges = {str(symbol): int(bounds.lower) for symbol, bounds in program.range_constraints.items()}
    symbols: dict[str, _Symbol] = {}
    for shape in _input_shapes(program):
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and str(size) in ranges:
                name = str(size)
                symbols.setdefault(name, _Symbol(name, dim, _compat.size_hint(size), ranges[name]))
    return list(symbols.values())


def _input_shapes(program: ExportedProgram) -> list[tuple[int | torch.SymInt, ...]]:
    users = set(program.graph_signature.user_inputs)
    nodes = (n for n in program.graph.nodes if n.op == "placeholder" and n.name in users)
    return [tuple(value.shape) for n in nodes if (value := tensor_of(n)) is not None]


def _fresh_call(program: ExportedProgram, call: Call, size: tuple[int, ...], generator: torch.Generator) -> Call:
    """``call`` with random tensors of another size, drawn from the values that the example has."""
    known = {symbol.name: value for symbol, value in zip(_symbols(program), size, strict=True)}
    shapes = iter(_input_shapes(program))

    def fresh(example: Tensor) -> Tensor:
        shape = [known.get(str(dim), dim if isinstance(dim, int) else _compat.size_hint(dim)) for dim in next(shapes)]
        if example.is_floating_point():
            noise = torch.randn(shape, generator=generator)
            return (noise * example.float().std().cpu() + example.float().mean().cpu()).to(example)
        values = example.flatten()
        picks = torch.randint(values.numel(), shape, generator=generator)
        return values[picks.to(values.device)]

    return Call(*_compat.map_tensors(fresh, (call.args, call.kwargs)))
