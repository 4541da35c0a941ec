"""depth_attention: the weights are those that the sites use, and the names are those of the modules that read."""

import copy
import gc
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from models import (
    WIDTH,
    Encoder,
    Tower,
    embeddings,
    gpt2,
    gpt_neox,
    images,
    llama,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
    transformers,
    vit,
)
from reference_models import reference_gpt2, reference_llama, run_stream
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite import _compat

X = embeddings()


def alpha_by_hand(sources: Sequence[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """The softmax of the equation in float64, ``[sources, tokens...]``."""
    v = torch.stack(list(sources)).double()
    keys = v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) * gain.double()
    return torch.einsum("d,n...d->n...", query.double(), keys).softmax(0)


def assert_weights(depth: ar.DepthAttention, sources: Sequence[Sequence[Tensor]], model: nn.Module) -> None:
    """Every weight of every token is that of the equation, for sources that somebody else has recorded."""
    queries, gains = site_parameters(model)
    assert len(depth.sites) == len(sources) == len(queries)
    for row, mean, *site in zip(depth.token_weights, depth.weights, sources, queries, gains, strict=True):
        expected = alpha_by_hand(*site)
        # The sources of a site are in the order of the columns.
        has = ~mean.isnan()
        torch.testing.assert_close(row[has].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean[has].double(), expected.flatten(1).mean(1), atol=1e-5, rtol=1e-5)
        assert row[~has].isnan().all()


def tower_sources(model: nn.Module, x: Tensor, blocks: int | str) -> list[list[Tensor]]:
    """The sources of all sites of a rewritten :class:`Tower`, by the reference."""
    queries, gains = site_parameters(model)
    trace: list[list[Tensor]] = []
    layers = [(layer.first, layer.second) for layer in copy.deepcopy(ar.undo(copy.deepcopy(model))).layers]
    with torch.no_grad():
        run_stream(model.embed(x), layers, queries, gains, blocks=blocks, trace=trace)
    return trace


def live(blocks: int | str = 2, layers: int = 2, seed: int = 1) -> nn.Module:
    model = ar.rewrite(prepared(Tower(layers), seed=seed), blocks, example_inputs=X, backend="eager")
    return randomise_sites(model, seed)


@pytest.mark.slow
def test_zero_queries_weigh_all_sources_equally() -> None:
    model = ar.rewrite(llama(5), blocks=3, backend="eager")
    depth = ar.depth_attention(model, token_ids())
    assert depth.sources == ["b_0", "b_1", "b_2", "b_3", "partial"]
    assert depth.weights.shape == (10, 5)
    counts = (~depth.weights.isnan()).sum(1)
    assert counts.tolist() == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    torch.testing.assert_close(depth.weights.nanmean(1), 1 / counts)


@pytest.mark.parametrize("blocks", [2, "full"])
def test_random_queries_give_the_softmax_of_the_equation(blocks: int | str) -> None:
    model = live(blocks, layers=3)
    depth = ar.depth_attention(model, X)
    assert depth.token_weights.shape == (6, len(depth.sources), *X.shape[:2])
    assert_weights(depth, tower_sources(model, X, blocks), model)
    # Not what zero queries give.
    assert (depth.weights - 1 / (~depth.weights.isnan()).sum(1, keepdim=True)).abs().nan_to_num().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("make", "reference"), [(llama, reference_llama), (gpt2, reference_gpt2)])
def test_against_models_written_by_hand(make: Callable[..., nn.Module], reference: Callable[..., Tensor]) -> None:
    model = randomise_sites(ar.rewrite(prepared(make(5)), blocks=3, backend="eager"))
    trace: list[list[Tensor]] = []
    with torch.no_grad():
        reference(model, token_ids(), *site_parameters(model), blocks=3, trace=trace)
    assert_weights(ar.depth_attention(model, token_ids()), trace, model)


def test_full_attnres_has_no_partial() -> None:
    depth = ar.depth_attention(live("full"), X)
    assert depth.sources == ["b_0", "b_1", "b_2", "b_3", "b_4"]
    assert (~depth.weights.isnan()).sum(1).tolist() == [2, 3, 4, 5]
    assert depth.groups == [("block 2", 1), ("block 3", 1), ("block 4", 1), ("last", 1)]
    assert depth.streams[0].blocks == [["layers.0"], ["layers.0"], ["layers.1"], ["layers.1"]]


def test_columns_blocks_and_names() -> None:
    depth = ar.depth_attention(live(2, layers=3), X)
    sublayers = [f"layers.{i}.{part}" for i in range(3) for part in ("first", "second")]
    assert depth.sites == [*sublayers[1:], "norm"]
    assert depth.sources == ["b_0", "b_1", "b_2", "partial"]
    has = [[column for column, value in enumerate(row) if value == value] for row in depth.weights.tolist()]
    assert has == [[0, 3], [0, 3], [0, 3], [0, 1], [0, 1, 3], [0, 1, 2]]
    assert (depth.block_of, depth.groups) == ([1, 1, 1, 2, 2, 3], [("block 1", 3), ("block 2", 2), ("last", 1)])
    (stream,) = depth.streams
    assert (stream.owner, stream.blocks) == ("", [["layers.0", "layers.1"], ["layers.2"]])


def t5(layers: int) -> nn.Module:
    config = transformers.T5Config(vocab_size=61, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=layers, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


READERS = {
    "llama": (llama, ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp", "model.norm"]),
    "gpt2": (gpt2, [f"transformer.{name}" for name in ("h.0.mlp", "h.1.attn", "h.1.mlp", "ln_f")]),
    # Attention and MLP of a layer read the same value: the layer reads it.
    "neox": (gpt_neox, ["gpt_neox.layers.1", "gpt_neox.final_layer_norm"]),
    "vit": (vit, [f"vit.{name}" for name in ("layers.0.mlp", "layers.1.attention", "layers.1.mlp", "layernorm")]),
    # Torch's layer has the two halves of its MLP as they are; the first reads.
    "torch": (Encoder, [f"encoder.layers.{n}" for n in ("0.linear1", "1.self_attn", "1.linear1")] + ["encoder.norm"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_reads_are_named_by_the_sublayer_behind_the_norm(name: str) -> None:
    make, expected = READERS[name]
    x = images() if name == "vit" else token_ids()
    model = ar.rewrite(make(2).eval(), blocks=2, example_inputs=x, backend="eager")
    depth = ar.depth_attention(model, x)
    assert depth.sites == expected
    assert depth.labels == [label.removeprefix(f"{depth.streams[0].owner}.") for label in expected]
    # Each is a module of the model.
    assert all(model.get_submodule(site) for site in depth.sites)


@pytest.mark.slow
def test_encoder_and_decoder() -> None:
    model = randomise_sites(ar.rewrite(t5(2).eval(), blocks=2, backend="eager"))
    example = {"input_ids": token_ids(), "decoder_input_ids": token_ids(length=5)}
    depth = ar.depth_attention(model, example)
    sublayers = ["SelfAttention", "EncDecAttention", "DenseReluDense"]
    encoder = [f"encoder.block.{i}.layer.{j}.{sublayers[2 * j]}" for i in range(2) for j in range(2)][1:]
    decoder = [f"decoder.block.{i}.layer.{j}.{sublayers[j]}" for i in range(2) for j in range(3)][1:]
    assert depth.sites == [*encoder, "encoder.final_layer_norm", *decoder, "decoder.final_layer_norm"]
    assert (depth.labels, depth.stream_of) == (depth.sites, [0] * 4 + [1] * 6)
    assert [name for name, _ in depth.groups][2:4] == ["encoder last", "decoder block 1"]
    assert depth.token_weights.shape == (10, 4, 2, 9)
    sums = depth.token_weights.nansum(1)
    torch.testing.assert_close(sums[:4], torch.ones(4, 2, 9))
    torch.testing.assert_close(sums[4:, :, :5], torch.ones(6, 2, 5))
    assert depth.token_weights[4:, :, :, 5:].isnan().all()


def test_the_sublayers_of_a_layer_without_a_module_of_its_own() -> None:
    """Both read one value, and no module but the owner has both: the names of both."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for norm, left, right in zip(self.norms, self.left, self.right, strict=False):
                h = norm(x)
                x = x + left(h).tanh() + right(h).tanh()
            return self.norms[2](x)

    model = ar.rewrite(Flat(), 2, example_inputs=X, backend="eager")
    assert ar.depth_attention(model, X).sites == ["left.1 + right.1", "norms.2"]


# What is traced is kept with the model


def traces(call: Callable[[], object]) -> int:
    """How many graphs Dynamo makes in ``call``."""
    before = _compat.graphs_compiled()
    call()
    return _compat.graphs_compiled() - before


def test_only_the_first_call_of_a_kind_traces() -> None:
    model = live()
    assert traces(lambda: ar.depth_attention(model, X)) == 1
    assert traces(lambda: ar.depth_attention(model, X)) == 0
    # Other weights are no other kind: what is kept has none in it.
    randomise_sites(model, seed=7)
    assert traces(lambda: assert_weights(ar.depth_attention(model, X), tower_sources(model, X, 2), model)) == 0
    for length, count in ((5, 1), (7, 0), (9, 0)):
        x = embeddings(length=length)
        depth: list[ar.DepthAttention] = []
        assert traces(lambda x=x, depth=depth: depth.append(ar.depth_attention(model, x))) == count, length
        assert_weights(depth[0], tower_sources(model, x, 2), model)


def test_training_mode_has_a_graph_of_its_own() -> None:
    model = Tower(2)
    for layer in model.layers:
        layer.second.norm = nn.Sequential(layer.second.norm, nn.Dropout(0.5))
    model = randomise_sites(ar.rewrite(prepared(model), 2, example_inputs=X, backend="eager"))
    calm = ar.depth_attention(model, X).weights
    model.train()
    state = torch.random.get_rng_state()
    noisy = ar.depth_attention(model, X).weights
    assert torch.equal(torch.random.get_rng_state(), state), "the random state is the user's"
    assert (noisy - calm).abs().nan_to_num().max() > 1e-3
    model.eval()
    again: list[Tensor] = []
    assert traces(lambda: again.append(ar.depth_attention(model, X).weights)) == 0
    torch.testing.assert_close(again[0], calm, equal_nan=True)


def test_the_code_of_the_model_itself_stays() -> None:
    model = live()
    with torch.no_grad():
        expected = model(X)
        assert traces(lambda: ar.depth_attention(model, X)) == 1
        assert traces(lambda: model(X)) == 0
        assert torch.equal(model(X), expected)
        ar.undo(model)
        assert relative_error(model(X), expected) > 1e-2


def test_rewritten_anew_it_has_other_weights() -> None:
    model = live()
    ar.depth_attention(model, X)
    ar.undo(model)
    with pytest.raises(ar.AttnResError, match="was not rewritten"):
        ar.depth_attention(model, X)
    randomise_sites(ar.rewrite(model, "full", example_inputs=X, backend="eager"))
    depth = ar.depth_attention(model, X)
    assert len(depth.sources) == 5
    assert_weights(depth, tower_sources(model, X, "full"), model)


def test_copies_trace_for_themselves(tmp_path: Path) -> None:
    model = live()
    expected = ar.depth_attention(model, X).weights
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        randomise_sites(other, seed=5)
        depth: list[ar.DepthAttention] = []
        assert traces(lambda other=other, depth=depth: depth.append(ar.depth_attention(other, X))) == 1
        assert_weights(depth[0], tower_sources(other, X, 2), other)
    assert torch.equal(ar.depth_attention(model, X).weights.nan_to_num(), expected.nan_to_num())


class Around(nn.Module):
    """A root around the owner; the graph may break between them."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.tower, self.breaks = Tower(2), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.tower(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x * 2


@pytest.mark.parametrize("breaks", [False, True])
def test_what_is_kept_goes_with_the_model(breaks: bool) -> None:
    model = ar.rewrite(prepared(Around(breaks)), 2, example_inputs=X, backend="eager")
    randomise_sites(model)
    ar.depth_attention(model, X)
    depth: list[ar.DepthAttention] = []
    assert traces(lambda looked_at=model: depth.append(ar.depth_attention(looked_at, X))) == 0
    assert_weights(depth[0], tower_sources(model.tower, X, 2), model)
    assert depth[0].sites == ["tower.layers.0.second", "tower.layers.1.first", "tower.layers.1.second", "tower.norm"]
    assert depth[0].streams[0].owner == "tower"
    assert depth[0].streams[0].blocks == [["tower.layers.0"], ["tower.layers.1"]]
    state = model.tower.attn_res.state
    gone = [weakref.ref(one) for one in (model, model.tower.layers[0].first.up.weight, state, *state._kept.values())]
    assert len(gone) == 4
    del model, state
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_two_threads_have_their_own_weights() -> None:
    model = live()
    inputs = [embeddings(length=length, seed=length) for length in (9, 5)]
    found: dict[int, list[ar.DepthAttention]] = {0: [], 1: []}
    threads = [
        threading.Thread(target=lambda i=i: found[i].extend(ar.depth_attention(model, inputs[i]) for _ in range(8)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        assert len(found[i]) == 8
        for depth in found[i]:
            assert_weights(depth, tower_sources(model, x, 2), model)


def test_plain_residuals_have_no_weights() -> None:
    model = live()
    with ar.disabled(model), pytest.raises(ar.GraphBreakError, match="no AttnRes site ran"):
        ar.depth_attention(model, X)
    assert len(ar.depth_attention(model, X).sites) == 4


def test_a_plain_model_is_an_error() -> None:
    with pytest.raises(ar.AttnResError, match="depth_attention: this Tower was not rewritten"):
        ar.depth_attention(Tower(2), X)


# Files


def test_plot_and_save(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = ar.rewrite(Tower(2), blocks=2, example_inputs=X, backend="eager")
    depth = ar.depth_attention(model, X)
    depth.plot(tmp_path / "depth.png")
    depth.save(tmp_path / "depth.json")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "depth.json").read_text())
    assert saved["sites"] == depth.sites
    assert saved["weights"][0] == [0.5, None, None, 0.5]
    assert saved["streams"] == [{"owner": "", "blocks": [["layers.0"], ["layers.1"]]}]
    assert saved["block_of"] == [1, 2, 2, 3]
    # An SVG has its text as text, so what is drawn can be read.
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        depth.plot(tmp_path / "depth.svg")
    drawn = (tmp_path / "depth.svg").read_text()
    assert all(f">{text}<" in drawn for text in (*depth.labels, *depth.sources, "block 1", "block 2", "last"))
