"""From a model of any of the three kinds to its conversion: how it is traced, and what it is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call, ExampleInputs, example_call, without_traces
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import ExampleInputsError, OnnxExportError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.exported import flattened, rewrite_exported
from attnres_rewrite.forms.live import disabled, require_live, run_through
from attnres_rewrite.onnx import transformers_exporters
from attnres_rewrite.onnx.conversion import Conversion, Reference, convert, named_outputs
from attnres_rewrite.onnx.sizes import default_dynamic_dims, given_shapes

# The dtypes that ONNX Runtime computes with.
_SUPPORTED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def converted(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None,
    use_cache: bool,
    dynamic_shapes: Any,
    opset_version: int,
    ort_fusions: str | None,
) -> Conversion:
    """``model`` in ONNX, by the way that its kind takes.

    Args:
        model: A rewritten model, in eval mode.
        example_inputs: As for ``export_onnx``.
        use_cache: As for ``export_onnx``.
        dynamic_shapes: As for ``export_onnx``.
        opset_version: As for ``export_onnx``.
        ort_fusions: As for ``export_onnx``.

    Raises:
        OnnxExportError: The model cannot be exported, or not with these options.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
    """
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
def _plain(model: nn.Module) -> Iterator[None]:
    """``model`` uncompiled and with plain residuals."""
    compiled = _compat.compiled_call(model)
    _compat.set_compiled_call(model, None)
    try:
        with disabled(model):
            yield
    finally:
        _compat.set_compiled_call(model, compiled)


def _live_outputs(model: nn.Module) -> Callable[[Call], dict[str, Tensor]]:
    def run(call: Call) -> dict[str, Tensor]:
        with without_traces(model):
            return named_outputs(run_through(model, call.run, AttnResBackend("eager")))

    return run


def _outputs_of(module: nn.Module) -> Callable[[Call], dict[str, Tensor]]:
    return lambda call: named_outputs(call.run(module))


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
