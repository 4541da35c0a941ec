"""The two-phase schedule: its operators, its pass, and models that use it."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from models import Tower, embeddings, gpt_neox, llama, prepared, randomise_sites, token_ids
from reference_models import block_attn_res as listing
from torch import Tensor, nn
from torch.autograd import forward_ad

import attnres_rewrite as ar
from attnres_rewrite.ops.attend_blocks_expanded import expand_backward, expand_forward
from attnres_rewrite.passes import PostconditionError, ScheduleReads
from attnres_rewrite.passes.insert_attnres import Site
from attnres_rewrite.passes.schedule_reads import groups, sources_of

attnres = torch.ops.attnres
EPS, SCALE, WIDTH = 1e-5, 0.7, 16
Reads = Callable[..., list[Tensor]]


def inputs(blocks: int, reads: int, gain: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], ...]:
    """Blocks, queries, gains and partials; the first read has no partial."""
    generator = torch.Generator().manual_seed(blocks * 10 + reads)

    def make(count: int, *shape: int) -> list[Tensor]:
        made = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
        return [tensor.requires_grad_() for tensor in made]

    vectors = make(reads, WIDTH), make(reads if gain else 0, WIDTH)
    return make(blocks, 2, 3, WIDTH), *vectors, make(reads - 1, 2, 3, WIDTH)


def two_phase(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    partials: Sequence[Tensor],
    sum: bool = False,
) -> list[Tensor]:
    shared = attnres.attend_blocks(list(blocks), list(queries), list(gains), EPS, SCALE)
    results = []
    for s, (query, partial) in enumerate(zip(queries, [None, *partials], strict=True)):
        total = float(len(blocks) + (partial is not None)) if sum else 1.0
        phase_one = shared[s], shared[len(queries) + s]
        gain = gains[s] if gains else None
        results.append(attnres.merge_partial(*phase_one, partial, query, gain, EPS, SCALE, total))
    return results


def read_by_read(
    blocks: Sequence[Tensor],
    queries: Sequence[Tensor],
    gains: Sequence[Tensor],
    partials: Sequence[Tensor],
    sum: bool = False,
) -> list[Tensor]:
    """The paper's equation, written elsewhere, for every read."""
    sources = [list(blocks), *([*blocks, partial] for partial in partials)]
    options = {"aggregation": "sum" if sum else "mean", "eps": EPS, "scale": SCALE}
    every_gain = gains if gains else [None] * len(queries)
    return [listing(*read, **options) for read in zip(sources, queries, every_gain, strict=True)]


def gradients(reads: Reads, arguments: tuple[list[Tensor], ...], sum: bool) -> tuple[Tensor, ...]:
    results = reads(*arguments, sum)
    weights = [torch.linspace(-1, 1 + i, out.numel(), dtype=out.dtype).view(out.shape) for i, out in enumerate(results)]
    loss = torch.stack([(out * weight).sum() for out, weight in zip(results, weights, strict=True)]).sum()
    return torch.autograd.grad(loss, list(itertools.chain(*arguments)))


def assert_the_equation(reads: Reads, arguments: tuple[list[Tensor], ...], sum: bool = False) -> None:
    """Results and gradients are those of the paper's equation, read by read."""
    for found, expected in zip(reads(*arguments, sum), read_by_read(*arguments, sum), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(reads, arguments, sum), gradients(read_by_read, arguments, sum), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sum", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("blocks", "reads"), [(1, 2), (2, 1), (4, 3)])
def test_the_two_phases_are_the_equation(blocks: int, reads: int, gain: bool, sum: bool) -> None:
    arguments = inputs(blocks, reads, gain)
    assert_the_equation(two_phase, arguments, sum)


@pytest.mark.parametrize(("blocks", "reads"), [(1, 2), (3, 3)])
def test_compiled_by_inductor_they_are_the_equation(blocks: int, reads: int) -> None:
    arguments = inputs(blocks, reads)
    compiled = torch.compile(two_phase, fullgraph=True)
    assert_the_equation(compiled, arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_what_inductor_expands_on_a_gpu_is_the_equation(dtype: torch.dtype, tolerance: float) -> None:
    """Written out for every read, and the sum over rows of what was rounded to the dtype of the blocks."""
    blocks, queries, gains, _ = inputs(3, 2, dtype=dtype)
    wide = [[t.detach().double() for t in given] for given in (blocks, queries, gains)]
    settings = (1e-6, 1.0)
    grads = [torch.randn_like(t) for t in attnres.attend_blocks(blocks, queries, gains, *settings)]
    wanted = [True] * 7
    backward = attnres.attend_blocks_backward([g.double() for g in grads], *wide, *settings, wanted)
    expected = [*attnres.attend_blocks(*wide, *settings), *backward]
    found = [
        *expand_forward(blocks, queries, gains, *settings),
        *expand_backward(grads, blocks, queries, gains, *settings, wanted, for_inductor=True),
    ]
    assert len(found) == len(expected) == 4 + 7
    for given, right in zip(found, expected, strict=True):
        assert (given.double() - right).abs().max() <= tolerance * right.abs().max()


def test_gradients_are_those_of_finite_differences_twice() -> None:
    arguments = inputs(2, 2)
    flat, counts = list(itertools.chain(*arguments)), [len(part) for part in arguments]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        return tuple(two_phase(*([next(rest) for _ in range(count)] for count in counts), True))

    assert torch.autograd.gradcheck(call, flat)
    assert torch.autograd.gradgradcheck(call, [tensor.detach()[..., :4].requires_grad_() for tensor in flat])


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (1, WIDTH)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    blocks, queries, gains, partials = inputs(2, 2)
    blocks, partials = (
        [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in part] for part in (blocks, partials)
    )
    arguments = blocks, queries, gains, partials
    for sum in (False, True):
        assert_the_equation(two_phase, arguments, sum)


def test_blocks_of_any_layout() -> None:
    def make(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64)

    _, queries, gains, partials = inputs(4, 2)
    layouts = [make(3, 2, WIDTH).transpose(0, 1), make(2, WIDTH, 3).mT, make(2, 3, 2 * WIDTH)[..., ::2]]
    blocks = [layout.requires_grad_() for layout in (*layouts, make(1, 3, WIDTH).expand(2, 3, WIDTH))]
    arguments = blocks, queries, gains, partials
    assert_the_equation(two_phase, arguments)
    transposed = make(WIDTH, 3).t()
    grads, vectors = (
        [make(3, size) for size in (WIDTH, WIDTH, 1, 1)],
        ([t.detach() for t in v] for v in (queries, gains)),
    )
    for found in attnres.attend_blocks_backward(grads, [transposed], *vectors, EPS, SCALE, [True] * 5):
        assert found.is_contiguous()


def test_only_gradients_of_blocks_are_computed_if_no_other_is_wanted() -> None:
    blocks, queries, gains, partials = inputs(3, 2)
    expected = torch.autograd.grad(read_by_read(blocks, queries, gains, partials)[1].sum(), blocks)
    frozen = ([t.detach() for t in part] for part in (queries, gains, partials))
    found = torch.autograd.grad(two_phase(blocks, *frozen)[1].sum(), blocks)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_opcheck() -> None:
    blocks, queries, gains, partials = inputs(3, 2)
    torch.library.opcheck(attnres.attend_blocks.default, (blocks, queries, gains, EPS, SCALE))
    shared = [tensor.detach().requires_grad_() for tensor in attnres.attend_blocks(blocks, queries, gains, EPS, SCALE)]
    for partial, total in ((partials[0], 1.0), (None, 3.0)):
        arguments = (shared[1], shared[3], partial, queries[1], gains[1], EPS, SCALE, total)
        torch.library.opcheck(attnres.merge_partial.default, arguments)
    for given in (gains, []):
        wanted = [True] * (len(blocks) + len(queries) + len(given))
        tensors = [[tensor.detach() for tensor in part] for part in (shared, blocks, queries, given)]
        arguments = (*tensors, EPS, SCALE, wanted)
        torch.library.opcheck(attnres.attend_blocks_backward.default, arguments)


def test_no_result_is_an_input() -> None:
    (block,), queries, _, _ = ([t.detach() for t in part] for part in inputs(1, 1, gain=False))

    def changed_in_place(block: Tensor) -> Tensor:
        mixed, log_sum = attnres.attend_blocks([block], queries, [], EPS, SCALE)
        attnres.merge_partial(mixed, log_sum, None, queries[0], None, EPS, SCALE, 1.0).add_(1)
        mixed.add_(1)
        return block.sum()

    assert changed_in_place(block.clone()) == block.sum()
    torch.testing.assert_close(torch.vmap(changed_in_place)(block.clone()[None])[0], block.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_mixed_and_the_result(dtype: torch.dtype) -> None:
    arguments = inputs(5, 3, dtype=dtype)
    exact = read_by_read(*([tensor.double() for tensor in part] for part in arguments))
    results = two_phase(*arguments)
    assert {out.dtype for out in results} == {dtype}
    for found, expected in zip(results, exact, strict=True):
        assert (found.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    assert {tensor.dtype for tensor in gradients(two_phase, arguments, False)} == {dtype}


def test_logits_of_any_size_do_not_overflow() -> None:
    blocks, queries, gains, partials = inputs(3, 2, dtype=torch.float32)
    for factor in (1e4, -1e4):
        steep = [query * factor for query in queries]
        for found, expected in zip(
            two_phase(blocks, steep, gains, partials), read_by_read(blocks, steep, gains, partials), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_a_read_that_nothing_uses_adds_no_gradient() -> None:
    arguments = inputs(3, 3)
    blocks, queries, gains, partials = arguments
    used = [*blocks, queries[1], gains[1], partials[0]]
    found = torch.autograd.grad(two_phase(*arguments)[1].sum(), [*used, queries[0], queries[2]])
    expected = torch.autograd.grad(read_by_read(*arguments)[1].sum(), used)
    torch.testing.assert_close(found[: len(used)], expected, rtol=1e-11, atol=1e-11)
    assert not any(gradient.any() for gradient in found[len(used) :])


def test_transforms_of_torch_func() -> None:
    blocks, queries, gains, partials = ([t.detach() for t in part] for part in inputs(3, 2))

    def loss(blocks: list[Tensor], query: Tensor) -> Tensor:
        return two_phase(blocks, [queries[0], query], gains, partials)[1].square().sum()

    def expected_loss(blocks: list[Tensor], query: Tensor) -> Tensor:
        return read_by_read(blocks, [queries[0], query], gains, partials)[1].square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(blocks, queries[1])
    torch.testing.assert_close(found, torch.func.grad(expected_loss, argnums=(0, 1))(blocks, queries[1]))
    mapped = torch.vmap(loss, in_dims=(None, 0))(blocks, torch.stack(queries))
    torch.testing.assert_close(mapped, torch.stack([expected_loss(blocks, query) for query in queries]))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("which", ["block_attn_res", "attend_blocks", "merge_partial"])
def test_a_tangent_is_not_dropped(which: str, trained: bool) -> None:
    blocks, queries, gains, partials = ([t.detach() for t in part] for part in inputs(2, 2))
    call = {
        "block_attn_res": lambda x: attnres.block_attn_res([x, *blocks], queries[0], gains[0], EPS, SCALE, False),
        "attend_blocks": lambda x: attnres.attend_blocks([x, *blocks], queries, gains, EPS, SCALE)[0],
        "merge_partial": lambda x: attnres.merge_partial(
            blocks[0], blocks[1][..., :1], x, queries[0], gains[0], EPS, SCALE, 1.0
        ),
    }[which]
    x, direction = partials[0].requires_grad_(trained), torch.randn_like(partials[0])
    # Where autograd records, it refuses before the operator does.
    refusal = "implement the jvp function" if trained else f"{which}: .* torch.func.jvp sees"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refusal):
        call(forward_ad.make_dual(x, direction))
    _, tangent = torch.func.jvp(call, (x,), (direction,))
    step = 1e-6
    expected = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, q, g, p: attnres.attend_blocks(b, [], [], EPS, SCALE), "queries is empty"),
        (lambda b, q, g, p: attnres.attend_blocks(b, q, g[:1], EPS, SCALE), "1 gains for 2 queries"),
        (lambda b, q, g, p: attnres.attend_blocks([], q, g, EPS, SCALE), "sources is empty"),
        (
            lambda b, q, g, p: attnres.attend_blocks(b, [q[0], q[0][:3]], [], EPS, SCALE),
            r"queries\[1\] has shape \(3,\)",
        ),
        (lambda b, q, g, p: attnres.merge_partial(b[0], b[0], p[0], q[0], None, EPS, SCALE, 1.0), "log_sum has shape"),
        (
            lambda b, q, g, p: attnres.merge_partial(b[0], b[0][..., :1], p[0][:1], q[0], None, EPS, SCALE, 1.0),
            r"sources\[1\] has shape",
        ),
    ],
)
def test_bad_input(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*inputs(2, 2))


# The pass


def counted(module: torch.fx.GraphModule) -> dict[str, int]:
    names = ("block_attn_res", "attend_blocks", "merge_partial")
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return {name: sum(target == f"attnres.{name}.default" for target in targets) for name in names}


def tower_graph(layers: int, **options: object) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    module = torch.fx.symbolic_trace(Tower(layers))
    return ar.rewrite(module, example_inputs=torch.randn(2, 3, 32), config=ar.AttnResConfig(**options))


def test_reads_that_share_their_blocks_attend_to_them_once() -> None:
    # Six layers of two branch outputs in three blocks: 12 sites. In the first block there is one block to attend over;
    # the last site, after the last block, is with those of that block.
    module = tower_graph(6, blocks=3, schedule="two_phase")
    assert counted(module) == {"block_attn_res": 3, "attend_blocks": 2, "merge_partial": 9}
    attends = [node for node in module.graph.nodes if "attend_blocks" in str(node.target)]
    assert [(len(node.args[0]), len(node.args[1])) for node in attends] == [(2, 4), (3, 5)]
    assert counted(tower_graph(6, blocks=3, schedule="per_read")) == {
        "block_attn_res": 12,
        "attend_blocks": 0,
        "merge_partial": 0,
    }


@pytest.mark.parametrize(("apart", "joined"), [({}, True), ({"ac_graph_id": 1}, False)])
def test_the_last_read_joins_its_block_within_one_region(apart: dict[str, object], joined: bool) -> None:
    sources = [torch.fx.Graph().placeholder(name) for name in ("b0", "b1", "f2", "b2")]
    parts = tuple(range(i, i + 1) for i in range(4))

    def site(picked: list[int], has_partial: bool, **meta: object) -> Site:
        node = torch.fx.Graph().placeholder("site")
        node.meta.update(meta)
        of_site = tuple(sources[i] for i in picked)
        return Site(node, node, of_site, tuple(parts[i] for i in picked), has_partial)

    sites = [site([0, 1], False), site([0, 1, 2], True), site([0, 1, 3], False, **apart)]
    assert [len(group.sites) for group in groups(sites)] == ([3] if joined else [2, 1])
    other = [*sites[:2], site([0, 2, 3], False)]
    assert [len(group.sites) for group in groups(other)] == [2, 1]


def test_full_attention_residuals_share_nothing() -> None:
    assert counted(tower_graph(3, blocks="full", schedule="two_phase"))["attend_blocks"] == 0


def test_sites_are_told_apart_by_the_check() -> None:
    module = tower_graph(4, blocks=2, schedule="two_phase")
    merges = [node for node in module.graph.nodes if "merge_partial" in str(node.target)]
    assert [len(sources_of(node)) for node in merges] == [2, 3, 3, 3, 3]
    first, second = merges[-2:]
    second.update_arg(0, first.args[0])
    with pytest.raises(PostconditionError, match="computed for another read"):
        sources_of(second)
    second.update_arg(0, second.args[1])
    with pytest.raises(PostconditionError, match="computed for another read"):
        sources_of(second)
    second.update_arg(0, module.graph.call_function(torch.neg, (first,)))
    with pytest.raises(PostconditionError, match="what no attend_blocks node computed"):
        sources_of(second)
    first.update_arg(7, 2.0)
    with pytest.raises(PostconditionError, match=r"a read of 3 sources by 2\.0"):
        sources_of(first)
    with pytest.raises(PostconditionError, match="is not a block_attn_res node"):
        sources_of(next(iter(module.graph.nodes)))


def test_the_pass_sees_that_it_changed_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnres_rewrite.passes.schedule_reads.sources_of", lambda node: [])
    with pytest.raises(PostconditionError, match="attends over"):
        tower_graph(4, blocks=2, schedule="two_phase")


def test_the_log_counts_what_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="attnres_rewrite.passes"):
        tower_graph(4, blocks=2, schedule="two_phase")
    assert f"{ScheduleReads.__name__}: 5 of 8 sites share their blocks" in caplog.text


# Models


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make", [llama, pytest.param(gpt_neox, marks=pytest.mark.slow)], ids=lambda make: make.__name__
)
def test_both_schedules_are_one_model(make: Callable[[], nn.Module], aggregation: str) -> None:
    found = {}
    for schedule in ("per_read", "two_phase"):
        model = prepared(make(), torch.float64)
        config = ar.AttnResConfig(blocks=2, schedule=schedule, aggregation=aggregation)
        randomise_sites(ar.rewrite(model, config=config, backend="aot_eager"))
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        found[schedule] = [loss.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found["two_phase"], found["per_read"], rtol=1e-9, atol=1e-12)


class Looking(ar.AttnResBackend):
    """Counts the operators that it would give to its inner backend."""

    def _compile(self, module: torch.fx.GraphModule, inputs: list[object], **_: object) -> Callable[..., object]:
        self.found = counted(module)
        return ar.AttnResBackend("aot_eager")._compile(module, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "length", "phases"), [("inductor", 99, 2), ("inductor", 8, 1), ("aot_eager", 99, 1)])
def test_auto_takes_two_phases_where_inductor_compiles_many_rows(inner: str, length: int, phases: int) -> None:
    x, backend = embeddings(1, length), Looking(inner)
    torch.compile(ar.rewrite(Tower(4), blocks=2, example_inputs=x), backend=backend)(x)
    assert backend.found["merge_partial"] == (5 if phases == 2 else 0)


class TwoStreams(nn.Module):
    """Two streams of one module, which have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Tower(4), Tower(4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.first.layers:
            x = layer(x)
        for layer in self.second.layers:
            y = layer(y)
        return self.first.norm(x), self.second.norm(y)


@pytest.mark.slow
def test_auto_decides_for_every_stream_by_itself() -> None:
    inputs, backend = (embeddings(1, 99), embeddings(1, 8)), Looking("inductor")
    model = ar.rewrite(TwoStreams(), blocks=2, example_inputs=inputs)
    torch.compile(model, backend=backend)(*inputs)
    assert (backend.found["merge_partial"], backend.found["block_attn_res"]) == (5, 3 + 8)
