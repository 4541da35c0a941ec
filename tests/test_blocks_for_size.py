"""``blocks="auto"``: the number that a model of some size gets, its reason, and that nobody chooses again."""

import copy
import json
import logging
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    WIDTH,
    Tower,
    embeddings,
    export,
    gpt2,
    llama,
    logits,
    prepared,
    randomise_sites,
    token_ids,
)
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_rewrite as ar
from attnres_rewrite.distributed import plan
from attnres_rewrite.huggingface.saving import read_record
from attnres_rewrite.passes import group_layers
from attnres_rewrite.passes.blocks_for_size import MOST_SHARE, blocks_for_size, share_of

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
IDS, X = token_ids(), embeddings()


def weights_of(layers: int, width: int) -> int:
    """Numbers in the matrices of the layers of a Llama as ``benchmarks/end_to_end.py`` makes it."""
    return layers * (4 * width * width + 3 * width * (width * 8 // 3))


def on_meta(layers: int, width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": 4}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize(
    ("layers", "width", "blocks"),
    [(12, 256, 3), (24, 256, 3), (12, 64, 2), (24, 512, 7), (12, 512, 8), (80, 8192, 8), (5, 1024, 5), (1, 4096, 1)],
)
def test_narrow_models_get_fewer_blocks_than_wide_ones(layers: int, width: int, blocks: int) -> None:
    assert blocks_for_size([2] * layers, width, weights_of(layers, width)).blocks == blocks


@pytest.mark.parametrize(
    ("layers", "width", "why"),
    [
        (12, 1024, "8 blocks, at about 0.9% of what the layers take in inference on a CPU; at most 2% is aimed for"),
        (12, 256, "3 blocks, at about 2.0% of what the layers take in inference on a CPU (8 would take 3.7%); at most "
                  "2% is aimed for"),
        (8, 64, "2 blocks, at about 5.9% of what the layers take in inference on a CPU (8 would take 17.6%); at most "
                "2% is aimed for, but fewer blocks are not chosen"),
        (1, 64, "1 block, at about 3.9% of what the layers take in inference on a CPU; at most 2% is aimed for, but "
                "fewer blocks are not chosen"),
    ],
)  # fmt: skip
def test_the_reason_says_what_it_costs_and_what_more_would(layers: int, width: int, why: str) -> None:
    assert blocks_for_size([2] * layers, width, weights_of(layers, width)).why == why


def test_layers_of_which_nothing_is_known_get_as_many_as_the_paper_has() -> None:
    assert [blocks_for_size([2] * layers, 64, 0).blocks for layers in (12, 4)] == [8, 4]
    assert blocks_for_size([2], 64, 0).why == "1 block, since what the layers compute could not be seen"


@given(
    branches=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    width=st.integers(1, 10_000),
    weights=st.integers(1, 10**10),
)
def test_it_is_the_most_that_keeps_within_the_share(branches: list[int], width: int, weights: int) -> None:
    layers = len(branches)
    chosen = blocks_for_size(branches, width, weights)
    assert min(2, layers) <= chosen.blocks <= min(8, layers)
    within = [n for n in range(1, min(8, layers) + 1) if share_of(n, branches, width, weights) <= MOST_SHARE]
    assert chosen.blocks == max([*within, min(2, layers)])
    assert ("fewer blocks are not chosen" in chosen.why) == (share_of(chosen.blocks, branches, width, weights) > 0.02)


def test_a_site_is_charged_for_every_source_but_the_running_sum() -> None:
    """Counted by what a rewrite says of its sites."""
    model = prepared(llama(5))
    (stream,) = ar.explain(model, 3).streams
    charged = sum(sources - 1 for sources in stream.sources)
    assert share_of(3, [2] * 5, WIDTH, 1000) == pytest.approx(7.5 * 4 * WIDTH * charged / 2000)


@pytest.mark.parametrize(
    ("results", "off"),
    [
        ("end_to_end_inline.json", {256: 0.003, 512: 0.003, 1024: 0.003}),
        # Narrow models, whose layers are compiled once, pay for calls, which the estimate does not know of.
        ("end_to_end.json", {256: 0.012, 512: 0.003, 1024: 0.004}),
    ],
)
def test_the_estimate_is_what_was_measured_width_by_width(results: str, off: dict[int, float]) -> None:
    """The figures of the docs: the committed grids, weighted by rounds and spread."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for size in json.loads((RESULTS / results).read_text())["sizes"]:
        if (times := size["times"].get("inference")) is not None:
            layers, width = size["layers"], size["width"]
            estimate = share_of(size["blocks"], [2] * layers, width, weights_of(layers, width))
            weight = times["rounds"] / (times["ratio_p90"] - times["ratio_p10"]) ** 2
            found.setdefault(width, []).append((estimate, times["ratio"] - 1, weight))
    assert sum(map(len, found.values())) >= 20
    assert found.keys() == off.keys()
    for width, rows in found.items():
        estimates, ratios, weights = zip(*rows, strict=True)
        estimate, measured = (statistics.fmean(column, weights) for column in (estimates, ratios))
        assert estimate == pytest.approx(measured, abs=off[width]), width


class SharedLayers(Tower):
    """The same layer three times."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.layers[0](x)
        return self.head(self.norm(x))


def weights_seen(monkeypatch, model: nn.Module | ExportedProgram, inputs: object = None) -> int:
    """Multiply-adds of the layers that the pass finds in the graph of ``model``."""
    seen = []

    def spy(branches, width, weights):
        seen.append(weights)
        return blocks_for_size(branches, width, weights)

    monkeypatch.setattr(group_layers, "blocks_for_size", spy)
    ar.explain(model, "auto", example_inputs=inputs)
    (found,) = seen
    return found


def matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


class TestWeights:
    def test_of_a_live_model(self, monkeypatch) -> None:
        """Grouped queries, a rotary embedding, a head: all weights of the layers count, and nothing else."""
        model = llama(3)
        assert weights_seen(monkeypatch, model) == matrices(model.model.layers)
        assert plan(model, blocks="auto").blocks == (2, 1)

    def test_of_transposed_weights(self, monkeypatch) -> None:
        model = gpt2(2)
        assert weights_seen(monkeypatch, model) == matrices(model.transformer.h)

    @pytest.mark.parametrize("form", ["exported", "decomposed", "modules", "operators"])
    def test_of_a_graph(self, monkeypatch, form: str) -> None:
        """A tracer of modules calls them; exported ones have the weights as inputs, or as transposed ones."""
        tower = prepared(Tower(3))
        graph = {
            "exported": lambda: export(tower, X),
            "decomposed": lambda: export(tower, X).run_decompositions(),
            "modules": lambda: torch.fx.symbolic_trace(tower),
            "operators": lambda: torch.export.export(tower, (X,)).module(),
        }[form]()
        inputs = X if isinstance(graph, GraphModule) else None
        assert weights_seen(monkeypatch, graph, inputs) == matrices(tower.layers)

    def test_of_layers_that_share_theirs(self, monkeypatch) -> None:
        model = SharedLayers()
        assert weights_seen(monkeypatch, model, X) == 3 * matrices(model.layers)


def test_a_wide_model_keeps_all_and_the_report_says_why(caplog) -> None:
    model = on_meta(4, 2048)
    with caplog.at_level(logging.INFO, logger="attnres_rewrite"):
        report = ar.explain(model, "auto")
    (stream,) = report.streams
    assert len(stream.blocks) == 4
    assert stream.why.startswith("4 blocks, at about 0.3% of what the layers take in inference on a CPU; at most 2% is")
    assert f"  {stream.why}\n" in str(report)
    assert report.to_dict()["streams"][0]["why"] == stream.why
    assert f"stream of model: {stream.why}" in caplog.messages
    assert plan(model, blocks="auto").blocks == (1, 1, 1, 1)


def test_who_says_a_number_is_told_no_reason(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="attnres_rewrite"):
        report = ar.explain(Tower(3), 2, example_inputs=X)
    assert report.streams[0].why is None
    assert "None" not in str(report)
    assert not [message for message in caplog.messages if "layers take" in message]


def test_of_one_stream_among_others() -> None:
    report = ar.explain(Tower(4), {"": "auto"}, example_inputs=X)
    assert [len(stream.blocks) for stream in report.streams] == [2]
    assert report.streams[0].why.startswith("2 blocks, ")


def test_the_numbers_are_those_of_the_number_chosen(caplog) -> None:
    def rewritten(blocks: object) -> nn.Module:
        torch.manual_seed(0)
        return randomise_sites(ar.rewrite(prepared(Tower(4)), blocks, example_inputs=X, backend="eager"))

    with caplog.at_level(logging.INFO, logger="attnres_rewrite"):
        model = rewritten("auto")
    (told,) = [message for message in caplog.messages if "layers take" in message]
    assert told.startswith("stream of (root): 2 blocks, at about ")
    expected, other = rewritten(2), rewritten(4)
    assert torch.equal(model(X), expected(X))
    assert not torch.allclose(other(X), expected(X), atol=1e-3)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    expected.load_state_dict(state)
    with pytest.raises(ar.CheckpointError, match=r"blocks \(\(4, 4\),\) there, \(\(2, 2, 2, 2\),\) here"):
        other.load_state_dict(state)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), expected(X))


def test_all_forms_choose_the_same() -> None:
    tower = prepared(Tower(4))
    program = randomise_sites_of(ar.rewrite(export(tower, X), "auto"))
    traced = randomise_sites(ar.rewrite(torch.fx.symbolic_trace(tower), "auto", example_inputs=X))
    live = randomise_sites(ar.rewrite(tower, "auto", example_inputs=X, backend="eager"))
    torch.testing.assert_close(traced(X), live(X))
    torch.testing.assert_close(program.module()(X), live(X))
    settings = [value for name, value in traced.state_dict().items() if name.endswith("_extra_state")]
    assert [bytes(one.tolist()) for one in settings] == [bytes(live.state_dict()["attn_res._extra_state"].tolist())]


def randomise_sites_of(program: ExportedProgram) -> ExportedProgram:
    """As :func:`randomise_sites`, of the parameters that a program holds."""
    holder = program.module()
    randomise_sites(holder)
    for name, parameter in ar.attnres_parameters(holder):
        program.state_dict[name].data.copy_(parameter.data)
    return program


def never(*_: object) -> None:
    raise AssertionError("the number of blocks was chosen again")


def test_a_saved_model_has_its_number_and_chooses_no_other(tmp_path, monkeypatch) -> None:
    model = randomise_sites(ar.rewrite(prepared(llama(3)), "auto", backend="eager"))
    expected = logits(model(IDS))
    model.save_pretrained(tmp_path)
    spec = read_record(tmp_path).owners[0].spec
    assert (spec.blocks, spec.config.blocks) == (((4, 2),), 1)
    monkeypatch.setattr(group_layers, "blocks_for_size", never)
    loaded = ar.from_pretrained(tmp_path, backend="eager")
    torch.testing.assert_close(logits(loaded(IDS)), expected)


@pytest.mark.slow
def test_an_onnx_file_has_the_number_of_the_model(tmp_path, monkeypatch) -> None:
    onnx = pytest.importorskip("onnx")
    model = randomise_sites(ar.rewrite(prepared(Tower(3)), "auto", example_inputs=X, backend="eager"))
    monkeypatch.setattr(group_layers, "blocks_for_size", never)
    ar.export_onnx(model, tmp_path / "model.onnx", (X,))
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["attnres.blocks"]) == {"": 2}


@pytest.mark.parametrize("other", ["layers_per_block", "sublayers_per_block"])
def test_two_ways_to_say_it_are_refused(other: str) -> None:
    message = rf"blocks='auto' and {other}=2 both say how the layers are grouped"
    with pytest.raises(ar.BlockPartitionError, match=message):
        ar.AttnResConfig(blocks="auto", **{other: 2})
    with pytest.raises(ar.BlockPartitionError, match=f"blocks='auto' was given, and config says {other}=2"):
        ar.rewrite(Tower(3), "auto", config=ar.AttnResConfig(**{other: 2}), example_inputs=X)
    with pytest.raises(ar.BlockPartitionError, match="blocks=3 was given, and config says blocks='auto'"):
        ar.AttnResConfig(blocks="auto").with_blocks(3)


def test_a_configuration_travels_as_it_is() -> None:
    config = ar.AttnResConfig(blocks="auto")
    assert ar.AttnResConfig.from_json(config.to_json()) == config != ar.AttnResConfig()
    assert ar.AttnResConfig().blocks == 8
