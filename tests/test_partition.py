"""Layers into blocks: the arithmetic for every size, and what becomes of it in a real model."""

import copy
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    ARCHITECTURES,
    Tower,
    embeddings,
    gpt2,
    gpt_neox,
    llama,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
)
from reference_models import block_attn_res

import attnres_rewrite as ar
from attnres_rewrite.config import partition_layers


@given(layers=st.integers(1, 300), data=st.data())
def test_exactly_n_groups_whose_sizes_differ_by_at_most_one(layers, data) -> None:
    blocks = data.draw(st.integers(1, layers))
    sizes = partition_layers(layers, blocks=blocks)
    assert len(sizes) == blocks
    assert sum(sizes) == layers
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(layers=st.integers(1, 300), data=st.data())
def test_groups_of_k_layers_and_the_last_takes_what_remains(layers, data) -> None:
    size = data.draw(st.integers(1, layers))
    sizes = partition_layers(layers, layers_per_block=size)
    starts = [0, *accumulate(sizes)]
    assert starts == [*range(0, layers, size), layers]


def test_released_models() -> None:
    assert partition_layers(93, layers_per_block=12) == [12] * 7 + [9]
    assert partition_layers(10, blocks=4) == [3, 3, 2, 2]
    assert partition_layers(32, blocks=8) == [4] * 8


@given(layers=st.integers(1, 300), extra=st.integers(1, 50))
def test_more_blocks_than_layers(layers, extra) -> None:
    with pytest.raises(ar.BlockPartitionError, match=f"only {layers} layers.*choose at most {layers}, or blocks="):
        partition_layers(layers, blocks=layers + extra)
    with pytest.raises(ar.BlockPartitionError, match=f"only {layers} layers: choose at most {layers}"):
        partition_layers(layers, layers_per_block=layers + extra)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8", None])
def test_what_is_no_count(value) -> None:
    if value is not None:
        with pytest.raises(ar.BlockPartitionError, match=f'a positive integer, "full" or "auto", not {value!r}'):
            ar.AttnResConfig(blocks=value)
        for name in ("layers_per_block", "sublayers_per_block"):
            with pytest.raises(ar.BlockPartitionError, match=f"^{name} must be a positive integer, not"):
                ar.AttnResConfig(**{name: value})
    with pytest.raises(ar.BlockPartitionError):
        ar.AttnResConfig(blocks={"model": value})


LAYERS = 7


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"blocks": 1}, [7]),
        ({"blocks": 3}, [3, 2, 2]),
        ({"blocks": 4}, [2, 2, 2, 1]),
        ({"blocks": 7}, [1] * 7),
        ({"layers_per_block": 3}, [3, 3, 1]),
        ({"blocks": [1, 4, 2]}, [1, 4, 2]),
        ({"blocks": {"model": (5, 2)}}, [5, 2]),
    ],
    ids=str,
)
def test_blocks_of_a_model_hold_whole_layers(options, sizes) -> None:
    (stream,) = ar.explain(llama(LAYERS), config=ar.AttnResConfig(**options)).streams
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    starts = [0, *accumulate(sizes)]
    assert stream.layers == tuple(layers)
    expected = [tuple(layers[a:b]) for a, b in pairwise(starts)]
    assert list(stream.blocks) == expected
    # b_0 and the complete blocks, and the partial of the open block once it has a branch output: two of a
    # layer's branches belong to the same block, whose first read is of complete blocks alone.
    assert list(stream.sources) == [n + 2 for n, size in enumerate(sizes) for _ in range(2 * size)]


@pytest.mark.parametrize("grouping", [{"blocks": "full"}, {"sublayers_per_block": 1}])
def test_full_makes_every_branch_output_a_block(grouping) -> None:
    (stream,) = ar.explain(llama(LAYERS), config=ar.AttnResConfig(**grouping)).streams
    assert stream.sources == tuple(range(2, 2 * LAYERS + 2))
    assert len(stream.blocks) == 2 * LAYERS
    assert stream.blocks[:2] == (("model.layers.0",), ("model.layers.0",))


def test_blocks_of_sublayers_end_within_a_layer() -> None:
    (stream,) = ar.explain(llama(4), config=ar.AttnResConfig(sublayers_per_block=3)).streams
    assert stream.sources == (2, 2, 2, 3, 3, 3, 4, 4)
    layers = [f"model.layers.{i}" for i in range(4)]
    assert stream.blocks == (tuple(layers[:2]), tuple(layers[1:3]), tuple(layers[3:]))
    # Of parallel residuals a layer is one branch output.
    (stream,) = ar.explain(gpt_neox(4), config=ar.AttnResConfig(sublayers_per_block=3)).streams
    assert stream.sources == (2, 2, 2, 3)


def test_blocks_of_more_sublayers_than_there_are() -> None:
    config = ar.AttnResConfig(sublayers_per_block=7)
    with pytest.raises(
        ar.BlockPartitionError, match=r"sublayers_per_block=7, but .* 6 branch outputs: choose at most 6"
    ):
        ar.explain(gpt2(3), config=config)
    assert len(ar.explain(gpt2(4), config=config).streams[0].blocks) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_layers_and_branches(name) -> None:
    architecture = ARCHITECTURES[name]
    report = ar.explain(architecture.make(LAYERS), 3, example_inputs=architecture.inputs(2, 9))
    (stream,) = report.streams
    assert stream.owner == architecture.owner
    assert [layer.rsplit(".", 1)[-1] for layer in stream.layers] == [str(i) for i in range(LAYERS)]
    assert stream.branches == LAYERS * architecture.sites_per_layer
    assert [len(block) for block in stream.blocks] == [3, 2, 2]
    assert report.added == 2 * stream.width * stream.branches


def test_blocks_by_owner() -> None:
    (stream,) = ar.explain(gpt2(3), {"transformer": 2}).streams
    assert len(stream.blocks) == 2
    with pytest.raises(ar.BlockPartitionError, match="in module 'transformer': give it a number of blocks too"):
        ar.explain(gpt2(3), {"encoder": 2})
    with pytest.raises(ar.NoResidualStreamError, match=r"streams names \['encoder'\].*in modules \['transformer'\]"):
        ar.explain(gpt2(3), 2, config=ar.AttnResConfig(streams=("encoder",)))


def test_sizes_that_do_not_add_up() -> None:
    with pytest.raises(ar.BlockPartitionError, match=r"blocks=\[2, 2\] are 4 layers, but the stream has 3: give sizes"):
        ar.explain(gpt2(3), [2, 2])
    for sizes in ([0, 3], [1, True], [1.5, 1.5], []):
        with pytest.raises(ar.BlockPartitionError, match="must be a positive integer"):
            ar.AttnResConfig(sizes)


@pytest.mark.parametrize(
    ("grouping", "ends"),
    [
        ({"blocks": [1, 2, 1]}, {2, 6, 8}),
        ({"blocks": [3, 1]}, {6, 8}),
        ({"blocks": (1, 1, 1, 1)}, {2, 4, 6, 8}),
        ({"sublayers_per_block": 3}, {3, 6, 8}),
        ({"sublayers_per_block": 3, "schedule": "two_phase"}, {3, 6, 8}),
    ],
)
def test_sizes_are_recorded_and_are_those_of_every_form(grouping, ends) -> None:
    """In the live form, a program and a graph, and after a copy: the same numbers as the sums by hand."""
    x, config = embeddings(), ar.AttnResConfig(**grouping)
    model = prepared(Tower(4))
    exported = ar.rewrite(torch.export.export(model, (x,)), config=config).module()
    traced = ar.rewrite(torch.fx.symbolic_trace(model), config=config, example_inputs=x)
    live = randomise_sites(ar.rewrite(copy.deepcopy(model), config=config, example_inputs=x, backend="eager"))
    queries, gains = site_parameters(live)
    sublayers = [sublayer for layer in model.layers for sublayer in (layer.first, layer.second)]
    summaries, partial = [model.embed(x)], None
    h = summaries[0]
    for k, sublayer in enumerate(sublayers, start=1):
        output = sublayer(h)
        partial = output if partial is None else partial + output
        sources = [*summaries, partial]
        h = block_attn_res(sources, queries[k - 1], gains[k - 1])
        if k in ends:
            summaries, partial = sources, None
    expected = model.head(model.norm(h))
    assert relative_error(live(x), expected) < 1e-5
    assert relative_error(copy.deepcopy(live)(x), expected) < 1e-5
    for form in (exported, traced):
        form.load_state_dict(live.state_dict(), strict=False)
        assert relative_error(form(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("blocks", "config", "given"),
    [
        (2, {"layers_per_block": 2}, "layers_per_block=2"),
        (2, {"sublayers_per_block": 2}, "sublayers_per_block=2"),
        (2, {"blocks": 4}, "blocks=4"),
        ("full", {"blocks": [2, 1]}, r"blocks=\(2, 1\)"),
    ],
)
def test_blocks_that_are_named_twice(blocks, config, given) -> None:
    for verb in (ar.rewrite, ar.explain):
        with pytest.raises(ar.BlockPartitionError, match=f"was given, and config says {given}: give one of them"):
            verb(gpt2(3), blocks, config=ar.AttnResConfig(**config))
    with pytest.raises(ar.BlockPartitionError, match="both say how the layers are grouped: give one of them"):
        ar.AttnResConfig(blocks=2, layers_per_block=2)
    with pytest.raises(ar.BlockPartitionError, match=r"^layers_per_block=2 and sublayers_per_block=4 both say"):
        ar.AttnResConfig(layers_per_block=2, sublayers_per_block=4)


def test_blocks_that_are_named_twice_and_agree() -> None:
    assert len(ar.explain(gpt2(3), 2, config=ar.AttnResConfig(blocks=2)).streams[0].blocks) == 2


def test_the_default_says_what_to_write() -> None:
    with pytest.raises(ar.BlockPartitionError, match=r"8 is the default: write rewrite\(model, blocks=3\), or fewer"):
        ar.rewrite(gpt2(3))
    with pytest.raises(ar.BlockPartitionError, match=r"own block$"):
        ar.rewrite(gpt2(3), 9)


def test_one_stream_by_its_name() -> None:
    assert ar.AttnResConfig(streams="model").streams == ("model",)
    assert ar.explain(gpt2(3), 2, config=ar.AttnResConfig(streams="transformer")).streams[0].owner == "transformer"
