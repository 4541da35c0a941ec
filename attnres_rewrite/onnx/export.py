"""``export_onnx``: trace, convert, check against ONNX Runtime, and only then give the file its name."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite._version import __version__
from attnres_rewrite.capture.inputs import Call, ExampleInputs, example_call, without_traces
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import AttnResError, ExampleInputsError, MissingPackageError, OnnxExportError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.exported import flattened, rewrite_exported
from attnres_rewrite.forms.live import disabled, require_live, run_through
from attnres_rewrite.onnx import function, transformers_exporters
from attnres_rewrite.onnx.comparison import compare
from attnres_rewrite.onnx.conversion import Conversion, Reference, convert, finish
from attnres_rewrite.onnx.files import publish, save, temporary_folder
from attnres_rewrite.onnx.sizes import default_dynamic_dims, given_shapes

_logger = logging.getLogger(__name__)
# Relative differences that sums in another order explain, by the dtypes of stream and weights.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SUPPORTED = {
    *_TOLERANCES,
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_OLDEST_OPSET = 18


@dataclasses.dataclass(frozen=True)
class OnnxExport:
    """The result of :func:`export_onnx`.

    Attributes:
        path: The file written.
        max_difference: Largest difference between ONNX Runtime and PyTorch on fresh inputs, relative to
            the largest value of the output.
        differences: The same for every choice of the dynamic sizes (batch and sequence; with a cache also the length
            of what it holds) that was tried.
        sites: Number of AttnRes sites in the model.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
    """

    path: Path
    max_difference: float
    differences: dict[tuple[int, ...], float]
    sites: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_onnx(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs | None = None,
    *,
    use_cache: bool = False,
    dynamic_shapes: Any = None,
    opset_version: int = 23,
    functions: bool = True,
    ort_fusions: Literal["cpu", "cuda", "webgpu", "dml"] | None = None,
    tolerance: float | None = None,
) -> OnnxExport:
    """Export a rewritten model to ONNX and compare it with PyTorch in ONNX Runtime.

    The model is exported in eval mode. Every site is one node, ``attnres::BlockAttnRes``; or with the two-phase
    schedule ``attnres::MergePartial``, after one node ``attnres::AttendBlocks`` for all sites that share it. These are
    functions whose bodies are in the file, for ONNX runtimes that know overloaded functions (IR version 10). The
    comparison runs on fresh random inputs, of three other batch and sequence sizes than the example's where these are
    dynamic. The file appears under ``path`` only if it passes, also ``onnx.checker`` (but for ``ort_fusions``, whose
    operators that does not know); after an error the model and what was at ``path`` are as they were. Weights in
    bfloat16 are compared in a copy in float32, because ONNX Runtime's CPU provider lacks the operators.

    Hugging Face models are exported through ``transformers.exporters``, where transformers has it (tested with 5.17
    and 5.23).

    Args:
        model: A rewritten ``nn.Module``, ``ExportedProgram`` or ``GraphModule``.
        path: The file to write. Weights beyond ONNX's limit of 2 GB go to a file beside it, ``<path>.data``.
        example_inputs: Tensors that the model runs on, as for :func:`attnres_rewrite.rewrite`, of a batch and a
            sequence of at least two. A ``GraphModule`` needs them; an ``ExportedProgram`` has its own.
        use_cache: For Hugging Face models that generate: the graph goes on from a key-value cache. Its inputs are then
            ``input_ids`` ``[B, T]``, ``position_ids`` ``[B, T]``, where the example has one ``attention_mask``
            ``[B, P + T]``, and ``past_key_values.<layer>.key`` and ``.value`` ``[B, heads, P, head size]``; its
            outputs ``logits`` ``[B, T, vocabulary]`` and ``present.<layer>.key`` and ``.value``. P may be zero, which
            is a prompt, and T one, which is a step of generation.
        dynamic_shapes: As for ``torch.export.export``. By default the first two dimensions (batch and
            sequence) of every integer input, and the first of every other, are dynamic; of a cache whatever the model
            leaves open. Ignored for an ``ExportedProgram``, which has its own.
        opset_version: ONNX opset, at least 18; RMS norms are single nodes from 23 on.
        functions: Whether a site is a call of a function; otherwise its operators stand in the graph.
        ort_fusions: Fuse attention, rotary embeddings and norms into operators that only ONNX Runtime has, for this
            execution provider. For Hugging Face models. Compared on the CPU, and on CUDA where that is at hand.
        tolerance: Largest relative difference that is accepted. Default: 1e-3, 1e-8 in float64, 2e-2 in
            float16, 1e-1 in bfloat16, whichever is the largest for the dtypes of the stream and the parameters; a wrong
            source makes a difference of the order of one.

    Raises:
        OnnxExportError: The path cannot be written, there is no such opset, the model has a dtype that ONNX Runtime
            lacks, torch.export or the ONNX exporter failed, or the comparison exceeds ``tolerance``.
        AttnResError: ``model`` was not rewritten.
        GraphBreakError: The exported program has other streams than those that were rewritten.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
        MissingPackageError: onnx, onnxscript or onnxruntime is missing (extra ``onnx``).
    """
    _require_packages()
    _require_opset(opset_version)
    target = Path(path)
    _require_rewritten(model)
    with temporary_folder(target) as folder, _evaluating(model):
        _logger.info("Tracing the %s and converting it to ONNX", type(model).__name__)
        conversion = _converted(model, example_inputs, use_cache, dynamic_shapes, opset_version, ort_fusions)
        temporary = folder / target.name
        try:
            finish(conversion, functions, __version__)
            save(conversion.model, temporary)
        except Exception as error:
            raise OnnxExportError(f"the ONNX model cannot be written: {type(error).__name__}: {error}") from error
        _logger.info("Comparing ONNX Runtime with PyTorch")
        differences = _check(conversion, temporary)
        limit = _tolerance(conversion.program) if tolerance is None else tolerance
        worst = max(differences.values())
        if not worst <= limit:
            raise OnnxExportError(
                f"ONNX Runtime differs from PyTorch by {worst:.1e} (tolerance {limit:.1e}), relative to the "
                f"largest output, at sizes {differences}; no file was written"
            )
        publish(temporary, target)
    graph = conversion.model.graph
    return OnnxExport(
        path=target,
        max_difference=worst,
        differences=differences,
        sites=len(function.sites_of(conversion.program)),
        inputs=tuple(str(value.name) for value in graph.inputs),
        outputs=tuple(str(value.name) for value in graph.outputs),
    )


def _require_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise MissingPackageError("export_onnx", name, "onnx") from error


def _require_opset(version: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= version <= newest:
        raise OnnxExportError(
            f"opset_version is {version}: torch.onnx writes {_OLDEST_OPSET} and newer, and the installed onnx "
            f"{onnx.__version__} knows up to {newest}"
        )


def _require_rewritten(model: object) -> None:
    if isinstance(model, ExportedProgram | GraphModule):
        whole = flattened(model) if isinstance(model, ExportedProgram) else model
        if not function.is_rewritten(whole):
            kind = type(model).__name__ if isinstance(model, ExportedProgram) else "GraphModule"
            raise AttnResError(f"export_onnx: this {kind} was not rewritten; call rewrite() on it first")
        return
    require_live(model, "export_onnx")


def _converted(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None,
    use_cache: bool,
    dynamic_shapes: Any,
    opset_version: int,
    ort_fusions: str | None,
) -> Conversion:
    """``model`` in ONNX, by the way that its kind takes."""
    if isinstance(model, ExportedProgram):
        call = _program_call(model, example_inputs)
        _require_supported(model.state_dict, call)
        # Its guards refuse the sizes for which it was not traced.
        reference = Reference(_outputs_of(model.module()), smallest=2)
        program = model
    else:
        call = example_call(model, example_inputs)
        _require_supported(model.state_dict(), call)
        if isinstance(model, GraphModule):
            program, reference = _trace(model, call, dynamic_shapes), Reference(_outputs_of(model))
        else:
            config, blocks = _recorded(model)
            with _plain(model):
                if (keywords := transformers_exporters.by_keywords(model, call)) is not None:
                    return transformers_exporters.export(
                        model,
                        keywords,
                        lambda program: flattened(rewrite_exported(program, config, blocks)),
                        use_cache=use_cache,
                        dynamic_shapes=dynamic_shapes,
                        opset_version=opset_version,
                        ort_fusions=ort_fusions,
                    )
                program = rewrite_exported(_trace(model, call, dynamic_shapes), config, blocks)
            reference = Reference(_live_outputs(model))
    if use_cache or ort_fusions:
        option = "use_cache" if use_cache else "ort_fusions"
        raise OnnxExportError(
            f"{option} is for Hugging Face models that are given by themselves, and needs a transformers with "
            f"transformers.exporters (5.17 or newer); this is a {type(model).__name__}"
        )
    program = flattened(program)
    return Conversion(program, convert(program, opset_version), call, list(given_shapes(program)), reference)


def _recorded(model: nn.Module) -> tuple[AttnResConfig, dict[str, tuple[tuple[int, ...], ...]]]:
    """The configuration of a live model, and how the branch outputs of its streams are in blocks, by owner."""
    specs = [AnchorSpec.from_json(forward.spec) for _, forward in require_live(model, "export_onnx")]
    blocks = {spec.owner: spec.blocks for spec in specs}
    return dataclasses.replace(specs[0].config, streams=tuple(blocks)), blocks


def _require_supported(tensors: Mapping[str, Any], call: Call) -> None:
    inputs = {f"input {i}": t for i, t in enumerate(_compat.tensors_in((call.args, call.kwargs)))}
    for name, value in {**inputs, **tensors}.items():
        if isinstance(value, Tensor) and value.dtype not in _SUPPORTED:
            raise OnnxExportError(
                f"{name} is {str(value.dtype).removeprefix('torch.')}, which ONNX Runtime does not compute with; "
                "convert it, for example with model.float()"
            )


def _trace(model: nn.Module, call: Call, dynamic_shapes: Any) -> ExportedProgram:
    if dynamic_shapes is None:
        dynamic_shapes = _default_dynamic_shapes(call)
    try:
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise OnnxExportError(
            f"torch.export cannot trace {type(model).__name__}: {error}\nTry other example_inputs, or "
            "dynamic_shapes with fewer dynamic dimensions. A dynamic dimension must be at least two in the example"
        ) from error


@contextlib.contextmanager
def _evaluating(model: nn.Module | ExportedProgram) -> Iterator[None]:
    """Eval mode, as for any deployment; afterwards every module is back in the mode that it was in."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """``model`` uncompiled and with plain residuals."""
    compiled = _compat.compiled_call(model)
    _compat.set_compiled_call(model, None)
    try:
        with disabled(model):
            yield
    finally:
        _compat.set_compiled_call(model, compiled)


def _live_outputs(model: nn.Module) -> Any:
    def run(call: Call) -> list[Tensor]:
        with without_traces(model):
            return _compat.tensors_in(run_through(model, call.run, AttnResBackend("eager")))

    return run


def _outputs_of(module: nn.Module) -> Any:
    return lambda call: _compat.tensors_in(call.run(module))


def _default_dynamic_shapes(call: Call) -> Any:
    def dynamic(value: object) -> Any:
        return default_dynamic_dims(value) if isinstance(value, Tensor) else None

    if not call.kwargs:
        return tuple(dynamic(value) for value in call.args)
    if not call.args:
        return {name: dynamic(value) for name, value in call.kwargs.items()}
    raise OnnxExportError("example_inputs mix positional and keyword arguments: pass dynamic_shapes as well")


def _program_call(program: ExportedProgram, example_inputs: ExampleInputs | None) -> Call:
    if example_inputs is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Call(tuple(args), dict(kwargs))
    if example_inputs is None:
        raise ExampleInputsError("this ExportedProgram carries no example inputs: pass example_inputs")
    if isinstance(example_inputs, Mapping):
        order = _compat.keyword_order(program.call_spec.in_spec)
        if set(order) != set(example_inputs):
            raise ExampleInputsError(f"this ExportedProgram takes {order}, not {list(example_inputs)}")
        return Call((), {name: example_inputs[name] for name in order})
    return Call(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {})


def _check(conversion: Conversion, path: Path) -> dict[tuple[int, ...], float]:
    import onnx

    try:
        if conversion.standard:
            onnx.checker.check_model(str(path), full_check=True)
        return compare(conversion, path)
    except AttnResError:
        raise
    except Exception as error:
        raise OnnxExportError(
            f"the exported model could not be checked: {type(error).__name__}: {error}; no file was written"
        ) from error


def _tolerance(program: ExportedProgram) -> float:
    # A branch may compute in fewer digits than the stream has.
    weights = {program.state_dict[name].dtype for name in program.graph_signature.parameters}
    return max(_TOLERANCES[dtype] for dtype in function.dtypes_of(program) | (weights & _TOLERANCES.keys()))
