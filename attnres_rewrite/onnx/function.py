"""From the sites of a program to calls of model-local functions in domains ``attnres.<form>``.

The exporter is given a call for each operator of the program, ``block_attn_res`` or, with the two-phase schedule,
``attend_blocks`` and ``merge_partial``. What is written in their places is the same for both: see ``sites.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from attnres_rewrite.graph.nodes import require_tensor
from attnres_rewrite.onnx.form import DOMAIN, wide_dtype
from attnres_rewrite.onnx.sites import Settings, Site, write_shared, write_whole
from attnres_rewrite.passes.schedule_reads import sources_of

if TYPE_CHECKING:
    from onnxscript import ir

VERSION = 1
_ATTEND, _MERGE = torch.ops.attnres.attend_blocks.default, torch.ops.attnres.merge_partial.default
_OPS: dict[Any, str] = {
    torch.ops.attnres.block_attn_res.default: "BlockAttnRes",
    _ATTEND: "AttendBlocks",
    _MERGE: "MergePartial",
}


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """One call of a function, and the node of a program that it is made from.

    Attributes:
        name: ``<owner>.attn_res.<i>`` for a site, ``<owner>.attn_res.<first>_to_<last>`` for what sites share.
        queries: Names of its pseudo-queries among the program's parameters.
        gains: Names of its key gains, one for each query or none.
        gates: The name of its gate, or none.
        sources: Number of sources of the site; 0 for what sites share.
        node: The node.
    """

    name: str
    queries: tuple[str, ...]
    gains: tuple[str, ...]
    gates: tuple[str, ...]
    sources: int
    node: Node

    @property
    def owner(self) -> str:
        """Path of the module that holds the stream; empty for the model itself."""
        return self.name.rpartition("attn_res.")[0].removesuffix(".")


def is_rewritten(program: ExportedProgram | GraphModule) -> bool:
    """Whether ``program`` has sites."""
    return any(node.target in _OPS for node in program.graph.nodes)


def calls_of(program: ExportedProgram) -> list[FunctionCall]:
    """The calls of ``program`` in the order of its nodes; empty if it was not rewritten."""
    names = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs}
    calls = []
    for node in program.graph.nodes:
        if node.target in _OPS:
            queries, gains, gates = (tuple(names[one.name] for one in given) for given in _parameters(node))
            sources = 0 if node.target is _ATTEND else len(sources_of(node))
            calls.append(FunctionCall(_call_name(queries), queries, gains, gates, sources, node))
    return calls


def sites_of(program: ExportedProgram) -> list[FunctionCall]:
    """The calls that are sites."""
    return [call for call in calls_of(program) if call.sources]


def _parameters(node: Node) -> tuple[list[Node], list[Node], list[Node]]:
    """Queries, gains and gates."""
    arguments: Any = node.args
    if node.target is _ATTEND:
        return arguments[1], arguments[2], []
    query, gain = arguments[3:5] if node.target is _MERGE else arguments[1:3]
    gate = _form_of(node).gate
    return [query], [] if gain is None else [gain], [] if gate is None else [gate]


@dataclasses.dataclass(frozen=True)
class _ReadForm:
    """What a site's node says of the form of its read."""

    sum: bool
    gate: Node | None = None
    base: float = 0.0
    value_norm: bool = False


def _form_of(site: Node) -> _ReadForm:
    arguments: Any = site.args
    if site.target is not _MERGE:
        return _ReadForm(*arguments[5:])
    total, *rest = arguments[7:]
    return _ReadForm(total != 1.0, *rest[1:])


def _call_name(queries: Sequence[str]) -> str:
    sites = [query.removesuffix(".query") for query in queries]
    if len(sites) == 1:
        return sites[0]
    return f"{sites[0]}_to_{sites[-1].rpartition('.')[2]}"


def dtypes_of(program: ExportedProgram) -> set[torch.dtype]:
    """The dtypes of the sources of the sites of ``program``."""
    return {require_tensor(sources_of(site.node)[0]).dtype for site in sites_of(program)}


def with_calls(program: ExportedProgram) -> ExportedProgram:
    """``program`` with the nodes of its sites replaced by ones that export as calls of the functions."""
    lowered: ExportedProgram = program.run_decompositions(
        {
            torch.ops.attnres.block_attn_res.default: _block_attn_res,
            _ATTEND: _attend_blocks,
            _MERGE: _merge_partial,
        }
    )
    return lowered


def _block_attn_res(
    sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum: bool, *form: Any
) -> Tensor:
    # What differs from the paper's form is in the node that the call is made from.
    inputs = [*sources, query, *([] if gain is None else [gain])]
    attributes = {"eps": eps, "scale": scale, "aggregation": "sum" if sum else "mean"}
    return _one_result("BlockAttnRes", inputs, attributes)


def _attend_blocks(
    blocks: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor], eps: float, scale: float
) -> list[Tensor]:
    first, reads = blocks[0], len(queries)
    results = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::AttendBlocks",
        [*blocks, *queries, *gains],
        {"eps": eps, "scale": scale},
        dtypes=[first.dtype] * reads + [wide_dtype(first.dtype, queries[0].dtype)] * reads,
        shapes=[first.shape] * reads + [(*first.shape[:-1], 1)] * reads,
        version=VERSION,
    )
    return list(results)


def _merge_partial(
    mixed: Tensor,
    log_sum: Tensor,
    partial: Tensor | None,
    query: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    total: float,
    *form: Any,
) -> Tensor:
    given = [tensor for tensor in (mixed, log_sum, partial, query, gain) if tensor is not None]
    return _one_result("MergePartial", given, {"eps": eps, "scale": scale, "total": total})


def _one_result(name: str, inputs: Sequence[Tensor], attributes: dict[str, Any]) -> Tensor:
    """A call whose result is like its first input."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        inputs,
        attributes,
        dtype=inputs[0].dtype,
        shape=inputs[0].shape,
        version=VERSION,
    )


def name_calls(model: ir.Model, program: ExportedProgram) -> None:
    """Name the calls in ``model``, just made from ``program`` and so in its order, after their sites."""
    for call, node in zip(calls_of(program), _call_nodes(model), strict=True):
        node.name = call.name


def _call_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain.partition(".")[0] == DOMAIN]


def define(
    model: ir.Model, program: ExportedProgram, opset_version: int, sites: Literal["shared", "whole"] = "shared"
) -> None:
    """Turn the named calls in ``model``, made from ``program``, into calls of functions, and define these.

    Equal weights are one initializer after the exporter's optimisation, and all queries are equal before training.
    A site gets its own ones back, so that each can be found under its name, and changed alone.

    Args:
        model: The model, whose calls :func:`name_calls` has named.
        program: The program.
        opset_version: Of the standard operators.
        sites: As for ``export_onnx``.
    """
    calls, nodes = calls_of(program), {str(node.name): node for node in _call_nodes(model)}
    site_calls = [call for call in calls if call.node.target is not _ATTEND]
    placed = [_site(model, program, call, nodes[call.name], opset_version) for call in site_calls]
    forms = write_shared(placed) if sites == "shared" else [write_whole(site) for site in placed]
    # What sites no longer read.
    model.graph.remove([nodes[call.name] for call in calls if call.node.target is _ATTEND], safe=True)
    for form in forms:
        model.opset_imports[form.domain] = VERSION
        function = form.function()
        model.functions.setdefault(function.identifier(), function)
    # The domain of the calls before they had a form.
    model.opset_imports.pop(DOMAIN, None)


def _site(model: ir.Model, program: ExportedProgram, call: FunctionCall, node: ir.Node, opset_version: int) -> Site:
    names = (*call.queries, *call.gains, *call.gates)
    arguments: Any = call.node.args
    eps, scale = arguments[5:7] if call.node.target is _MERGE else arguments[3:5]
    source, form = require_tensor(sources_of(call.node)[0]), _form_of(call.node)
    settings = Settings(
        eps=eps,
        scale=scale,
        sum=form.sum,
        add=form.base != 0.0,
        gate=bool(call.gates),
        value_norm=form.value_norm,
        gain=bool(call.gains),
        rank=source.dim(),
        dtype=source.dtype,
        parameter_dtype=program.state_dict[names[0]].dtype,
        opset_version=opset_version,
    )
    parameters = tuple(_initializer(model, name, program.state_dict[name]) for name in names)
    return Site(node, tuple(_sources_in_model(call, node)), parameters, settings)


def _sources_in_model(call: FunctionCall, node: ir.Node) -> list[Any]:
    """The sources of the site that ``node`` was made from, in either schedule."""
    if call.node.target is not _MERGE:
        return list(node.inputs[: call.sources])
    mixed, _, partial, *_ = node.inputs
    partials = [] if call.node.args[2] is None else [partial]
    attend = mixed.producer() if mixed is not None else None
    assert attend is not None
    return [*attend.inputs[: call.sources - len(partials)], *partials]


def _initializer(model: ir.Model, name: str, value: Tensor) -> ir.Value:
    from onnxscript import ir

    initializers = model.graph.initializers
    if name not in initializers:
        tensor = ir.tensor(value.detach().cpu(), name=name)
        initializers.add(
            ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return initializers[name]
