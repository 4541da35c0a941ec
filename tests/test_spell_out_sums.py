"""The pass that writes fused sums as sums: what it changes, what it leaves alone, and that the numbers stay."""

from collections.abc import Callable

import pytest
import torch
from models import WIDTH, embeddings
from torch import Tensor, nn

from attnres_rewrite.forms.graph_module import with_metadata
from attnres_rewrite.graph.nodes import op_name
from attnres_rewrite.passes import SpellOutSums

X, Y = embeddings(seed=1), embeddings(seed=2)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.v, self.w = (nn.Parameter(torch.rand(n, generator=generator) + 0.5) for n in (WIDTH, 2))
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(self, x, y)


def traced(function: Callable[..., Tensor]) -> torch.fx.GraphModule:
    module = torch.fx.symbolic_trace(Call(function))
    return with_metadata(module, (X, Y))


def spelt(module: torch.fx.GraphModule) -> set[str]:
    return {op_name(node) for node in module.graph.nodes if node.op in ("call_function", "call_method")}


PLAIN = {"add", "mul", "div", "mm", "bmm", "rsub", "select", "reshape", "view"}
FUSED = {
    "addcmul": lambda m, x, y: torch.addcmul(x, y, m.v, value=2.0),
    "addcdiv": lambda m, x, y: torch.addcdiv(x, y, m.v),
    "addmm": lambda m, x, y: torch.addmm(x.view(-1, WIDTH), y.view(-1, WIDTH), m.square, beta=0.5),
    "baddbmm": lambda m, x, y: x.baddbmm(y, y.transpose(1, 2) @ y, alpha=0.1),
    "lerp": lambda m, x, y: torch.lerp(x, y, m.v),
    "sum": lambda m, x, y: torch.stack([x, y, x]).sum(0),
    "mean": lambda m, x, y: torch.stack((x, y), dim=2).mean(2),
    "weighted sum": lambda m, x, y: (torch.stack([x, y], 1) * m.w[:, None, None]).sum(1),
    "tensordot": lambda m, x, y: torch.tensordot(m.w, torch.stack([x, y]), dims=1),
    "tensordot, lists": lambda m, x, y: torch.tensordot(m.w, torch.stack([x, y]), dims=([0], [0])),
    "einsum": lambda m, x, y: torch.einsum("n,nbtd->btd", m.w, torch.stack([x, y])),
    "einsum, turned": lambda m, x, y: torch.einsum("...n,n->...", torch.stack([x, y], -1), m.w),
    "matmul": lambda m, x, y: torch.stack([x, y], -1) @ m.w,
}
KEPT = {
    "a bias": lambda m, x, y: torch.addmm(m.v, x.view(-1, WIDTH), m.square),
    "a broadcast": lambda m, x, y: torch.addcmul(m.v, x, y),
    "lerp by a number": lambda m, x, y: torch.lerp(x, y, 0.5),
    "another dimension": lambda m, x, y: torch.stack([x, y]).sum(1),
    "all of them": lambda m, x, y: torch.stack([x, y]).sum(),
    "kept dimension": lambda m, x, y: torch.stack([x, y]).sum(0, keepdim=True),
    "attention": lambda m, x, y: (torch.stack([x, y]) * (x + y).mean((0, 1)).softmax(0)[:2].view(2, 1, 1, 1)).sum(0),
    "one weight a token": lambda m, x, y: (torch.stack([x, y]) * m.v[:9].view(9, 1)).sum(0),
    "a product over channels": lambda m, x, y: torch.stack([x, y]) @ m.v,
}


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_fused_sum_is_spelt_out(name: str) -> None:
    module = traced(FUSED[name])
    expected = module(X, Y)
    assert SpellOutSums()(module) == 1
    others = {"transpose", "matmul"} if name == "baddbmm" else {"getitem"} if name == "weighted sum" else set()
    assert spelt(module) <= PLAIN | others
    torch.testing.assert_close(module(X, Y), expected)
    assert all("val" in n.meta or "example_value" in n.meta for n in module.graph.nodes if n.op == "call_function")
    assert SpellOutSums()(module) == 0


@pytest.mark.parametrize("name", KEPT)
def test_anything_else_is_left_alone(name: str) -> None:
    module = traced(KEPT[name])
    before = list(module.graph.nodes)
    assert SpellOutSums()(module) == 0
    assert list(module.graph.nodes) == before
