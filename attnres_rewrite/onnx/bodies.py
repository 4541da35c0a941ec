"""The function that a site by itself calls in ONNX."""

from __future__ import annotations

import dataclasses

from attnres_rewrite.onnx.form import Body, Form, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAttnRes(Form):
    """A site by itself, over ``sources`` sources.

    Attributes:
        sources: Their number.
        add: ``aggregation="add"``.
        gate: Whether there is a gate, the last input.
        value_norm: Whether the sources are normalised as they are mixed.
    """

    name = "BlockAttnRes"
    attributes = "eps, scale, aggregation"

    sources: int
    add: bool = False
    gate: bool = False
    value_norm: bool = False

    @property
    def _kind(self) -> str:
        differing = {"add": self.add, "gate": self.gate, "value_norm": self.value_norm}
        return "_".join([f"{self.sources}_sources", *(name for name, differs in differing.items() if differs)])

    @property
    def data(self) -> list[str]:
        """The sources."""
        return names("v", self.sources)

    @property
    def parameters(self) -> list[str]:
        """Query, gain and gate."""
        return [*super().parameters, *(["gate"] if self.gate else [])]

    @property
    def _is_papers(self) -> bool:
        return not (self.add or self.gate or self.value_norm)

    @property
    def _description(self) -> str:
        text = _BLOCK_ATTN_RES.format(n=self.sources, last=self.sources - 1)
        return text if self._is_papers else text + _OTHER_FORMS

    def _write(self, body: Body) -> None:
        v = self.stack(body, self.data)
        logit = self.logit(body, v, self.weight(body), keepdims=0)
        body.let("alpha", f"Softmax <axis = -1> ({logit})")
        body.integers("before_last", [-2])
        factors = "alpha" if self._is_papers else self._coefficients(body, v)
        body.let("row", f"Unsqueeze ({factors}, before_last)")
        body.let("mixed", f"MatMul (row, {v})")
        counts = self.sum and self._is_papers
        if counts:
            self._number(body, "count", self.sources, "mixed")
        self.finish(body, "Squeeze (mixed, before_last)", "count" if counts else None)

    def _coefficients(self, body: Body, v: str) -> str:
        """What every source is multiplied by, ``[..., n]``, from ``alpha``."""
        found = "alpha"
        if self.sum:
            found = body.let("alpha_total", f"Mul (alpha, {self._number(body, 'count', self.sources, 'alpha')})")
        if self.value_norm:
            # The logits have it at hand before opset 23.
            rms = self.rms(body, v, 0) if self.takes_ones else "rms"
            found = body.let("alpha_normed", f"Div ({found}, {rms})")
        if self.add:
            found = body.let("added", f"Add ({found}, {self._number(body, 'base', 1, 'alpha')})")
        if self.gate:
            one = self._number(body, "one", 1, "alpha")
            body.let("differing", f"Sub ({found}, {one})")
            body.let("gated", f"Mul (differing, {self.widened(body, 'gate', self.parameter_dtype)})")
            found = body.let("factors", f"Add (gated, {one})")
        return found

    @staticmethod
    def _number(body: Body, name: str, value: float, like: str) -> str:
        body.let(f"{name}_given", f"Constant <value_float = {float(value)}> ()")
        return body.let(name, f"CastLike ({name}_given, {like})")


_BLOCK_ATTN_RES = """Block Attention Residuals (arXiv:2603.15031) over {n} sources v0 ... v{last}, [..., D] each:
k_i = v_i * rsqrt(mean(v_i^2) + eps) * gain, alpha = softmax_i(scale * <query, k_i>), h = sum_i alpha_i * v_i
(times {n} if aggregation is "sum")."""
_OTHER_FORMS = """
With value_norm, alpha_i is divided by the root mean square of v_i; with aggregation "add", 1 is added to it; and with a
gate c it becomes 1 + c * (alpha_i - 1)."""
