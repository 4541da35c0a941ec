"""From a rewritten program to an ONNX model: sites as function calls, names, metadata."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.errors import OnnxExportError
from attnres_rewrite.onnx import function
from attnres_rewrite.onnx.sizes import given_shapes, renamed, size_names

if TYPE_CHECKING:
    import numpy
    from onnxscript import ir

# Where torch.onnx writes which lines of which files on this machine a node comes from.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


@dataclasses.dataclass(frozen=True)
class Reference:
    """The PyTorch model that an exported file is compared with.

    Attributes:
        run: The outputs in a call under the names that they have in the file, in their order.
        prepare: Makes random inputs consistent with one another, where a model needs that.
        smallest: Smallest size of a dynamic dimension that ``run`` takes. Programs are traced for sizes of at least
            two, and exported files are used with one as well.
    """

    run: Callable[[Call], dict[str, Tensor]]
    prepare: Callable[[Call], Call] = lambda call: call
    smallest: int = 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """An ONNX model in memory and where it came from.

    Attributes:
        program: The rewritten program.
        model: The ONNX model made from it.
        call: The example inputs that the program was traced with.
        inputs: The name in ``model`` of every tensor of ``call``, in order.
        reference: What ``model`` is compared with.
        standard: Whether all operators are those of ONNX; otherwise some are known to ONNX Runtime alone.
    """

    program: ExportedProgram
    model: ir.Model
    call: Call
    inputs: Sequence[str]
    reference: Reference
    standard: bool = True


def convert(program: ExportedProgram, opset_version: int) -> ir.Model:
    """The ONNX model of a rewritten ``program``, with every site a call of a function that is not yet defined.

    Raises:
        OnnxExportError: The exporter failed.
    """
    try:
        exported = torch.onnx.export(
            function.with_calls(program), (), dynamo=True, opset_version=opset_version, optimize=True, verbose=False
        )
    except Exception as error:
        raise OnnxExportError(f"torch.onnx.export failed: {error}") from error
    assert exported is not None
    model: ir.Model = exported.model
    function.name_calls(model, program)
    for value, name in zip(model.graph.inputs, given_shapes(program), strict=True):
        # The exporter gives an input that the model returns unchanged the name of that output.
        value.name = name
    _name_outputs(model, _output_names(program))
    return model


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    from onnxscript import ir

    graph = model.graph
    taken = {value.name for value in graph.inputs}
    for index, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if value.is_graph_input() or value in graph.outputs[:index]:
            # An input that is returned unchanged, or a value returned twice, needs a second name.
            copied = ir.node("Identity", [value])
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            graph.append(copied)
            graph.outputs[index] = value = copied.outputs[0]
        value.name = f"output_{name}" if name in taken else name


def _output_names(program: ExportedProgram) -> list[str]:
    specs = (s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT)
    pairs = zip(_compat.output_names(program.call_spec.out_spec), specs, strict=True)
    # What is None, or another constant, is no output of the ONNX model.
    names = [name for name, spec in pairs if not isinstance(spec.arg, ConstantArgument)]
    return [_output_name(name) for name in names]


def _output_name(path: str) -> str:
    # An output that is not in a mapping has only a position.
    return "output" if not path else f"output_{path}" if path.isdecimal() else path


def named_outputs(outputs: object) -> dict[str, Tensor]:
    """The tensors that a PyTorch model returned, under the names that they have in an exported file."""
    return {_output_name(path): tensor for path, tensor in _compat.named_tensors(outputs).items()}


def finish(
    conversion: Conversion,
    *,
    functions: bool,
    version: str,
    sites: Literal["shared", "whole"] = "shared",
    stack_traces: bool = False,
) -> None:
    """Define the functions of the sites in the model, or expand them; and give names and metadata to what is there."""
    from onnx_ir.passes import common

    model, program = conversion.model, conversion.program
    opset_version = model.opset_imports[""]
    function.define(model, program, opset_version, sites)
    _give_caches_every_batch(model)
    _name_folded_weights(model, program)
    _name_sizes(model, program)
    calls = function.sites_of(program)
    owners = sorted({site.owner for site in calls})
    sources = {owner: [site.sources for site in calls if site.owner == owner] for owner in owners}
    # The last read of a stream has all block summaries, and the root. Of several streams, the one with the most.
    blocks = {owner: max(counts) - 1 for owner, counts in sources.items()}
    model.metadata_props.update(
        {
            "attnres.version": version,
            "attnres.blocks": json.dumps(blocks),
            "attnres.sources_per_site": json.dumps(sources),
        }
    )
    model.producer_name, model.producer_version = "attnres_rewrite", version
    if not stack_traces:
        for node in model.graph.all_nodes():
            node.metadata_props.pop(_STACK_TRACE, None)
    if not functions:
        domains = {function.domain for function in model.functions.values()}
        common.InlinePass()(model)
        for domain in domains:
            model.opset_imports.pop(domain, None)


def _give_caches_every_batch(model: ir.Model) -> None:
    """Repeat rotary caches of batch one for every sequence of the batch.

    The exporter fuses rotary embeddings also where all sequences share their positions, and leaves the caches at batch
    one, while the operator asks for the batch of its input (ONNX, RotaryEmbedding-23).
    """
    from onnxscript import ir

    batched: dict[tuple[object, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) != 3:
            continue
        x = node.inputs[0]
        for position in (1, 2):
            cache = node.inputs[position]
            wave = cache.producer() if cache is not None else None
            angle = wave.inputs[0] if wave is not None and wave.op_type in ("Cos", "Sin") else None
            if wave is None or angle is None or angle.shape is None or angle.shape[0] != 1 or not (x and x.shape):
                continue
            key = (wave.op_type, angle.name, str(x.shape[0]))
            if key not in batched:
                ones = ir.node("Constant", [], {"value_ints": [1, 1]})
                batch = ir.node("Shape", [x], {"start": 0, "end": 1})
                shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
                expand = ir.node("Expand", [cache, shape.outputs[0]])
                model.graph.insert_before(node, [ones, batch, shape, expand])
                batched[key] = expand.outputs[0]
            node.replace_input_with(position, batched[key])


def _name_folded_weights(model: ir.Model, program: ExportedProgram) -> None:
    """Name the transposes of weights, which the exporter folds, after the weights."""
    initializers = model.graph.initializers
    missing: dict[tuple[object, ...], list[str]] = {}
    for name, parameter in program.state_dict.items():
        if name not in initializers and parameter.dim() == 2:
            columns = parameter.detach().t()
            missing.setdefault((*columns.shape, _bits(columns[0]).tobytes()), []).append(name)
    for value in list(initializers.values()):
        tensor = value.const_value
        if tensor is None or value.name in program.state_dict or len(tensor.shape) != 2:
            continue
        array = tensor.numpy()
        for name in missing.get((*array.shape, array[0].tobytes()), []):
            parameter = program.state_dict[name].detach()
            if f"{name}.transposed" not in initializers and _bits(parameter.t()).tobytes() == array.tobytes():
                value.name = f"{name}.transposed"
                break


def _bits(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    return tensor.contiguous().cpu().view(torch.uint8).numpy()


def _name_sizes(model: ir.Model, program: ExportedProgram) -> None:
    """Call the dynamic sizes batch, sequence and past_sequence in every shape of the graph."""
    from onnxscript import ir

    names = size_names(program)
    values = [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            texts = [renamed(str(getattr(dim, "value", dim)), names) for dim in value.shape]
            value.shape = ir.Shape([int(t) if t.isdecimal() else None if t == "None" else t for t in texts])


_CACHE = re.compile(r"(?:input\.|output\.)?past_key_values\.layers\.(\d+)\.(\w+)")
_SINGULAR = {"keys": "key", "values": "value"}


def cache_name(name: str, kind: str) -> str:
    """The customary name of an input (``kind`` "past_key_values") or output ("present") that belongs to a cache."""
    match = _CACHE.fullmatch(name)
    if match is None:
        return name
    layer, part = match.groups()
    return f"{kind}.{layer}.{_SINGULAR.get(part, part)}"
