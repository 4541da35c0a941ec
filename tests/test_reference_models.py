"""The hand-written models against Hugging Face and the equations: a reference is checked before its use."""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_models import (
    block_attn_res,
    partition_layers,
    reference_gpt2,
    reference_gpt_neox,
    reference_llama,
    run_stream,
)
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

LAYERS, WIDTH, VOCAB = 5, 32, 61


def tiny_llama(**overrides: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        **overrides,
    )
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def tiny_gpt_neox(parallel: bool) -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        use_parallel_residual=parallel,
    )
    return transformers.GPTNeoXForCausalLM(config)


MODELS = {
    "llama": (tiny_llama, reference_llama, 2 * LAYERS),
    "llama-biased-tied": (
        lambda: tiny_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=8),
        reference_llama,
        2 * LAYERS,
    ),
    "gpt2": (tiny_gpt2, reference_gpt2, 2 * LAYERS),
    "gpt-neox": (lambda: tiny_gpt_neox(parallel=True), reference_gpt_neox, LAYERS),
    "gpt-neox-sequential": (lambda: tiny_gpt_neox(parallel=False), reference_gpt_neox, 2 * LAYERS),
}
PARTITIONS = [{"blocks": 1}, {"blocks": 3}, {"blocks": 4}, {"blocks": "full"}, {"layers_per_block": 2}]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Tensor], int, Tensor]:
    """A float64 model with weights large enough to matter, its reference, its number of sites, token ids."""
    torch.manual_seed(0)
    make, reference, num_sites = MODELS[request.param]
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, reference, num_sites, torch.randint(VOCAB, (2, 11))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def random_sites(count: int, width: int = WIDTH) -> tuple[list[Tensor], list[Tensor]]:
    queries = [torch.randn(width, dtype=torch.float64) for _ in range(count)]
    return queries, [1 + 0.3 * torch.randn(width, dtype=torch.float64) for _ in range(count)]


@torch.no_grad()
def test_plain_mode_is_the_hugging_face_model(case) -> None:
    model, reference, _, ids = case
    assert relative_error(reference(model, ids), model(ids).logits) < 1e-10


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@torch.no_grad()
def test_zero_queries_with_sum_are_plain_residuals(case, partition) -> None:
    model, reference, num_sites, ids = case
    queries = [torch.zeros(WIDTH, dtype=torch.float64)] * num_sites
    actual = reference(model, ids, queries, **partition, aggregation="sum")
    assert relative_error(actual, reference(model, ids)) < 1e-10


@torch.no_grad()
def test_every_query_gain_and_option_changes_the_logits(case) -> None:
    model, reference, num_sites, ids = case
    queries, gains = random_sites(num_sites)
    base = reference(model, ids, queries, gains, blocks=3)
    for site in range(num_sites):
        for values in (queries, gains):
            kept, values[site] = values[site], values[site] * 1.5
            assert relative_error(reference(model, ids, queries, gains, blocks=3), base) > 1e-5, site
            values[site] = kept
    for option in ({"blocks": 4}, {"aggregation": "sum"}, {"eps": 1e-2}, {"scale": 0.5}):
        assert relative_error(reference(model, ids, queries, gains, **{"blocks": 3} | option), base) > 1e-5, option


def test_wrong_number_of_sites_is_refused(case) -> None:
    model, reference, num_sites, ids = case
    queries, gains = random_sites(num_sites)
    with pytest.raises(ValueError, match=f"{num_sites} sites, but {num_sites - 1} queries and no gains"):
        reference(model, ids, queries[1:], blocks=3)
    with pytest.raises(ValueError, match=f"{num_sites} sites, but {num_sites} queries and {num_sites - 1} gains"):
        reference(model, ids, queries, gains[1:], blocks=3)


def test_block_attn_res_written_out_for_one_row() -> None:
    sources = [torch.tensor(values, dtype=torch.float64) for values in ([3.0, 4.0], [0.0, 2.0], [-1.0, 1.0])]
    query, gain = (
        torch.tensor([0.5, -1.0], dtype=torch.float64),
        torch.tensor([2.0, 1.0], dtype=torch.float64),
    )
    eps, scale = 0.25, 0.7
    logits = []
    for x, y in ((3.0, 4.0), (0.0, 2.0), (-1.0, 1.0)):
        rms = math.sqrt((x * x + y * y) / 2 + eps)
        logits.append(scale * (0.5 * 2.0 * x - 1.0 * 1.0 * y) / rms)
    total = sum(math.exp(logit) for logit in logits)
    alpha = [math.exp(logit) / total for logit in logits]
    mean = [3 * alpha[0] - alpha[2], 4 * alpha[0] + 2 * alpha[1] + alpha[2]]
    for aggregation, factor in (("mean", 1), ("sum", 3)):
        actual = block_attn_res(sources, query, gain, aggregation=aggregation, eps=eps, scale=scale)
        assert actual.tolist() == pytest.approx([factor * value for value in mean], rel=1e-14)


def test_block_attn_res_computes_in_float32_for_half_precision() -> None:
    torch.manual_seed(0)
    sources = [torch.randn(3, 4, WIDTH, dtype=torch.bfloat16) for _ in range(4)]
    query = torch.randn(WIDTH)
    wide = block_attn_res([source.double() for source in sources], query.double())
    actual = block_attn_res(sources, query)
    assert actual.dtype is torch.bfloat16
    assert torch.allclose(actual.double(), wide, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


# A stream of numbered one-hot branch outputs: a source's entries say how often it holds which output.


def traced_sources(branches_per_layer: list[int], **partition: object) -> list[list[set[int]]]:
    """The branch outputs in each source of each site, the root being output 0; none may be counted twice."""
    total = 1 + sum(branches_per_layer)
    basis = list(torch.eye(total, dtype=torch.float64))
    ends = [0, *accumulate(branches_per_layer)]
    layers = [[lambda _, f=f: f for f in basis[1 + a : 1 + b]] for a, b in pairwise(ends)]
    trace: list[list[Tensor]] = []
    queries, _ = random_sites(total - 1, total)
    run_stream(basis[0], layers, queries, **partition, trace=trace)
    assert all(set(source.tolist()) <= {0.0, 1.0} for sources in trace for source in sources)
    return [[set(source.nonzero().flatten().tolist()) for source in sources] for sources in trace]


def test_sources_of_five_layers_in_two_blocks() -> None:
    assert traced_sources([2, 2, 2, 2, 2], blocks=2) == [
        [{0}, {1}],
        [{0}, {1, 2}],
        [{0}, {1, 2, 3}],
        [{0}, {1, 2, 3, 4}],
        [{0}, {1, 2, 3, 4, 5}],
        [{0}, {1, 2, 3, 4, 5, 6}],
        [{0}, {1, 2, 3, 4, 5, 6}, {7}],
        [{0}, {1, 2, 3, 4, 5, 6}, {7, 8}],
        [{0}, {1, 2, 3, 4, 5, 6}, {7, 8, 9}],
        [{0}, {1, 2, 3, 4, 5, 6}, {7, 8, 9, 10}],
    ]


def test_sources_of_one_block_keep_the_embedding_apart() -> None:
    assert traced_sources([1, 1, 1], blocks=1) == [[{0}, {1}], [{0}, {1, 2}], [{0}, {1, 2, 3}]]


def test_sources_of_full_attention_are_the_single_outputs() -> None:
    expected = [[{k} for k in range(depth + 2)] for depth in range(6)]
    assert traced_sources([2, 2, 2], blocks="full") == expected


@given(
    branches_per_layer=st.lists(st.integers(1, 3), min_size=1, max_size=8),
    data=st.data(),
    by_size=st.booleans(),
)
def test_sources_are_disjoint_sums_of_the_plain_stream(branches_per_layer, data, by_size) -> None:
    number = data.draw(st.integers(1, len(branches_per_layer)))
    trace = traced_sources(branches_per_layer, **{"layers_per_block" if by_size else "blocks": number})
    assert len(trace) == sum(branches_per_layer)
    for site, sources in enumerate(trace):
        assert all(sources)
        assert sum(map(len, sources)) == len(set().union(*sources))
        assert set().union(*sources) == set(range(site + 2))


@given(num_layers=st.integers(1, 200), data=st.data())
def test_blocks_are_as_even_as_they_can_be(num_layers, data) -> None:
    blocks = data.draw(st.integers(1, num_layers))
    sizes = partition_layers(num_layers, blocks)
    assert len(sizes) == blocks
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(num_layers=st.integers(1, 200), size=st.integers(1, 220))
def test_layers_per_block_leaves_the_rest_to_the_last(num_layers, size) -> None:
    sizes = partition_layers(num_layers, layers_per_block=size)
    starts = [0, *accumulate(sizes)]
    assert starts[-1] == num_layers
    assert starts[:-1] == list(range(0, num_layers, size))


def test_partition_of_a_released_model() -> None:
    assert partition_layers(93, layers_per_block=12) == [12] * 7 + [9]
    assert partition_layers(10, 4) == [3, 3, 2, 2]


@pytest.mark.parametrize("blocks", [0, -1, 6])
def test_impossible_partitions_are_refused(blocks) -> None:
    with pytest.raises(ValueError, match=f"5 layers do not make {blocks} blocks"):
        partition_layers(5, blocks)


def test_a_partition_has_one_definition() -> None:
    for both in ({}, {"blocks": 2, "layers_per_block": 2}):
        with pytest.raises(ValueError, match="either blocks or layers_per_block"):
            partition_layers(4, **both)
