"""What the functions that sites call in ONNX have in common.

ONNX has no functions of a variable number of inputs, and none that ask for the dtype of what they are given. So every
form that a model needs is a function of its own. All have the name of their operator, and each has a domain of its own:
ONNX tells functions of one name and domain apart by an overload, which many consumers do not know. Other ways to write
the bodies are in ``benchmarks/onnx_formulations.py``, and ``benchmarks/onnx.py`` compares them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from onnxscript import ir

DOMAIN = "attnres"
# The opset that brought it.
_RMS_NORMALIZATION = 23
ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What the arithmetic on tensors of ``dtypes`` is in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def names(letter: str, count: int) -> list[str]:
    """``count`` numbered names."""
    return [f"{letter}{i}" for i in range(count)]


class Body:
    """The lines of a function in ONNX's textual form."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def let(self, name: str, expression: str) -> str:
        """Give the value of ``expression`` a name, and return that."""
        self.lines.append(f"{name} = {expression}")
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """A constant."""
        return self.let(name, f"Constant <value_ints = [{', '.join(map(str, values))}]> ()")

    def given(self, attribute: str, like: str) -> str:
        """An attribute of the function, in the dtype of ``like``."""
        self.let(f"{attribute}_given", f"Constant <value_float: float = @{attribute}> ()")
        return self.let(f"{attribute}_wide", f"CastLike ({attribute}_given, {like})")

    def split(self, names: Sequence[str], value: str) -> None:
        """Equal parts of ``value`` along its last dimension."""
        self.let(", ".join(names), f"Split <axis = -1, num_outputs = {len(names)}> ({value})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form(abc.ABC):
    """What the body of a function depends on.

    Attributes:
        rank: Number of dimensions of a source.
        dtype: Of the sources.
        parameter_dtype: Of the queries and the gains.
        gain: Whether there are key gains.
        scaled: Whether the scale is another one than 1.
        sum: ``aggregation="sum"``.
        opset_version: Of the standard operators.
    """

    name: ClassVar[str]
    attributes: ClassVar[str]

    rank: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    gain: bool
    scaled: bool
    sum: bool
    opset_version: int

    @property
    @abc.abstractmethod
    def _kind(self) -> str:
        """The numbers of inputs, as the domain tells them."""

    @property
    @abc.abstractmethod
    def data(self) -> list[str]:
        """Names of the inputs before the parameters."""

    @property
    def parameters(self) -> list[str]:
        """Names of the queries, then of the gains, which are the last inputs."""
        return ["query", *(["gain"] if self.gain else [])]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["h"]

    @property
    @abc.abstractmethod
    def _description(self) -> str:
        """What the function computes."""

    @abc.abstractmethod
    def _write(self, body: Body) -> None:
        """Write the body."""

    @property
    def wide(self) -> torch.dtype:
        """What the arithmetic is in."""
        return wide_dtype(self.dtype, self.parameter_dtype)

    @property
    def domain(self) -> str:
        """The domain of the function, which tells this form from the others of one model."""
        differing = {
            f"rank_{self.rank}": self.rank != 3,
            _name(self.dtype): self.dtype != torch.float32,
            f"{_name(self.parameter_dtype)}_parameters": self.parameter_dtype != self.dtype,
            "sum": self.sum,
            "no_gain": not self.gain,
            "scaled": self.scaled,
        }
        names = (name for name, differs in differing.items() if differs)
        return f"{DOMAIN}.{'_'.join([self._kind, *names])}"

    def function(self) -> ir.Function:
        """The function in this form."""
        from onnx import parser
        from onnxscript import ir

        function = ir.serde.deserialize_function(parser.parse_function(self.text()))
        function.doc_string = f"{self._description}\n{_ARITHMETIC}"
        return function

    def text(self) -> str:
        """The function in ONNX's textual form."""
        body = Body()
        self._write(body)
        lines = "\n".join(f"    {line}" for line in body.lines)
        inputs, outputs = (", ".join(names) for names in ([*self.data, *self.parameters], self.outputs))
        return (
            f'<opset_import: ["" : {self.opset_version}], domain: "{self.domain}">\n'
            f"{self.name} <{self.attributes}> ({inputs}) => ({outputs}) {{\n{lines}\n}}"
        )

    def widened(self, body: Body, name: str, dtype: torch.dtype) -> str:
        """The input ``name``, of ``dtype``, in the dtype of the arithmetic."""
        if dtype == self.wide:
            return name
        return body.let(f"{name}_wide", f"Cast <to = {ONNX_TYPES[self.wide]}> ({name})")

    def finish(self, body: Body, step: str, factor: str | None) -> None:
        """Write the result of ``step``, times ``factor``, in the dtype of the sources."""
        steps = [step]
        if factor is not None:
            steps.append(f"Mul ({{}}, {factor})")
        if self.dtype != self.wide:
            steps.append(f"Cast <to = {ONNX_TYPES[self.dtype]}> ({{}})")
        value = ""
        for i, step in enumerate(steps, 1):
            value = body.let("h" if i == len(steps) else f"mean_{i}", step.format(value))

    @property
    def takes_ones(self) -> bool:
        """Whether norms are nodes, which have to multiply by something."""
        return self.opset_version >= _RMS_NORMALIZATION

    def logits(self, body: Body, v: str, columns: str) -> str:
        """``<w, k>`` of every row of ``v`` and every one of ``columns``, which are the products of query and gain."""
        if self.takes_ones:
            body.let("k", f"RMSNormalization <axis = -1, epsilon: float = @eps> ({v}, ones)")
            return body.let("logits_by_row", f"MatMul (k, {columns})")
        body.integers("axes", [-1])
        body.let("dots", f"MatMul ({v}, {columns})")
        return body.let("logits_by_row", f"Div (dots, {self.rms(body, v, 1)})")

    def stack(self, body: Body, sources: Sequence[str], name: str = "v") -> str:
        """``sources`` ``[..., D]`` as one ``[..., n, D]``."""
        side_by_side = body.let(f"{name}_side_by_side", f"Concat <axis = -1> ({', '.join(sources)})")
        shape = body.integers(f"{name}_shape", [*[0] * (self.rank - 1), len(sources), -1])
        return self.widened(body, body.let(name, f"Reshape ({side_by_side}, {shape})"), self.dtype)

    def weight(self, body: Body, query: str = "query", gain: str = "gain") -> str:
        """The query, or the rows that are queries, times gain and scale."""
        w = self.widened(body, query, self.parameter_dtype)
        if self.gain:
            w = body.let("w", f"Mul ({w}, {self.widened(body, gain, self.parameter_dtype)})")
        if self.scaled:
            w = body.let("w_scaled", f"Mul ({w}, {body.given('scale', w)})")
        return w

    def logit(self, body: Body, v: str, w: str, keepdims: int) -> str:
        """``<w, k>`` of every row; RMSNormalization, which multiplies by w on the way, came with opset 23."""
        body.integers("axes", [-1])
        if self.opset_version >= _RMS_NORMALIZATION:
            body.let("products", f"RMSNormalization <axis = -1, epsilon: float = @eps> ({v}, {w})")
            return body.let("logit", f"ReduceSum <keepdims = {keepdims}> (products, axes)")
        body.let("products", f"Mul ({v}, {w})")
        body.let("dot", f"ReduceSum <keepdims = {keepdims}> (products, axes)")
        return body.let("logit", f"Div (dot, {self.rms(body, v, keepdims)})")

    def rms(self, body: Body, v: str, keepdims: int) -> str:
        """Root of the mean square of every row."""
        body.let("squares", f"Mul ({v}, {v})")
        body.let("mean_square", f"ReduceMean <keepdims = {keepdims}> (squares, axes)")
        body.let("mean_square_eps", f"Add (mean_square, {body.given('eps', v)})")
        return body.let("rms", "Sqrt (mean_square_eps)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_ARITHMETIC = "The inner arithmetic is in float32, or in float64 for what is in float64."
