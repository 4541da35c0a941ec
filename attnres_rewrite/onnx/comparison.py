"""The check of an exported file: ONNX Runtime against PyTorch on inputs that nobody traced."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.errors import OnnxExportError
from attnres_rewrite.inspection.verification import relative_difference
from attnres_rewrite.onnx.conversion import Conversion
from attnres_rewrite.onnx.sizes import dynamic_sizes, given_shapes, values_at

_ONNX_BFLOAT16 = 16


def compare(conversion: Conversion, path: Path) -> dict[tuple[int, ...], dict[str, float]]:
    """Largest difference between ONNX Runtime and PyTorch in every output, relative to its largest value.

    Args:
        conversion: What was exported, and what it is compared with.
        path: The file.

    Returns:
        One entry for each of three choices of the dynamic sizes, none of them the example's. Where several execution
        providers are at hand, a difference is the largest of theirs.

    Raises:
        OnnxExportError: The outputs are others, or of other shapes, than PyTorch's.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        on_cpu = _in_float32(path, Path(folder)) if _computes_in_bfloat16(conversion.program) else path
        sessions = [_session(on_cpu if len(providers) == 1 else path, providers) for providers in _providers()]
        return _differences(conversion, sessions)


def _differences(conversion: Conversion, sessions: Sequence[Any]) -> dict[tuple[int, ...], dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    program, reference = conversion.program, conversion.reference
    differences: dict[tuple[int, ...], dict[str, float]] = {}
    sizes = dynamic_sizes(program, reference.smallest)
    for values in zip(*(size.others() for size in sizes), strict=True) if sizes else [()]:
        chosen = {symbol: value for size, value in zip(sizes, values, strict=True) for symbol in size.symbols}
        fresh = reference.prepare(_fresh_call(program, conversion.call, chosen, generator))
        given = [tensor.detach().cpu().clone() for tensor in _compat.tensors_in((fresh.args, fresh.kwargs))]
        named = dict(zip(conversion.inputs, given, strict=True))
        with torch.no_grad():
            expected = {name: tensor.cpu() for name, tensor in reference.run(fresh).items()}
        found = [_by_output(_run_session(session, named), expected) for session in sessions]
        differences[values] = {name: max(by_output[name] for by_output in found) for name in found[0]}
    return differences


def _by_output(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The difference in every output, once number, names and shapes are known to agree."""
    # An output under the name of an input has another one in the file.
    same = [name in (other, f"output_{other}") for name, other in zip(outputs, expected, strict=False)]
    if len(outputs) != len(expected) or not all(same):
        theirs, ours = list(expected), list(outputs)
        raise OnnxExportError(
            f"the exported model has {len(ours)} outputs ({_listed(ours)}) and PyTorch's {len(theirs)} "
            f"({_listed(theirs)}); no file was written. An option of the call or of the model's configuration does not "
            "reach the part that returns them: set it in the configuration, nested ones included"
        )
    for (name, output), reference in zip(outputs.items(), expected.values(), strict=True):
        if output.shape != reference.shape:
            raise OnnxExportError(
                f"output {name!r} has shape {tuple(output.shape)} in ONNX Runtime and {tuple(reference.shape)} in "
                "PyTorch; no file was written. A size that the trace took for constant may be one that changes: pass "
                "dynamic_shapes, or other example_inputs"
            )
    return {
        name: relative_difference([output], [reference])
        for (name, output), reference in zip(outputs.items(), expected.values(), strict=True)
    }


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _computes_in_bfloat16(program: ExportedProgram) -> bool:
    parameters = (program.state_dict[name] for name in program.graph_signature.parameters)
    return any(parameter.dtype == torch.bfloat16 for parameter in parameters)


def _in_float32(path: Path, folder: Path) -> Path:
    """A copy of a bfloat16 model in float32: on the CPU, ONNX Runtime has next to no operators for bfloat16."""
    import numpy
    from onnxscript import ir

    model = ir.load(path)
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(numpy.float32), name=tensor.name) if tensor.dtype == narrow else tensor

    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = widened(value.const_value)
    for graph in graphs:
        nodes = list(ir.traversal.RecursiveGraphIterator(graph))
        for value in [*graph.inputs, *graph.initializers.values(), *(v for node in nodes for v in node.outputs)]:
            if value.dtype == narrow:
                value.dtype = wide
        for node in nodes:
            for name, attribute in list(node.attributes.items()):
                if node.op_type == "Cast" and name == "to" and attribute.value == narrow:
                    node.attributes[name] = ir.AttrInt64(name, int(wide))
                elif attribute.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, widened(attribute.as_tensor()))
    copy = folder / path.name
    ir.save(model, copy, external_data=f"{path.name}.data")
    return copy


def _providers() -> list[list[Any]]:
    import onnxruntime

    available: list[list[Any]] = [["CPUExecutionProvider"]]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available():
        # TensorFloat-32 has ten bits, far fewer than a comparison in float32 needs.
        available.append([("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"])
    return available


def _session(path: Path, providers: list[Any]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        # ONNX Runtime falls back without an error, and a comparison would then say nothing of the provider.
        raise OnnxExportError(f"ONNX Runtime cannot run the model with its {wanted}, which is installed")
    return session


def _run_session(session: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of an ONNX Runtime session; of what is ``given``, it takes what it reads."""
    wide = {read.name for read in session.get_inputs() if read.type == "tensor(float)"}
    values = {
        read.name: _to_ort(given[read.name].float() if read.name in wide else given[read.name])
        for read in session.get_inputs()
    }
    names = [output.name for output in session.get_outputs()]
    return {
        name: _from_ort(value) for name, value in zip(names, session.run_with_ort_values(names, values), strict=True)
    }


def _to_ort(tensor: Tensor) -> Any:
    import onnxruntime

    if tensor.dtype != torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
    # NumPy has no bfloat16, so its bits are handed over.
    bits = tensor.contiguous().view(torch.uint16).numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == _ONNX_BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value)
    return torch.from_numpy(value.numpy())


def _fresh_call(program: ExportedProgram, call: Call, chosen: dict[str, int], generator: torch.Generator) -> Call:
    """``call`` with random tensors of other sizes, drawn from the values that the example has."""
    known = values_at(program, chosen)
    shapes = iter(given_shapes(program).values())

    def fresh(example: Tensor) -> Tensor:
        shape = [_compat.size_at(dim, known) for dim in next(shapes)]
        if example.is_floating_point():
            noise = torch.randn(shape, generator=generator)
            return (noise * example.float().std(correction=0).cpu() + example.float().mean().cpu()).to(example)
        values = example.flatten()
        picks = torch.randint(values.numel(), shape, generator=generator)
        drawn = values[picks.to(values.device)]
        if values.min() >= 0 and values.max() <= 1 and drawn.dim() > 1:
            # Perhaps a mask of padding: no sequence is all padding.
            drawn[..., -1] = 1
            drawn[..., 0] = 1
        return drawn

    return Call(*_compat.map_tensors(fresh, (call.args, call.kwargs)))
