"""How a site is written in ONNX: one call of the model-local function ``attnres::BlockAttnRes``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from attnres_rewrite.graph import require_tensor

if TYPE_CHECKING:
    from onnxscript import ir

DOMAIN = "attnres"
NAME = "BlockAttnRes"
VERSION = 1
_ONNX_TYPES = {torch.float32: 1, torch.float64: 11}
OP = torch.ops.attnres.block_attn_res.default


@dataclasses.dataclass(frozen=True)
class SiteCall:
    """One site of a program, as its ONNX node shall tell it.

    Attributes:
        name: ``<owner>.attn_res.<i>``.
        query: Name of its pseudo-query among the program's parameters.
        gain: Name of its key gain, if it has one.
        sources: Number of sources.
    """

    name: str
    query: str
    gain: str | None
    sources: int

    @property
    def owner(self) -> str:
        """Path of the module that holds the stream; empty for the model itself."""
        return self.name.rpartition("attn_res.")[0].removesuffix(".")


def sites_of(program: ExportedProgram) -> list[SiteCall]:
    """The sites of ``program`` in the order of its nodes; empty if it was not rewritten."""
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    sites = []
    for node in program.graph.nodes:
        if node.target is OP:
            sources, query, gain = node.args[:3]
            name = str(names[query.name])
            key_gain = None if gain is None else str(names[gain.name])
            sites.append(SiteCall(name.removesuffix(".query"), name, key_gain, len(sources)))
    return sites


def dtypes_of(program: ExportedProgram) -> set[torch.dtype]:
    """The dtypes of the sources of the sites of ``program``."""
    first: list[Any] = [node.args[0] for node in _op_nodes(program)]
    return {require_tensor(sources[0]).dtype for sources in first}


def with_calls(program: ExportedProgram) -> ExportedProgram:
    """``program`` with every ``block_attn_res`` node replaced by one that exports as a call of the function."""
    lowered: ExportedProgram = program.run_decompositions({OP: _call})
    return lowered


def _call(sources: Sequence[Tensor], query: Tensor, gain: Tensor | None, eps: float, scale: float, sum: bool) -> Tensor:
    parameters = [query] if gain is None else [query, gain]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        [*sources, *parameters],
        {"eps": eps, "scale": scale, "aggregation": "sum" if sum else "mean"},
        dtype=sources[0].dtype,
        shape=sources[0].shape,
        version=VERSION,
    )


def name_calls(model: ir.Model, program: ExportedProgram) -> None:
    """Name the calls in ``model``, just made from ``program`` and so in its order, after their sites."""
    for site, call in zip(sites_of(program), _calls(model), strict=True):
        call.name = site.name


def _calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]


def define(model: ir.Model, program: ExportedProgram, opset_version: int) -> None:
    """Give the named calls in ``model``, made from ``program``, their parameters and the functions that they call.

    Equal weights are one initializer after the exporter's optimisation, and all queries are equal before training.
    A site gets its own ones back, so that each can be found under its name, and changed alone.
    """
    calls = {str(call.name): call for call in _calls(model)}
    for site, node in zip(sites_of(program), _op_nodes(program), strict=True):
        call = calls[site.name]
        names = [site.query] if site.gain is None else [site.query, site.gain]
        for position, name in enumerate(names, site.sources):
            call.replace_input_with(position, _initializer(model, name, program.state_dict[name]))
        form = _Form.of(node, opset_version)
        call.overload = form.overload
        function = form.function()
        model.functions.setdefault(function.identifier(), function)


def _op_nodes(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.target is OP]


def _initializer(model: ir.Model, name: str, value: Tensor) -> ir.Value:
    from onnxscript import ir

    initializers = model.graph.initializers
    if name not in initializers:
        tensor = ir.tensor(value.detach().cpu(), name=name)
        initializers.add(
            ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return initializers[name]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What the body of the function depends on: ONNX has no functions of a variable number of inputs.

    Attributes:
        sources: Number of sources n.
        rank: Number of dimensions of a source.
        dtype: Of the sources.
        parameter_dtype: Of the query and the gain.
        gain: Whether there is a key gain.
        sum: ``aggregation="sum"``.
        scaled: Whether the scale is another one than 1.
        opset_version: Of the standard operators.
    """

    sources: int
    rank: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    gain: bool
    sum: bool
    scaled: bool
    opset_version: int

    @property
    def wide(self) -> torch.dtype:
        """What the arithmetic is in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @classmethod
    def of(cls, node: Node, opset_version: int) -> _Form:
        sources: Any
        sources, query, gain, _, scale, sum = node.args
        value = require_tensor(sources[0])
        return cls(
            sources=len(sources),
            rank=value.dim(),
            dtype=value.dtype,
            parameter_dtype=require_tensor(query).dtype,
            gain=gain is not None,
            sum=bool(sum),
            scaled=bool(scale != 1.0),
            opset_version=opset_version,
        )

    @property
    def overload(self) -> str:
        """What tells this form from the others of one model."""
        parts = [f"{self.sources}_sources", *([f"rank_{self.rank}"] if self.rank != 3 else [])]
        differing = {
            _name(self.dtype): self.dtype != torch.float32,
            f"{_name(self.parameter_dtype)}_parameters": self.parameter_dtype != self.dtype,
            "sum": self.sum,
            "no_gain": not self.gain,
            "scaled": self.scaled,
        }
        return "_".join([*parts, *(name for name, differs in differing.items() if differs)])

    def function(self) -> ir.Function:
        from onnx import parser
        from onnxscript import ir

        function = ir.serde.deserialize_function(parser.parse_function(self._text()))
        function.doc_string = _DESCRIPTION.format(n=self.sources, last=self.sources - 1)
        return function

    def _text(self) -> str:
        """The function in ONNX's textual form; ``benchmarks/onnx.py`` compares it with other ways to write it."""
        n = self.sources
        sources = [f"v{i}" for i in range(n)]
        inputs = [*sources, "query", *(["gain"] if self.gain else [])]
        shape = ", ".join(["0"] * (self.rank - 1))
        lines = [
            f"side_by_side = Concat <axis = -1> ({', '.join(sources)})",
            f"shape = Constant <value_ints = [{shape}, {n}, -1]> ()",
            "stacked = Reshape (side_by_side, shape)",
        ]

        def widened(name: str, value: str, dtype: torch.dtype) -> str:
            if dtype == self.wide:
                return value
            lines.append(f"{name} = Cast <to = {_ONNX_TYPES[self.wide]}> ({value})")
            return name

        v = widened("v", "stacked", self.dtype)
        w = widened("query_wide", "query", self.parameter_dtype)
        if self.gain:
            lines.append(f"w = Mul ({w}, {widened('gain_wide', 'gain', self.parameter_dtype)})")
            w = "w"
        if self.scaled:
            lines.append("scale_given = Constant <value_float: float = @scale> ()")
            lines.append(f"factor = CastLike (scale_given, {w})")
            lines.append(f"w_scaled = Mul ({w}, factor)")
            w = "w_scaled"
        lines += [
            "last = Constant <value_ints = [-1]> ()",
            *self._logits(v, w),
            "alpha = Softmax <axis = -1> (logits)",
            "before_last = Constant <value_ints = [-2]> ()",
            "row = Unsqueeze (alpha, before_last)",
            f"mixed = MatMul (row, {v})",
        ]
        steps = ["Squeeze (mixed, before_last)"]
        if self.sum:
            lines.append(f"count_given = Constant <value_float = {float(n)}> ()")
            lines.append("count = CastLike (count_given, mixed)")
            steps.append("Mul ({}, count)")
        if self.dtype != self.wide:
            steps.append("CastLike ({}, v0)")
        results = [*(f"mean{i}" for i in range(len(steps) - 1)), "h"]
        for i, (name, step) in enumerate(zip(results, steps, strict=True)):
            lines.append(f"{name} = {step.format(results[i - 1])}")
        body = "\n".join(f"    {line}" for line in lines)
        return (
            f'<opset_import: ["" : {self.opset_version}], domain: "{DOMAIN}", overload: "{self.overload}">\n'
            f"{NAME} <eps, scale, aggregation> ({', '.join(inputs)}) => (h) {{\n{body}\n}}"
        )

    def _logits(self, v: str, w: str) -> list[str]:
        """``<w, k_i>`` of the sources; RMSNormalization, which multiplies by w on the way, came with opset 23."""
        if self.opset_version >= 23:
            return [
                f"products = RMSNormalization <axis = -1, epsilon: float = @eps> ({v}, {w})",
                "logits = ReduceSum <keepdims = 0> (products, last)",
            ]
        return [
            "eps_given = Constant <value_float: float = @eps> ()",
            f"eps_wide = CastLike (eps_given, {w})",
            f"squares = Mul ({v}, {v})",
            "mean_square = ReduceMean <keepdims = 0> (squares, last)",
            "mean_square_eps = Add (mean_square, eps_wide)",
            "rms = Sqrt (mean_square_eps)",
            f"products = Mul ({v}, {w})",
            "dot = ReduceSum <keepdims = 0> (products, last)",
            "logits = Div (dot, rms)",
        ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DESCRIPTION = """Block Attention Residuals (arXiv:2603.15031) over {n} sources v0 ... v{last}, [..., D] each:
k_i = v_i * rsqrt(mean(v_i^2) + eps) * gain, alpha = softmax_i(scale * <query, k_i>), h = sum_i alpha_i * v_i
(times {n} if aggregation is "sum"). The inner arithmetic is in float32, or in float64 for float64 sources."""
