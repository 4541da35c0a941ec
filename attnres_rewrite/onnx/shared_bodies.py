"""The functions of sites that share the work on the complete blocks before them.

Three kinds of calls: ``ScaleQueries``, once for all sites of a stream, from constants alone, so that runtimes compute
it as they load; ``AttendBlocks``, once for each block, for all reads whose newest complete block that is; and
``BlockAttnRes``, a site, which adds the partial. What an ``AttendBlocks`` hands on to the next one are the logits that
the reads after it have on its blocks: a block is normalised once. The blocks themselves are inputs of each call, so
that a kernel in its place reads them where they are.
"""

from __future__ import annotations

import dataclasses

import torch

from attnres_rewrite.onnx.form import Body, Form, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleQueries(Form):
    """The queries of ``reads`` sites, times gains and scale, as the columns of one matrix."""

    name = "ScaleQueries"
    attributes = "scale"

    reads: int

    @property
    def _kind(self) -> str:
        return f"{self.reads}_queries"

    @property
    def data(self) -> list[str]:
        """Nothing."""
        return []

    @property
    def parameters(self) -> list[str]:
        """The queries, then the gains."""
        return names("query", self.reads) + (names("gain", self.reads) if self.gain else [])

    @property
    def outputs(self) -> list[str]:
        """The matrix, each of its columns, and a weight for norms that multiply by nothing."""
        return ["columns", *names("column", self.reads), *(["ones"] if self.takes_ones else [])]

    @property
    def _description(self) -> str:
        return _SCALE_QUERIES.format(reads=self.reads)

    def _write(self, body: Body) -> None:
        rows = body.integers("rows", [self.reads, -1])
        for name, parameters in (("query", self.parameters[: self.reads]), ("gain", self.parameters[self.reads :])):
            if parameters:
                body.let(f"{name}_by_{name}", f"Concat <axis = 0> ({', '.join(parameters)})")
        body.let("weights", f"Reshape ({self.weight(body, 'query_by_query', 'gain_by_gain')}, {rows})")
        body.let("columns", "Transpose <perm = [1, 0]> (weights)")
        body.split(names("column", self.reads), "columns")
        if self.takes_ones:
            body.let("one", "Constant <value_float = 1.0> ()")
            body.let("width", "Shape (query0)")
            body.let("ones_narrow", "Expand (one, width)")
            body.let("ones", "CastLike (ones_narrow, columns)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendBlocks(Form):
    """Phase one of ``reads`` sites, the last ``partials`` of which go on to merge a partial.

    Attributes:
        blocks: Number of complete blocks.
        new: How many of them, the last ones, the call before did not have.
        following: How many calls go on from this one.
    """

    name = "AttendBlocks"
    attributes = "eps, sizes, begin, end"

    blocks: int
    new: int
    reads: int
    partials: int
    following: int

    @property
    def first(self) -> bool:
        """Whether there is no call before."""
        return self.new == self.blocks

    @property
    def is_alone(self) -> bool:
        """Whether there is one block in all, which all reads then have for their mixed blocks."""
        return self.blocks == 1

    @property
    def _kind(self) -> str:
        differing = {
            f"of_{self.blocks}_blocks": self.blocks != 1,
            f"{self.new}_new": self.new != 1 and not self.first,
            f"{self.partials}_partials": self.partials != self.reads,
            "first": self.first,
            "last": self.following == 0,
            f"{self.following}_following": self.following > 1,
        }
        return "_".join([f"{self.reads}_reads", *(name for name, differs in differing.items() if differs)])

    @property
    def data(self) -> list[str]:
        """The logits that the call before handed on, all blocks, and what ``ScaleQueries`` gives."""
        before = [] if self.first else ["logits_before"]
        return [*before, *names("v", self.blocks), "columns", *(["ones"] if self.takes_ones else [])]

    @property
    def parameters(self) -> list[str]:
        """None: the queries are columns."""
        return []

    @property
    def outputs(self) -> list[str]:
        """The mixed of all reads, the log-sums of those with a partial, and the logits of each call that follows."""
        mixed = [] if self.is_alone else names("m", self.reads)
        return [*mixed, *self._log_sums[self.reads - self.partials :], *names("logits_", self.following)]

    @property
    def _log_sums(self) -> list[str]:
        return names("l", self.reads)

    @property
    def _description(self) -> str:
        return _PHASE + _ATTEND_BLOCKS.format(reads=self.reads)

    def _write(self, body: Body) -> None:
        body.integers("last", [-1])
        stack = "" if self.is_alone else self.stack(body, names("v", self.blocks))
        new = self._logits_of_new(body, stack)
        own = new if self.first else body.let("logits_all", f"Concat <axis = -1> (logits_before, {new})")
        if self.following:
            body.let("counts", "Constant <value_ints: ints = @sizes> ()")
            parts = ["logits_own", *names("logits_", self.following)]
            body.let(", ".join(parts), f"Split <axis = -2> ({own}, counts)")
            own = "logits_own"
        if self.partials:
            sums = f"Squeeze ({own}, last)" if self.is_alone else f"ReduceLogSumExp <keepdims = 0> ({own}, last)"
            _split(body, self._log_sums, "log_sums", sums)
        if not self.is_alone:
            body.let("alpha", f"Softmax <axis = -1> ({own})")
            body.let("mixed", f"MatMul (alpha, {stack})")
            # Side by side, so that the parts of the Split are [..., D] as they are.
            shape = body.integers("shape_of_reads", [*[0] * (self.rank - 1), -1])
            _split(body, names("m", self.reads), "reads_side_by_side", f"Reshape (mixed, {shape})")

    def _logits_of_new(self, body: Body, stack: str) -> str:
        """The logits ``[..., S, n]`` of the reads from here on, on the new blocks."""
        columns = "columns"
        if not self.first:
            for bound in ("begin", "end"):
                body.let(f"{bound}_of_reads", f"Constant <value_ints: ints = @{bound}> ()")
            columns = body.let("columns_of_reads", "Slice (columns, begin_of_reads, end_of_reads, last)")
        new = names("v", self.blocks)[-self.new :]
        if self.new == 1:
            v = self.widened(body, new[0], self.dtype)
            return body.let("logits_new", f"Unsqueeze ({self.logits(body, v, columns)}, last)")
        v = stack if self.first else self.stack(body, new, "new")
        swapped = [*range(self.rank - 1), self.rank, self.rank - 1]
        return body.let("logits_new", f"Transpose <perm = {swapped}> ({self.logits(body, v, columns)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergePartial(Form):
    """Phase two of a site, with the partial sum of its block or without one.

    Attributes:
        partial: Whether there is one.
        mixed_dtype: Of the blocks as mixed for the site.
    """

    name = "BlockAttnRes"
    attributes = "eps, total"

    partial: bool
    mixed_dtype: torch.dtype

    @property
    def _kind(self) -> str:
        kind = "partial" if self.partial else "no_partial"
        return kind if self.mixed_dtype == self.wide else f"{kind}_narrow"

    @property
    def data(self) -> list[str]:
        """Mixed; log-sum, partial, and what ``ScaleQueries`` gives."""
        given = ["m", "l", "p", "column", *(["ones"] if self.takes_ones else [])]
        return given if self.partial else given[:1]

    @property
    def parameters(self) -> list[str]:
        """None: the query is a column."""
        return []

    @property
    def _description(self) -> str:
        return _PHASE + (_MERGE_PARTIAL if self.partial else _MERGE_NOTHING)

    def _write(self, body: Body) -> None:
        m = self.widened(body, "m", self.mixed_dtype)
        total = body.given("total", m) if self.sum else None
        if not self.partial:
            self.finish(body, f"Identity ({m})", total)
            return
        p = self.widened(body, "p", self.dtype)
        body.let("excess", f"Sub ({self.logits(body, p, 'column')}, l)")
        body.let("a", "Sigmoid (excess)")
        body.let("difference", f"Sub ({p}, {m})")
        body.let("change", "Mul (difference, a)")
        self.finish(body, f"Add ({m}, change)", total)


def _split(body: Body, parts: list[str], name: str, expression: str) -> None:
    """Equal parts of the value of ``expression`` along its last dimension."""
    if len(parts) == 1:
        body.let(parts[0], expression)
    else:
        body.split(parts, body.let(name, expression))


_SCALE_QUERIES = """Block Attention Residuals (arXiv:2603.15031): the pseudo-queries of {reads} reads, times their gains
and the scale, as the columns of a matrix [D, {reads}] and one by one [D, 1]."""
_PHASE = "Block Attention Residuals in two phases (arXiv:2603.15031, section 4), the "
_ATTEND_BLOCKS = """first, of the {reads} reads whose newest complete block is the last of v, [..., D] each. Every
block has its logits in the first call that has it, for the reads in the columns [begin, end), which are all from here
on: k_i = v_i * rsqrt(mean(v_i^2) + eps), logit_si = <column_s, k_i>. Then, over all blocks,
m_s = sum_i softmax_i(logit_si) * v_i [..., D] and l_s = log sum_i exp(logit_si) [..., 1]. (Of one block, m_s is that
block.) The logits [..., S, n] of later reads go on to the next block; sizes are the numbers S, of these reads first."""
_MERGE_PARTIAL = """second: of the blocks as mixed for a read, m [..., D], their log-sum l [..., 1], and the
partial p [..., D] (of the read's own block; after the last block, that block), k = p * rsqrt(mean(p^2) + eps),
a = sigmoid(<column, k> - l), h = (m + a * (p - m)) * total; the column is the site's query, times gain and scale.
The total is 1, or the number of sources for aggregation "sum"."""
_MERGE_NOTHING = """second: of the first read of a block, which has no partial. h = m * total of the blocks as
mixed for it, m [..., D]. The total is 1, or the number of sources for aggregation "sum"."""
