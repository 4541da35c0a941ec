"""Hugging Face models go through ``transformers.exporters``, which knows their caches, masks and outputs.

Its ONNX exporter extends its ``torch.export`` exporter and calls it by ``super()``. A class between the two in the
order of method resolution therefore sees the program after it is traced and before it is converted: there it is
rewritten. Works with transformers 5.17 (where the method is called ``export``) to 5.23 (``export_program``).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from attnres_rewrite.capture.inputs import Call, without_traces
from attnres_rewrite.errors import AttnResError, OnnxExportError
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.live import run_through
from attnres_rewrite.onnx import function
from attnres_rewrite.onnx.caches import with_cache, with_positions
from attnres_rewrite.onnx.conversion import Conversion, Reference, cache_name
from attnres_rewrite.onnx.sizes import default_dynamic_dims

if TYPE_CHECKING:
    from onnxscript import ir


Rewrite = Callable[[ExportedProgram], ExportedProgram]
_logger = logging.getLogger(__name__)


def by_keywords(model: nn.Module, call: Call) -> Call | None:
    """``call`` with keyword arguments alone, if ``model`` is a Hugging Face model and its exporters are installed."""
    if "transformers" not in sys.modules or importlib.util.find_spec("transformers.exporters") is None:
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    named = inspect.signature(model.forward).bind_partial(*call.args).arguments
    return Call((), {**named, **call.kwargs})


def export(
    model: Any,
    call: Call,
    rewrite: Rewrite,
    *,
    use_cache: bool,
    dynamic_shapes: Any,
    opset_version: int,
    ort_fusions: str | None,
) -> Conversion:
    """Export ``model``, whose plain path is active, and rewrite it on the way.

    Args:
        model: A ``PreTrainedModel``.
        call: The example.
        rewrite: Rewrites the program of the plain path.
        use_cache: Whether the graph takes and gives a key-value cache.
        dynamic_shapes: As for ``torch.export.export``; None lets the exporter find the dynamic dimensions.
        opset_version: ONNX opset.
        ort_fusions: Execution provider for which the graph is fused into operators of ONNX Runtime.

    Raises:
        OnnxExportError: The exporter failed, or the model cannot be called with a cache.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.utils import get_leaf_tensors

    exporter = _rewriting_exporter(rewrite)
    with _own_forward(model), contextlib.ExitStack() as nested:
        inputs = with_cache(model, call.kwargs) if use_cache else {**call.kwargs, "use_cache": False}
        given = copy.deepcopy(inputs)
        nested.enter_context(_in_nested_configurations(model, inputs))
        shapes = _default_dynamic_shapes(inputs) if dynamic_shapes is None else dynamic_shapes
        config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset_version)
        progress = io.StringIO()
        try:
            # The exporters print what they are at.
            with contextlib.redirect_stdout(progress):
                onnx_model: ir.Model = exporter.convert(model, given, config)
        except AttnResError:
            raise
        except Exception as error:
            raise OnnxExportError(
                f"transformers.exporters cannot export {type(model).__name__}: {error}\nTry other example_inputs, or "
                "dynamic_shapes with fewer dynamic dimensions. A dynamic dimension must be at least two in the example"
            ) from error
    function.name_calls(onnx_model, exporter.program)
    if ort_fusions is not None:
        fuse(onnx_model, ort_fusions)
    _logger.debug("%s", progress.getvalue())
    # What the exporter took out of the inputs are flags, which it sets in the model's configuration for the trace.
    flags = {name: value for name, value in inputs.items() if name not in given}
    tensors = {name: value for name, value in inputs.items() if name in given}
    names = [cache_name(name, "past_key_values") for name in get_leaf_tensors(tensors)]
    for value in onnx_model.graph.inputs:
        value.name = cache_name(str(value.name), "past_key_values")
    for value in onnx_model.graph.outputs:
        value.name = cache_name(str(value.name), "present")

    def run(fresh: Call) -> dict[str, Tensor]:
        asked = Call((), {**fresh.kwargs, **flags})
        with without_traces(model):
            outputs = get_leaf_tensors(run_through(model, asked.run, AttnResBackend("eager")))
        return {cache_name(name, "present"): tensor for name, tensor in outputs.items()}

    return Conversion(
        exporter.program, onnx_model, Call((), tensors), names, Reference(run, with_positions), ort_fusions is None
    )


def fuse(model: ir.Model, ort_fusions: str) -> None:
    """Fuse ``model`` in place into operators of ONNX Runtime, for the execution provider ``ort_fusions``.

    Raises:
        OnnxExportError: This version of transformers has no fusions.
    """
    try:
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
    except ImportError as error:
        raise OnnxExportError("ort_fusions needs transformers 5.23 or newer, which brings the fusions") from error
    fuse_for_onnxruntime(model, ort_fusions)


def _default_dynamic_shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    return {
        # Of a cache, which dimension is the length is known to its layers alone.
        name: default_dynamic_dims(value) if isinstance(value, Tensor) else get_auto_dynamic_shapes(value)
        for name, value in inputs.items()
        # Flags are no inputs of the program.
        if not isinstance(value, bool)
    }


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """The exporters put a ``forward`` on the object and leave the class's own one there."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = before


@contextlib.contextmanager
def _in_nested_configurations(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """The flags among ``inputs`` in the configurations of the parts of ``model``.

    The exporters set them in the model's own configuration alone, and a part, such as T5's decoder, may have a copy.
    """
    flags = {name: value for name, value in inputs.items() if isinstance(value, bool)}
    configurations = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, name, getattr(c, name)) for c in configurations.values() for name in flags if hasattr(c, name)]
    try:
        for configuration, name, _ in before:
            setattr(configuration, name, flags[name])
        yield
    finally:
        for configuration, name, value in before:
            setattr(configuration, name, value)


def _rewriting_exporter(rewrite: Rewrite) -> Any:
    """An ONNX exporter that rewrites the program between the trace and the conversion, and keeps it as ``program``."""
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.exporter_onnx import OnnxExporter

    class Rewriting(DynamoExporter):  # type: ignore[misc]
        program: ExportedProgram

        def _rewritten(self, program: ExportedProgram) -> ExportedProgram:
            self.program = rewrite(program)
            return function.with_calls(self.program)

    class SinceMetadata(Rewriting):
        def export_program(self, model: nn.Module, sample_inputs: Any, config: Any) -> Any:
            program, metadata = super().export_program(model, sample_inputs, config=config)
            return self._rewritten(program), metadata

    class BeforeMetadata(Rewriting):
        def export(self, model: nn.Module, sample_inputs: Any, config: Any) -> Any:
            return self._rewritten(super().export(model, sample_inputs, config=config))

    if hasattr(DynamoExporter, "export_program"):

        class AttnResOnnxExporter(OnnxExporter, SinceMetadata):  # type: ignore[misc]
            def convert(self, model: nn.Module, sample_inputs: Any, config: Any) -> Any:
                return self.export_program(model, sample_inputs, config)[0]
    else:

        class AttnResOnnxExporter(OnnxExporter, BeforeMetadata):  # type: ignore[misc, no-redef]
            def convert(self, model: nn.Module, sample_inputs: Any, config: Any) -> Any:
                return self.export(model, sample_inputs, config).model

    return AttnResOnnxExporter()
