"""The functions that sites call in ONNX: a class for each, an instance for each form that one has."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from attnres_rewrite.graph.nodes import require_tensor
from attnres_rewrite.onnx.form import Body, Form


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAttnRes(Form):
    """A site by itself, over ``sources`` sources."""

    name = "BlockAttnRes"
    attributes = "eps, scale, aggregation"

    sources: int

    @property
    def _kind(self) -> str:
        return f"{self.sources}_sources"

    @property
    def data(self) -> list[str]:
        """The sources."""
        return _names("v", self.sources)

    @property
    def _description(self) -> str:
        return _BLOCK_ATTN_RES.format(n=self.sources, last=self.sources - 1)

    def _write(self, body: Body) -> None:
        v = self.stack(body)
        logit = self.logit(body, v, self.weight(body), keepdims=0)
        body.let("alpha", f"Softmax <axis = -1> ({logit})")
        body.integers("before_last", [-2])
        body.let("row", "Unsqueeze (alpha, before_last)")
        body.let("mixed", f"MatMul (row, {v})")
        if self.sum:
            body.let("count_given", f"Constant <value_float = {float(self.sources)}> ()")
            body.let("count", "CastLike (count_given, mixed)")
        self.finish(body, "Squeeze (mixed, before_last)", "count" if self.sum else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendBlocks(Form):
    """Phase one of ``reads`` sites over the same ``blocks`` complete blocks."""

    name = "AttendBlocks"
    attributes = "eps, scale"

    blocks: int
    reads: int

    @property
    def _kind(self) -> str:
        return f"{self.blocks}_blocks_{self.reads}_reads"

    @property
    def data(self) -> list[str]:
        """The blocks."""
        return _names("v", self.blocks)

    @property
    def parameters(self) -> list[str]:
        """The queries of all reads, then their gains."""
        return _names("query", self.reads) + (_names("gain", self.reads) if self.gain else [])

    @property
    def outputs(self) -> list[str]:
        """The mixed of all reads, then their log-sums."""
        return _names("m", self.reads) + _names("l", self.reads)

    @property
    def _description(self) -> str:
        return _PHASE + _ATTEND_BLOCKS.format(n=self.blocks, last=self.blocks - 1, reads=self.reads)

    def _write(self, body: Body) -> None:
        mixed, log_sums = self.outputs[: self.reads], self.outputs[self.reads :]
        body.integers("last", [-1])
        v = self.stack(body)
        swapped = [*range(self.rank - 1), self.rank, self.rank - 1]
        logits = body.let("logits_of_reads", f"Transpose <perm = {swapped}> ({self._logits(body, v)})")
        body.let("log_sums", f"ReduceLogSumExp <keepdims = 0> ({logits}, last)")
        body.split(log_sums, "log_sums")
        body.let("alpha", f"Softmax <axis = -1> ({logits})")
        body.let("mixed", f"MatMul (alpha, {v})")
        narrow = "mixed" if self.dtype == self.wide else body.let("mixed_narrow", "CastLike (mixed, v0)")
        # Side by side, so that the parts of the Split are [..., D] as they are.
        shape = body.integers("shape_of_reads", [*[0] * (self.rank - 1), -1])
        body.split(mixed, body.let("mixed_side_by_side", f"Reshape ({narrow}, {shape})"))

    def _logits(self, body: Body, v: str) -> str:
        """Of every row of ``v`` ``[..., D]`` and every read: ``[..., S]``."""
        rows = body.integers("shape_of_queries", [self.reads, -1])
        for name, parameters in (("query", self.parameters[: self.reads]), ("gain", self.parameters[self.reads :])):
            if parameters:
                body.let(f"{name}_by_{name}", f"Concat <axis = 0> ({', '.join(parameters)})")
                body.let(f"{name}_rows", f"Reshape ({name}_by_{name}, {rows})")
        body.let("columns", f"Transpose <perm = [1, 0]> ({self.weight(body, 'query_rows', 'gain_rows')})")
        if self.opset_version >= 23:
            body.let("one", "Constant <value_float = 1.0> ()")
            body.let("width", "Shape (query0)")
            body.let("ones", "Expand (one, width)")
            body.let("ones_wide", f"CastLike (ones, {v})")
            body.let("k", f"RMSNormalization <axis = -1, epsilon: float = @eps> ({v}, ones_wide)")
            return body.let("logits", "MatMul (k, columns)")
        body.let("dots", f"MatMul ({v}, columns)")
        return body.let("logits", f"Div (dots, {self.rms(body, v, keepdims=1)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergePartial(Form):
    """Phase two of a site, with the partial sum of its block or without one."""

    name = "MergePartial"
    attributes = "eps, scale, total"

    partial: bool

    @property
    def _kind(self) -> str:
        return "partial" if self.partial else "no_partial"

    @property
    def data(self) -> list[str]:
        """Mixed, log-sum and partial."""
        return ["m", "l", *(["p"] if self.partial else [])]

    @property
    def _description(self) -> str:
        return _PHASE + (_MERGE_PARTIAL if self.partial else _MERGE_NOTHING)

    def _write(self, body: Body) -> None:
        if not self.partial and not self.sum:
            body.let("h", "Identity (m)")
            return
        m = self.widened(body, "m", self.dtype)
        total = body.given("total", m) if self.sum else None
        if not self.partial:
            self.finish(body, f"Identity ({m})", total)
            return
        p = self.widened(body, "p", self.dtype)
        logit = self.logit(body, p, self.weight(body), keepdims=1)
        body.let("excess", f"Sub ({logit}, l)")
        body.let("a", "Sigmoid (excess)")
        body.let("difference", f"Sub ({p}, {m})")
        body.let("change", "Mul (difference, a)")
        self.finish(body, f"Add ({m}, change)", total)


def block_attn_res(node: Node, opset_version: int) -> BlockAttnRes:
    """The form of the function that a ``block_attn_res`` node calls."""
    sources, query, gain, _, scale, is_sum = _arguments(node)
    return BlockAttnRes(
        sources=len(sources),
        sum=bool(is_sum),
        **_common(sources[0], query, gain is not None, scale, opset_version),
    )


def attend_blocks(node: Node, opset_version: int) -> AttendBlocks:
    """The form of the function that an ``attend_blocks`` node calls."""
    blocks, queries, gains, _, scale = _arguments(node)
    common = _common(blocks[0], queries[0], bool(gains), scale, opset_version)
    return AttendBlocks(blocks=len(blocks), reads=len(queries), sum=False, **common)


def merge_partial(node: Node, opset_version: int) -> MergePartial:
    """The form of the function that a ``merge_partial`` node calls."""
    mixed, _, partial, query, gain, _, scale, total = _arguments(node)
    common = _common(mixed, query, gain is not None, scale, opset_version)
    return MergePartial(partial=partial is not None, sum=bool(total != 1.0), **common)


def _arguments(node: Node) -> Any:
    return node.args


def _common(source: Node, query: Node, gain: bool, scale: Any, opset_version: int) -> dict[str, Any]:
    value = require_tensor(source)
    return {
        "rank": value.dim(),
        "dtype": value.dtype,
        "parameter_dtype": require_tensor(query).dtype,
        "gain": gain,
        "scaled": bool(scale != 1.0),
        "opset_version": opset_version,
    }


def _names(letter: str, count: int) -> list[str]:
    return [f"{letter}{i}" for i in range(count)]


_BLOCK_ATTN_RES = """Block Attention Residuals (arXiv:2603.15031) over {n} sources v0 ... v{last}, [..., D] each:
k_i = v_i * rsqrt(mean(v_i^2) + eps) * gain, alpha = softmax_i(scale * <query, k_i>), h = sum_i alpha_i * v_i
(times {n} if aggregation is "sum")."""
_PHASE = "Block Attention Residuals in two phases (arXiv:2603.15031, section 4), the "
_ATTEND_BLOCKS = """first: {reads} reads of {n} complete blocks v0 ... v{last}, [..., D] each.
k_si = v_i * rsqrt(mean(v_i^2) + eps) * gain_s, logit_si = scale * <query_s, k_si>,
m_s = sum_i softmax_i(logit_si) * v_i [..., D], l_s = log sum_i exp(logit_si) [..., 1]."""
_MERGE_PARTIAL = """second: of the blocks as mixed for a read, m [..., D], their log-sum l [..., 1], and the
partial p [..., D] (of the read's own block; after the last block, that block), k = p * rsqrt(mean(p^2) + eps) * gain,
a = sigmoid(scale * <query, k> - l), h = (m + a * (p - m)) * total.
The total is 1, or the number of sources for aggregation "sum"."""
_MERGE_NOTHING = """second: of the first read of a block, which has no partial. h = m * total of the blocks as
mixed for it, m [..., D]. The total is 1, or the number of sources for aggregation "sum"."""
