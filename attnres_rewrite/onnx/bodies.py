"""The function that a site by itself calls in ONNX."""

from __future__ import annotations

import dataclasses

from attnres_rewrite.onnx.form import Body, Form, names


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
        return names("v", self.sources)

    @property
    def _description(self) -> str:
        return _BLOCK_ATTN_RES.format(n=self.sources, last=self.sources - 1)

    def _write(self, body: Body) -> None:
        v = self.stack(body, self.data)
        logit = self.logit(body, v, self.weight(body), keepdims=0)
        body.let("alpha", f"Softmax <axis = -1> ({logit})")
        body.integers("before_last", [-2])
        body.let("row", "Unsqueeze (alpha, before_last)")
        body.let("mixed", f"MatMul (row, {v})")
        if self.sum:
            body.let("count_given", f"Constant <value_float = {float(self.sources)}> ()")
            body.let("count", "CastLike (count_given, mixed)")
        self.finish(body, "Squeeze (mixed, before_last)", "count" if self.sum else None)


_BLOCK_ATTN_RES = """Block Attention Residuals (arXiv:2603.15031) over {n} sources v0 ... v{last}, [..., D] each:
k_i = v_i * rsqrt(mean(v_i^2) + eps) * gain, alpha = softmax_i(scale * <query, k_i>), h = sum_i alpha_i * v_i
(times {n} if aggregation is "sum")."""
