"""``export_onnx``: trace, convert, check against ONNX Runtime, and only then give the file its name."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_rewrite._version import __version__
from attnres_rewrite.capture.inputs import ExampleInputs
from attnres_rewrite.errors import AttnResError, MissingPackageError, OnnxExportError
from attnres_rewrite.forms.exported import flattened
from attnres_rewrite.forms.live import require_live
from attnres_rewrite.onnx import function
from attnres_rewrite.onnx.comparison import compare
from attnres_rewrite.onnx.conversion import Conversion, finish
from attnres_rewrite.onnx.files import publish, save, temporary_folder
from attnres_rewrite.onnx.tracing import converted

_logger = logging.getLogger(__name__)
# Relative differences that sums in another order explain, by the dtypes of stream and weights.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
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
    sites: Literal["shared", "whole"] = "shared",
    ort_fusions: Literal["cpu", "cuda", "webgpu", "dml"] | None = None,
    tolerance: float | None = None,
    external_data_above: int | None = None,
    stack_traces: bool = False,
) -> OnnxExport:
    """Export a rewritten model to ONNX and compare it with PyTorch in ONNX Runtime.

    The model is exported in eval mode. Every site is one node ``BlockAttnRes``, whatever the schedule that PyTorch
    computes it in; what sites have in common is in nodes ``AttendBlocks``, one a block, and ``ScaleQueries``. These are
    functions whose bodies are in the file, in domains ``attnres.<form>``. The comparison runs on fresh random
    inputs, of three other batch and sequence sizes than the example's where these are dynamic: first the number, names
    and shapes of the outputs, then their values. The file appears under ``path`` only if it passes, also
    ``onnx.checker`` (but for ``ort_fusions``, whose operators that does not know); after an error the model and what
    was at ``path`` are as they were. Weights in bfloat16 are compared in a copy in float32, because ONNX Runtime's CPU
    provider lacks the operators.

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
        functions: Whether a site is a call of a function; otherwise its operators stand in the graph, for consumers
            that know no functions.
        sites: ``"shared"``: a block is normalised once, for all sites that read it, and a site adds the partial of its
            own block. ``"whole"``: a site takes its sources, its query and its gain, and nothing else is computed
            anywhere. That is slower on operators, and easier to write a kernel of one's own for;
            ``attnres_rewrite.onnx.register`` has kernels for both.
        ort_fusions: Fuse attention, rotary embeddings and norms into operators that only ONNX Runtime has, for this
            execution provider. For Hugging Face models. Compared on the CPU, and on CUDA where that is at hand.
        tolerance: Largest relative difference that is accepted. Default: 1e-3, 1e-8 in float64, 2e-2 in
            float16, 1e-1 in bfloat16, whichever is the largest for the dtypes of the stream and the parameters; a wrong
            source makes a difference of the order of one.
        external_data_above: Size of the weights in bytes from which on they go to ``<path>.data``. Default: what ONNX
            allows.
        stack_traces: Whether every node tells the lines of code that it comes from, with the paths of this machine.

    Raises:
        OnnxExportError: The path cannot be written, there is no such opset or form of the sites, the model has a dtype
            that ONNX Runtime lacks, torch.export or the ONNX exporter failed, or the comparison exceeds ``tolerance``.
        AttnResError: ``model`` was not rewritten.
        GraphBreakError: The exported program has other streams than those that were rewritten.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
        MissingPackageError: onnx, onnxscript or onnxruntime is missing (extra ``onnx``).
    """
    _require_packages()
    _require_opset(opset_version)
    if sites not in ("shared", "whole"):
        raise OnnxExportError(f"sites is {sites!r}, and there are two ways to write them: 'shared' and 'whole'")
    target = Path(path)
    _require_rewritten(model)
    with temporary_folder(target) as folder, _evaluating(model):
        _logger.info("Tracing the %s and converting it to ONNX", type(model).__name__)
        conversion = converted(model, example_inputs, use_cache, dynamic_shapes, opset_version, ort_fusions)
        temporary = folder / target.name
        try:
            finish(conversion, functions=functions, version=__version__, sites=sites, stack_traces=stack_traces)
            save(conversion.model, temporary, external_data_above)
        except Exception as error:
            raise OnnxExportError(f"the ONNX model cannot be written: {type(error).__name__}: {error}") from error
        _logger.info("Comparing ONNX Runtime with PyTorch")
        by_output = _check(conversion, temporary)
        differences = {sizes: max(of.values(), default=0.0) for sizes, of in by_output.items()}
        worst = max(differences.values())
        limit = _tolerance(conversion.program) if tolerance is None else tolerance
        if not worst <= limit:
            others = sorted({name for of in by_output.values() for name, value in of.items() if not value <= limit})
            raise OnnxExportError(
                f"ONNX Runtime differs from PyTorch by {worst:.1e} (tolerance {limit:.1e}) in {', '.join(others)}, "
                f"relative to the largest value of an output, at sizes {differences}; no file was written"
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
    import onnxruntime

    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= version <= newest:
        raise OnnxExportError(
            f"opset_version is {version}: torch.onnx writes {_OLDEST_OPSET} and newer, and the installed onnx "
            f"{onnx.__version__} knows up to {newest}"
        )
    if not _is_run(version):
        runs = next((older for older in range(version - 1, _OLDEST_OPSET - 1, -1) if _is_run(older)), None)
        raise OnnxExportError(
            f"opset_version is {version}, which the installed ONNX Runtime {onnxruntime.__version__} does not run, so "
            f"the file could not be checked: pass opset_version={runs} or an older one, or install a newer onnxruntime"
        )


def _is_run(opset_version: int) -> bool:
    """Whether the installed ONNX Runtime takes models of this opset."""
    import onnx
    import onnxruntime

    text = (
        f'<ir_version: 10, opset_import: ["" : {opset_version}]> g (float[1] x) => (float[1] y) {{ y = Identity (x) }}'
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        model = onnx.parser.parse_model(text).SerializeToString()
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:
        # It has no type of its own for this.
        return False
    return True


def _require_rewritten(model: object) -> None:
    if isinstance(model, ExportedProgram | GraphModule):
        whole = flattened(model) if isinstance(model, ExportedProgram) else model
        if not function.is_rewritten(whole):
            kind = type(model).__name__ if isinstance(model, ExportedProgram) else "GraphModule"
            raise AttnResError(f"export_onnx: this {kind} was not rewritten; call rewrite() on it first")
        return
    require_live(model, "export_onnx")


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


def _check(conversion: Conversion, path: Path) -> dict[tuple[int, ...], dict[str, float]]:
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
