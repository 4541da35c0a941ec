"""The operator against the paper's listing in float64, its gradients, and what torch does with it."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_rewrite import _compat
from attnres_rewrite.ops import block_attn_res as op_module
from attnres_rewrite.ops import depth_weights

EPS, SCALE = 1e-6, 0.7
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def no_compile_caches() -> Iterator[None]:
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def block_attn_res(sources: list[Tensor], query: Tensor, gain: Tensor | None = None, sum: bool = False) -> Tensor:
    return torch.ops.attnres.block_attn_res(sources, query, gain, EPS, SCALE, sum)


def listing(sources: list[Tensor], query: Tensor, gain: Tensor | None = None, sum: bool = False) -> Tensor:
    """The equation as the paper writes it: stack, normalise, two einsums."""
    values = torch.stack(sources)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
    keys = keys if gain is None else keys * gain
    alpha = torch.softmax(SCALE * torch.einsum("d,n...d->n...", query, keys), 0)
    return torch.einsum("n...,n...d->...d", alpha, values) * (len(sources) if sum else 1)


def make_inputs(
    n: int,
    shape: tuple[int, ...] = (2, 3, 8),
    *,
    with_gain: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    def make(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(device, dtype).requires_grad_()

    return [make(*shape) for _ in range(n)], make(shape[-1]), make(shape[-1]) if with_gain else None


def leaves_of(sources: list[Tensor], query: Tensor, gain: Tensor | None) -> list[Tensor]:
    return [*sources, query, *(() if gain is None else (gain,))]


def grads_of(form: Callable[..., Tensor], sources: list[Tensor], query: Tensor, gain: Tensor | None, sum: bool):
    out = form(sources, query, gain, sum)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return torch.autograd.grad(out, leaves_of(sources, query, gain), d_out)


every_form = pytest.mark.parametrize(
    ("n", "with_gain", "sum"), [(n, gain, sum) for n in (1, 2, 9) for gain in (False, True) for sum in (False, True)]
)


@every_form
def test_equals_the_listing_in_float64(n: int, with_gain: bool, sum: bool, device: str) -> None:
    inputs = make_inputs(n, with_gain=with_gain, device=device)
    torch.testing.assert_close(block_attn_res(*inputs, sum), listing(*inputs, sum), rtol=1e-12, atol=1e-12)


@every_form
def test_gradients_equal_those_of_the_listing(n: int, with_gain: bool, sum: bool, device: str) -> None:
    inputs = make_inputs(n, with_gain=with_gain, device=device)
    for found, expected in zip(grads_of(block_attn_res, *inputs, sum), grads_of(listing, *inputs, sum), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@every_form
def test_gradcheck(n: int, with_gain: bool, sum: bool, device: str) -> None:
    sources, query, gain = make_inputs(n, (2, 3), with_gain=with_gain, device=device)

    def form(query: Tensor, *rest: Tensor) -> Tensor:
        return block_attn_res(list(rest[:n]), query, rest[n] if with_gain else None, sum)

    leaves = leaves_of(sources, query, gain)
    assert torch.autograd.gradcheck(form, (query, *sources, *leaves[n + 1 :]), fast_mode=True)
    if n == 2:
        assert torch.autograd.gradgradcheck(form, (query, *sources, *leaves[n + 1 :]))


def test_float32_is_within_rounding_of_float64(device: str) -> None:
    sources, query, gain = make_inputs(9, (4, 16, 256), device=device, dtype=torch.float32)
    exact = listing([s.double() for s in sources], query.double(), gain.double())
    error = (block_attn_res(sources, query, gain).double() - exact).norm() / exact.norm()
    assert error < 1e-6
    torch.testing.assert_close(block_attn_res(sources, query, gain).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sum", [False, True])
def test_low_precision_error_is_at_most_twice_that_of_the_plain_sum(dtype: torch.dtype, sum: bool, device: str) -> None:
    sources, query, gain = make_inputs(9, (4, 16, 256), device=device, dtype=dtype)
    plain = sources[0]
    for source in sources[1:]:
        plain = plain + source
    exact_sources = [source.double() for source in sources]
    exact_plain, exact = torch.stack(exact_sources).sum(0), listing(exact_sources, query.double(), gain.double(), sum)
    out = block_attn_res(sources, query, gain, sum)
    assert out.dtype == dtype
    error_of_plain = (plain.double() - exact_plain).norm() / exact_plain.norm()
    assert (out.double() - exact).norm() / exact.norm() <= 2 * error_of_plain


def test_zero_query_and_sum_is_the_plain_sum(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for n in (2, 3, 7, 9):
            sources, _, gain = make_inputs(n, (4, 16, 32), device=device, dtype=dtype)
            plain = sources[0]
            for source in sources[1:]:
                plain = plain + source
            assert torch.equal(block_attn_res(sources, gain.new_zeros(32), gain, True), plain)


def test_dtypes_promote_and_any_float64_input_makes_the_arithmetic_float64(device: str) -> None:
    sources, query, gain = make_inputs(3, device=device, dtype=torch.bfloat16)
    exact = listing([s.double() for s in sources], query.double(), gain.double())
    assert torch.equal(block_attn_res(sources, query.double(), gain), exact.to(torch.bfloat16))
    mixed = [sources[0], sources[1].float(), sources[2]]
    assert block_attn_res(mixed, query, gain).dtype == torch.float32
    grads = torch.autograd.grad(block_attn_res(mixed, query, gain).sum(), [*sources, query, gain])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 5


def test_autocast_leaves_the_operator_alone(device: str) -> None:
    sources, query, gain = make_inputs(3, (2, 3, 64), device=device, dtype=torch.float32)
    mixed = [sources[0], sources[1].bfloat16(), sources[2]]
    expected = block_attn_res(mixed, query, gain)
    expected_grads = torch.autograd.grad(expected.sum(), [*sources, query, gain])
    with torch.autocast(device, dtype=torch.bfloat16):
        out = block_attn_res(mixed, query, gain)
        grads = torch.autograd.grad(out.sum(), [*sources, query, gain])
    assert out.dtype == torch.float32
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (0, 3, 8), (2, 0, 8)])
def test_any_number_of_rows(shape: tuple[int, ...], device: str) -> None:
    inputs = make_inputs(3, shape, device=device)
    torch.testing.assert_close(block_attn_res(*inputs), listing(*inputs), rtol=1e-12, atol=1e-12)
    for found, expected in zip(grads_of(block_attn_res, *inputs, True), grads_of(listing, *inputs, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_sources_of_any_layout(device: str) -> None:
    _, query, gain = make_inputs(1, device=device)

    def make(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, device=device)

    layouts = [make(3, 2, 8).transpose(0, 1), make(2, 8, 3).mT, make(2, 3, 16)[..., ::2], make(1, 3, 8).expand(2, 3, 8)]
    sources = [layout.requires_grad_() for layout in layouts]
    out = block_attn_res(sources, query, gain)
    torch.testing.assert_close(out, listing(sources, query, gain), rtol=1e-12, atol=1e-12)
    assert out.is_contiguous()
    grads = grads_of(block_attn_res, sources, query, gain, False)
    for found, expected in zip(grads, grads_of(listing, sources, query, gain, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trained", [(False, False, True), (True, False, False), (False, True, False)])
def test_only_the_wanted_gradients_are_computed(
    trained: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, query, gain = make_inputs(3)
    expected = grads_of(listing, sources, query, gain, False)
    for source in (sources[0], sources[2]):
        source.requires_grad_(trained[0])
    sources[1].requires_grad_(False)
    query.requires_grad_(trained[1])
    gain.requires_grad_(trained[2])
    backward, computed = torch.ops.attnres.block_attn_res_backward, []

    def counting(*args: object) -> list[Tensor]:
        computed.append(backward(*args))
        return computed[-1]

    monkeypatch.setattr(torch.ops.attnres, "block_attn_res_backward", counting)
    out = block_attn_res(sources, query, gain)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    leaves = [*sources, query, gain]
    assert len(computed[0]) == sum(leaf.requires_grad for leaf in leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-11, atol=1e-12)


def test_what_is_saved_is_inputs_and_at_most_two_numbers_a_row(device: str) -> None:
    sources, query, gain = make_inputs(9, (4, 16, 256), device=device, dtype=torch.float32)
    inputs, extra = {leaf.data_ptr() for leaf in (*sources, query, gain)}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            extra.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_attn_res(sources, query, gain)
    assert sum(extra) <= 2 * 9 * (4 * 16) * 4


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_kernel_stacks_the_sources() -> None:
    sources, query, gain = make_inputs(9, (4, 16, 256), dtype=torch.bfloat16)
    with torch.no_grad(), LargestResult() as largest:
        op_module._forward(sources, query, gain, EPS, SCALE, False)
        op_module._backward(sources[0], sources, query, gain, EPS, SCALE, False, [True] * 11)
    assert largest.elements == sources[0].numel()


@pytest.mark.parametrize(
    ("sources", "query", "gain", "error", "message"),
    [
        ([], (8,), None, ValueError, "sources is empty"),
        ([()], (8,), None, ValueError, "no dimensions"),
        ([(2, 8), (3, 8)], (8,), None, ValueError, r"sources\[1\] has shape \(3, 8\) but sources\[0\] has \(2, 8\)"),
        ([(2, 8)], (4,), None, ValueError, r"query has shape \(4,\); expected \(8,\)"),
        ([(2, 8)], (1, 8), None, ValueError, r"query has shape \(1, 8\)"),
        ([(2, 8)], (8,), (2,), ValueError, r"gain has shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shapes_are_named(sources, query, gain, error, message, device) -> None:
    def make(shape: tuple[int, ...] | None) -> Tensor | None:
        return None if shape is None else torch.zeros(shape, device=device)

    with pytest.raises(error, match=message):
        block_attn_res([make(shape) for shape in sources], make(query), make(gain))


def test_wrong_dtypes_are_named() -> None:
    whole, vector = torch.ones(2, 8, dtype=torch.int64), torch.ones(8)
    with pytest.raises(TypeError, match=r"sources\[1\] is torch.int64"):
        block_attn_res([whole.float(), whole], vector)
    with pytest.raises(TypeError, match=r"query is torch.int64"):
        block_attn_res([whole.float()], vector.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    sources, query, gain = make_inputs(3, device=device, dtype=dtype)
    sources[1] = sources[1].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    forward, backward = torch.ops.attnres.block_attn_res, torch.ops.attnres.block_attn_res_backward
    torch.library.opcheck(forward, (sources, query, gain, EPS, SCALE, True))
    sources, query, gain = [s.detach() for s in sources], query.detach(), gain.detach()
    wanted = [True, False, True, False, True]
    torch.library.opcheck(backward, (sources[0], sources, query, gain, EPS, SCALE, False, wanted))


def test_torch_func_transforms(device: str) -> None:
    sources, query, gain = make_inputs(3, device=device)
    sources, query, gain = [s.detach() for s in sources], query.detach(), gain.detach()

    def loss(form: Callable[..., Tensor]) -> Callable[[list[Tensor], Tensor], Tensor]:
        return lambda sources, query: form(sources, query, gain).square().sum()

    found = torch.func.grad(loss(block_attn_res), argnums=(0, 1))(sources, query)
    torch.testing.assert_close(found, torch.func.grad(loss(listing), argnums=(0, 1))(sources, query))
    queries = torch.stack([query, 2 * query])
    batched = torch.vmap(lambda sources, query: block_attn_res(sources, query, gain))(sources, queries)
    expected = [block_attn_res([s[i] for s in sources], queries[i], gain) for i in range(2)]
    torch.testing.assert_close(batched, torch.stack(expected))
    hessian = torch.func.hessian(lambda query: loss(block_attn_res)(sources, query))(query)
    torch.testing.assert_close(hessian, torch.func.hessian(lambda query: loss(listing)(sources, query))(query))


class Reader(torch.nn.Module):
    """A branch add before the operator and a norm after it, as in a rewritten layer."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(width, device=device) / width**0.5)
        self.gain = torch.nn.Parameter(torch.rand(width, device=device) + 0.5)
        self.norm = torch.nn.Parameter(torch.rand(width, device=device) + 0.5)

    def forward(self, first: Tensor, second: Tensor, branch: Tensor) -> Tensor:
        out = block_attn_res([first, second, second + branch], self.query, self.gain)
        return F.rms_norm(out, self.norm.shape, self.norm, EPS)


def count_op(graph: torch.fx.Graph) -> int:
    overload = torch.ops.attnres.block_attn_res.default
    return sum(node.target in (overload, overload.overloadpacket) for node in graph.nodes)


def test_dynamo_sees_one_node(device: str) -> None:
    module, graphs = Reader(16, device), []

    def backend(graph_module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph_module.graph)
        return graph_module.forward

    args = [torch.randn(2, 3, 16, device=device) for _ in range(3)]
    out = torch.compile(module, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(out, module(*args))
    assert [count_op(graph) for graph in graphs] == [1]


def test_export_keeps_one_node_with_dynamic_shapes(device: str) -> None:
    module = Reader(16, device)
    args = tuple(torch.randn(2, 3, 16, device=device) for _ in range(3))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, args, dynamic_shapes=(free, free, free), strict=False)
    larger = [torch.randn(5, 7, 16, device=device) for _ in range(3)]
    for exported in (program, program.run_decompositions()):
        assert count_op(exported.graph) == 1
        torch.testing.assert_close(exported.module()(*larger), module(*larger))


def test_aot_eager_runs_forward_and_backward_as_operators(device: str) -> None:
    inputs = make_inputs(3, device=device)
    compiled = torch.compile(lambda *args: block_attn_res(*args), backend="aot_eager", fullgraph=True)
    for found, expected in zip(grads_of(compiled, *inputs, True), grads_of(listing, *inputs, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compile_caches")
def test_inductor_fuses_it_with_its_neighbours(device: str) -> None:
    module = Reader(64, device)
    compiled = torch.compile(module, dynamic=True, fullgraph=True)

    def run(form: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
        out = form(*args)
        return [out, *torch.autograd.grad(out.square().sum(), [*args, *module.parameters()])]

    for length in (5, 9):
        args = [torch.randn(2, length, 64, device=device, requires_grad=True) for _ in range(3)]
        if length == 5:
            found, codes = run_and_get_code(run, compiled, args)
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                found = run(compiled, args)
        for mine, expected in zip(found, run(module, args), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert len(codes) == 2
    assert not any("attnres" in line for code in codes for line in code.splitlines() if "torch.ops" in line)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compile_caches")
def test_inductor_makes_one_pass_over_the_rows_on_cpu() -> None:
    inputs = make_inputs(9, (2, 64, 128), dtype=torch.float32)
    compiled = torch.compile(lambda *args: block_attn_res(*args), fullgraph=True)
    found, (forward, backward) = run_and_get_code(grads_of, compiled, *inputs, False)
    for mine, expected in zip(found, grads_of(listing, *inputs, False), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    outer_loop = re.compile(r"for\(int64_t x0=")
    assert len(outer_loop.findall(forward)) == 1
    # The second is the sum over rows for the query's gradient.
    assert len(outer_loop.findall(backward)) == 2


def test_compiled_code_is_not_found_under_another_revision(monkeypatch) -> None:
    """Inductor compiles under a tag made from the source of the operators, and the setting is then what it was."""
    import torch._inductor

    tags, before = [], torch.compiler.config.cache_key_tag
    monkeypatch.setattr(torch._inductor, "compile", lambda *_, **__: tags.append(torch.compiler.config.cache_key_tag))
    _compat.inductor_compile(torch.fx.symbolic_trace(torch.nn.Identity()), [], None, None, lambda graph: None)
    assert re.search(r"attnres-[0-9a-f]{16}$", tags[0])
    assert torch.compiler.config.cache_key_tag == before


def test_depth_weights_are_the_softmax_of_the_listing(device: str) -> None:
    sources, query, gain = make_inputs(4, device=device, dtype=torch.float32)
    alpha = depth_weights(sources, query, gain, eps=EPS, scale=SCALE)
    assert (alpha.shape, alpha.dtype) == ((4, 2, 3), torch.float32)
    torch.testing.assert_close(alpha.sum(0), torch.ones(2, 3, device=device))
    mixed = torch.einsum("n...,n...d->...d", alpha, torch.stack(sources))
    torch.testing.assert_close(mixed, listing(sources, query, gain))
    uniform = depth_weights([s.bfloat16() for s in sources], torch.zeros_like(query))
    assert torch.equal(uniform, torch.full((4, 2, 3), 0.25, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_may_be_changed_in_place(dtype) -> None:
    """As a model does that scales or adds to what it read from the stream."""
    sources = [torch.randn(2, 3, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    query = torch.randn(8, requires_grad=True)
    out = torch.ops.attnres.block_attn_res(sources, query, None, 1e-6, 1.0, False)
    expected = torch.autograd.grad((out * 2).sum(), query, retain_graph=True)[0]
    assert not out._is_view()
    out *= 2
    assert torch.equal(torch.autograd.grad(out.sum(), query)[0], expected)
