"""Phase one as one function for all numbers of blocks: the numbers of ``attend_blocks``, with a compiler or without."""

import itertools
import logging
import operator

import pytest
import torch
from models import relative_error
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attnres_rewrite import _compat
from attnres_rewrite.forms.saved_activations import recompute_results
from attnres_rewrite.forms.summed_gradients import sum_in_phase_one
from attnres_rewrite.ops import attend_blocks_cpp, attend_blocks_native

ATTEND = torch.ops.attnres.attend_blocks
NATIVE = torch.ops.attnres.attend_blocks_native
FORWARD = torch.ops.attnres.attend_blocks_native_forward
BACKWARD = torch.ops.attnres.attend_blocks_native_backward
SETTINGS = 1e-6, 0.7
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def given(
    blocks: int, reads: int, *, gains: bool = True, dtype: torch.dtype = torch.float64, width: int = 33
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(blocks + 10 * reads)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    vectors = [[random(width) for _ in range(reads)] for _ in range(2 if gains else 1)]
    return [random(3, 7, width) for _ in range(blocks)], vectors[0], vectors[1] if gains else []


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    def fail(source: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_compat, "compile_cpp", fail)
    attend_blocks_cpp._library.cache_clear()
    yield
    attend_blocks_cpp._library.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("blocks", "reads", "gains"), [(1, 3, True), (5, 2, True), (4, 1, False)])
def test_numbers_of_attend_blocks(threads: int, dtype: torch.dtype, blocks: int, reads: int, gains: bool) -> None:
    tensors = given(blocks, reads, gains=gains, dtype=dtype)
    # Without it, the operator would be compared with itself.
    assert attend_blocks_cpp.library(dtype) is not None
    found = []
    for op in (ATTEND, NATIVE):
        results = op(*tensors, *SETTINGS)
        grads = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r) for r in results]
        found.append([*results, *torch.autograd.grad(results, list(itertools.chain(*tensors)), grads)])
    for expected, own in zip(*found, strict=True):
        assert own.dtype == expected.dtype
        assert relative_error(own.double(), expected.double()) < TOLERANCES[dtype]


def test_no_gradients_of_what_none_are_asked_for() -> None:
    blocks, queries, gains = given(3, 2)
    blocks[1].requires_grad_(False)
    queries[0].requires_grad_(False)
    asked = [blocks[0], blocks[2], queries[1], *gains]
    found = [
        torch.autograd.grad(sum(r.sum() for r in op(blocks, queries, gains, *SETTINGS)), asked)
        for op in (ATTEND, NATIVE)
    ]
    for expected, own in zip(*found, strict=True):
        assert relative_error(own, expected) < 1e-13


def test_the_backward_adds_what_it_is_given() -> None:
    blocks, queries, gains = given(3, 2)
    grads = [torch.randn_like(r) for r in NATIVE(blocks, queries, gains, *SETTINGS)]
    wanted = [True, False, True] + [True] * 4
    with torch.no_grad():
        alone = BACKWARD(grads, blocks, queries, gains, *SETTINGS, wanted, [], [False] * 3)
        more = torch.randn_like(blocks[2])
        summed = BACKWARD(grads, blocks, queries, gains, *SETTINGS, wanted, [more], [False, False, True])
        with pytest.raises(ValueError, match="0 tensors to add for 1 blocks"):
            BACKWARD(grads, blocks, queries, gains, *SETTINGS, wanted, [], [True, False, False])
    assert len(summed) == len(alone) == 6
    assert torch.equal(summed[0], alone[0])
    assert relative_error(summed[1], alone[1] + more) < 1e-13


def test_blocks_that_are_not_contiguous() -> None:
    blocks, queries, gains = given(2, 2)
    turned = [block.detach().transpose(0, 1) for block in blocks]
    for own, expected in zip(
        NATIVE(turned, queries, gains, *SETTINGS), ATTEND(turned, queries, gains, *SETTINGS), strict=True
    ):
        assert relative_error(own, expected) < 1e-13


def test_what_torch_asks_of_an_operator() -> None:
    tensors = given(2, 2)
    torch.library.opcheck(NATIVE.default, (*tensors, *SETTINGS))
    torch.library.opcheck(FORWARD.default, (*[[t.detach() for t in part] for part in tensors], *SETTINGS))


def test_autograd_is_done_when_inductor_calls() -> None:
    """A compiled graph does not go through it, in Python, at every call."""
    from torch._inductor.decomposition import select_decomp_table

    tensors = [[t.detach() for t in part] for part in given(2, 2)]
    traced = make_fx(lambda *t: NATIVE(*t, *SETTINGS), decomposition_table=select_decomp_table())(*tensors)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert FORWARD.default in called
    assert NATIVE.default not in called
    assert all(map(torch.equal, traced(*tensors), NATIVE(*tensors, *SETTINGS)))
    # One kernel makes all results, so that the backward computes all of them again or none.
    recompute_results(traced.graph)
    (call,) = traced.graph.find_nodes(op="call_function", target=FORWARD.default)
    assert len(call.users) == 4
    assert all(node.meta.get("recompute") for node in (call, *call.users))


def test_what_is_no_tensor_is_an_error() -> None:
    functions = attend_blocks_cpp.library(torch.float32)
    vectors = [torch.ones(8)], []
    with pytest.raises(RuntimeError, match="tensor"):
        functions.attend_lists(["a block"], *vectors, [torch.ones(2, 8)], [torch.ones(2)], 2, 8, 1, *SETTINGS)


def test_without_a_compiler(no_compiler, caplog) -> None:
    tensors = given(3, 2)
    assert attend_blocks_native.takes([torch.ones(2, dtype=torch.int64)]) is False
    with caplog.at_level(logging.WARNING, logger="attnres_rewrite"):
        assert not attend_blocks_native.takes(tensors[0])
    assert "no compiler" in caplog.text
    expected = ATTEND(*tensors, *SETTINGS)
    assert all(map(torch.equal, NATIVE(*tensors, *SETTINGS), expected))
    with torch.no_grad():
        more = torch.randn_like(tensors[0][1])
        call = (expected, *tensors, *SETTINGS, [True] * 7)
        alone, summed = (BACKWARD(*call, *added) for added in (([], [False] * 3), ([more], [False, True, False])))
    assert torch.equal(summed[1], alone[1] + more)
    assert torch.equal(summed[3], alone[3])


def test_blocks_of_two_dtypes() -> None:
    blocks, queries, gains = given(2, 2)
    blocks[1] = blocks[1].detach().float()
    assert not attend_blocks_native.takes(blocks)
    own, expected = (op(blocks, queries, gains, *SETTINGS) for op in (NATIVE, ATTEND))
    assert all(map(torch.equal, own, expected))


def test_nothing_stands_for_a_partial() -> None:
    """It changes no number, and wants a gradient where a partial does, which it drops."""
    mixed, partial, query = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    zeros, infinite = torch.ops.attnres.no_partial(partial.detach(), query)
    assert zeros.requires_grad
    assert infinite.requires_grad
    merge = torch.ops.attnres.merge_partial
    read = merge(mixed, infinite, zeros, query, None, 1e-6, 1.0, 1.0)
    assert torch.equal(read, mixed)
    grad = torch.randn_like(read)
    on_mixed, on_query = torch.autograd.grad(read, [mixed, query], grad, materialize_grads=True)
    assert torch.equal(on_mixed, grad)
    assert not on_query.any()


def joint_graph(terms: int, *, read_elsewhere: bool = False) -> fx.GraphModule:
    """The backwards of ``terms`` groups of reads over two blocks, of which the gradients of the first are summed."""
    graph, mode = fx.Graph(), FakeTensorMode()
    value = mode.from_tensor(torch.ones(2, 3, 8))
    blocks = [graph.placeholder(name) for name in ("a", "b")]
    query, grads = graph.placeholder("w"), [graph.placeholder(f"g{i}") for i in range(2)]
    total, others = None, []
    for _ in range(terms):
        arguments = (grads, blocks, [query], [], *SETTINGS, [True, True, True], [], [False, False])
        call = graph.call_function(BACKWARD.default, arguments)
        # What Inductor cuts the arguments of the call to.
        call.meta["eager_input_vals"] = (arguments, {})
        first, second = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
        others.append(second)
        first.meta["val"] = second.meta["val"] = value
        total_before, total = total, first
        if total_before is not None:
            total = graph.call_function(torch.ops.aten.add.Tensor, (total_before, first))
            total.meta["val"] = value
        if read_elsewhere:
            others.append(first)
    graph.output((total, *others))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("terms", "read_elsewhere", "folded"), [(1, False, 0), (3, False, 2), (3, True, 0)])
def test_sums_of_gradients_are_folded(terms: int, read_elsewhere: bool, folded: int) -> None:
    module = joint_graph(terms, read_elsewhere=read_elsewhere)
    inputs = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 8), torch.randn(2, 3, 1)]
    expected = module(*inputs)
    assert sum_in_phase_one(module.graph) == folded
    module.graph.lint()
    module.recompile()
    adds = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert len(adds) == terms - 1 - folded
    for call in module.graph.find_nodes(op="call_function", target=BACKWARD.default):
        assert ("eager_input_vals" in call.meta) == (call.args[7] == [])
    for own, other in zip(module(*inputs), expected, strict=True):
        assert relative_error(own, other) < 1e-6


def test_only_the_gradient_of_a_block_is_added_to() -> None:
    """That of a query is not, and neither is a sum that is there only later."""
    module = joint_graph(2)
    first, second = module.graph.find_nodes(op="call_function", target=BACKWARD.default)
    (add,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    add.args = (add.args[1], add.args[0])
    for item in list(second.users):
        item.args = (second, item.args[1] + 1)
    third = next(item for item in second.users if item.args[1] == 1)
    assert add.args[0] is third
    assert sum_in_phase_one(module.graph) == 1
    assert (first.args[7], second.args[8]) == ([], [False, True])
    module = joint_graph(2)
    _, second = module.graph.find_nodes(op="call_function", target=BACKWARD.default)
    for item in list(second.users):
        item.args = (second, 2)
    assert sum_in_phase_one(module.graph) == 0
