"""Triton kernels that a model launches itself: what they write is followed as what any other operation writes.

Dynamo captures a launch as an operator of its own, and PyTorch reads from the kernel's code which tensors it writes
into. Where Triton is installed, models with launches are analysed; nothing is run, so no GPU is needed.
"""

import importlib.util
import types

import pytest
import torch
from models import WIDTH, Feed, embeddings, prepared
from torch import Tensor, nn
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

import attnres_rewrite as ar
from attnres_rewrite.graph.memory import overwritten_by, writers_of

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def halve(x, out, n, SIZE: tl.constexpr):
        i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        tl.store(out + i, tl.load(x + i, mask=i < n) * 0.5, mask=i < n)


def halved(x: Tensor) -> Tensor:
    """In memory of its own."""
    out = torch.empty_like(x)
    halve[(x.numel() // 64,)](x, out, x.numel(), SIZE=64)
    return out


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(halved(x))


class OnTheStream(Inside):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.feed(x)
        halve[(x.numel() // 64,)](x, x, x.numel(), SIZE=64)
        return x


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo captures launches where there is a GPU only, and Triton wants to know which."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    active = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", active)


@needs_triton
def test_a_kernel_in_a_branch_computes_from_what_it_reads(as_if_on_a_gpu: None) -> None:
    (stream,) = ar.explain(prepared(Model(Inside)), 2, example_inputs=embeddings()).streams
    assert stream.sources == (2, 2, 3, 3)


@needs_triton
def test_a_kernel_that_overwrites_the_stream_is_refused(as_if_on_a_gpu: None) -> None:
    with pytest.raises(ar.UnsupportedResidualError, match="overwritten in place"):
        ar.rewrite(prepared(Model(OnTheStream)), 2, example_inputs=embeddings())


def test_a_kernel_that_cannot_be_read_writes_into_all_it_is_given() -> None:
    """Without Triton no kernel can be; what is no tensor is not written."""
    graph = Graph()
    x, out = graph.placeholder("x"), graph.placeholder("out")
    for node in (x, out):
        with FakeTensorMode():
            node.meta["example_value"] = torch.empty(2, 8)
    launch = {
        "kernel_idx": kernel_side_table.add_kernel(object()),
        "constant_args_idx": kernel_side_table.add_constant_args({"SIZE": 16}),
        "grid": [(1, 1, 1)],
        "tma_descriptor_metadata": {},
        "kwargs": {"x": x, "out": out, "n": 16},
    }
    node = graph.call_function(triton_kernel_wrapper_mutation, (), launch)
    assert overwritten_by(node) == (x, out)
    assert writers_of(graph) == {x: [node], out: [node]}
