"""training_dynamics: magnitudes and gradient norms equal those of hooks, of autograd and of a hand-written AttnRes."""

import copy
import gc
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import (
    Mlp,
    Tower,
    bert,
    embeddings,
    gpt_neox,
    llama,
    mostly_slow,
    prepared,
    randomise_sites,
    site_parameters,
    token_ids,
    transformers,
)
from reference_models import block_attn_res, run_stream
from torch import Tensor, nn

import attnres_rewrite as ar

LAYERS = 3
IDS = token_ids()
BATCH = {"input_ids": IDS, "labels": IDS}
TOLERANCE = 1e-10


def rms(value: Tensor) -> float:
    return value.detach().double().square().mean().sqrt().item()


def gradient_norm(*modules: nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for m in modules for p in m.parameters()))


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def kept(module: nn.Module, into: dict[str, Tensor], name: str) -> None:
    def keep(_: nn.Module, __: object, output: object) -> None:
        into[name] = output[0] if isinstance(output, tuple) else output

    module.register_forward_hook(keep)


def sublayers_of_llama(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    for i, layer in enumerate(model.model.layers):
        yield f"model.layers.{i}.self_attn", layer.self_attn, layer.input_layernorm
        yield f"model.layers.{i}.mlp", layer.mlp, layer.post_attention_layernorm


def test_a_plain_model_against_hooks_and_autograd() -> None:
    model = prepared(llama(2), torch.float64)
    dynamics = ar.training_dynamics(model, BATCH)
    hooked, outputs = copy.deepcopy(model), dict[str, Tensor]()
    kept(hooked.model.embed_tokens, outputs, "root")
    for name, module, _ in sublayers_of_llama(hooked):
        kept(module, outputs, name)
    loss = hooked(**BATCH).loss
    loss.backward()

    names = [name for name, *_ in sublayers_of_llama(model)]
    stream, streams = outputs["root"], []
    for name in names:
        stream = stream + outputs[name]
        streams.append(rms(stream))
    norms = [gradient_norm(module, norm) for _, module, norm in sublayers_of_llama(hooked)]
    assert not dynamics.rewritten
    assert dynamics.sublayers == names
    assert dynamics.branch_rms == pytest.approx([rms(outputs[name]) for name in names], rel=TOLERANCE)
    assert dynamics.output_rms == dynamics.read_rms == pytest.approx(streams, rel=TOLERANCE)
    assert dynamics.gradient_norm == pytest.approx(norms, rel=TOLERANCE)
    assert dynamics.loss == pytest.approx(loss.item(), rel=TOLERANCE)


CASES = {
    "tower": (Tower, embeddings().double(), mean_square),
    "llama": (llama, BATCH, None),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, "tower"))
def test_zero_queries_with_sum_are_the_plain_model(case: str) -> None:
    make, inputs, loss = CASES[case]
    model = prepared(make(LAYERS), torch.float64)
    plain = ar.training_dynamics(model, inputs, loss=loss)
    config = ar.AttnResConfig(2, aggregation="sum")
    ar.rewrite(model, config=config, example_inputs=inputs, backend="eager")
    rewritten = ar.training_dynamics(model, inputs, loss=loss)
    assert rewritten.rewritten
    assert rewritten.sublayers == plain.sublayers
    for field in ("branch_rms", "read_rms", "gradient_norm", "loss"):
        assert getattr(rewritten, field) == pytest.approx(getattr(plain, field), rel=TOLERANCE), field
    # The running sum is another: it lacks the embedding, and the first block in the second.
    assert max(rewritten.output_rms[4:]) < min(plain.output_rms[4:])
    randomise_sites(model)
    with ar.disabled(model):
        assert ar.training_dynamics(model, inputs, loss=loss) == plain
    assert ar.training_dynamics(model, inputs, loss=loss).gradient_norm != pytest.approx(plain.gradient_norm)


@pytest.mark.parametrize("blocks", mostly_slow([2, "full"], 2))
def test_random_queries_against_the_hand_written_model(blocks: int | str) -> None:
    x, model = embeddings().double(), prepared(Tower(LAYERS), torch.float64)
    randomise_sites(ar.rewrite(model, blocks, example_inputs=x, backend="eager"))
    dynamics = ar.training_dynamics(model, x, loss=mean_square)

    (queries, gains), sources, outputs = site_parameters(model), list[list[Tensor]](), list[Tensor]()

    def branch(feed: nn.Module, h: Tensor) -> Tensor:
        outputs.append(feed(h))
        return outputs[-1]

    feeds = [(layer.first, layer.second) for layer in model.layers]
    layers = [[lambda h, feed=feed: branch(feed, h) for feed in pair] for pair in feeds]
    last = run_stream(model.embed(x), layers, queries, gains, blocks=blocks, trace=sources)
    mean_square(model.head(model.norm(last))).backward()
    reads = [block_attn_res(*site) for site in zip(sources, queries, gains, strict=True)]

    assert dynamics.sublayers == [f"layers.{i}.{name}" for i in range(LAYERS) for name in ("first", "second")]
    assert dynamics.branch_rms == pytest.approx([rms(output) for output in outputs], rel=TOLERANCE)
    assert dynamics.output_rms == pytest.approx([rms(of_site[-1]) for of_site in sources], rel=TOLERANCE)
    assert dynamics.read_rms == pytest.approx([rms(read) for read in reads], rel=TOLERANCE)
    assert dynamics.gradient_norm == pytest.approx([gradient_norm(f) for pair in feeds for f in pair], rel=TOLERANCE)


class Scaled(Tower):
    """Branch outputs that are scaled as they are added, and taken off."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = torch.add(x, layer.first(x), alpha=0.25)
            x = x - layer.second(x)
        return self.head(self.norm(x))


def test_a_branch_output_is_what_is_added() -> None:
    x, model = embeddings().double(), prepared(Scaled(2), torch.float64)
    plain = ar.training_dynamics(model, x, loss=mean_square)
    outputs = dict[str, Tensor]()
    for name in plain.sublayers:
        kept(model.get_submodule(name), outputs, name)
    model(x)
    scales = [0.25, 1.0] * 2
    expected = [scale * rms(outputs[name]) for scale, name in zip(scales, plain.sublayers, strict=True)]
    assert plain.branch_rms == pytest.approx(expected, rel=TOLERANCE)


def test_parallel_residuals_are_one_sublayer() -> None:
    model = prepared(gpt_neox(2), torch.float64)
    dynamics = ar.training_dynamics(model, BATCH)
    outputs = dict[str, Tensor]()
    for i, layer in enumerate(model.gpt_neox.layers):
        kept(layer.attention, outputs, f"attention {i}")
        kept(layer.mlp, outputs, f"mlp {i}")
    model(**BATCH).loss.backward()
    assert dynamics.sublayers == ["gpt_neox.layers.0", "gpt_neox.layers.1"]
    sums = [rms(outputs[f"attention {i}"] + outputs[f"mlp {i}"]) for i in range(2)]
    assert dynamics.branch_rms == pytest.approx(sums, rel=TOLERANCE)
    assert dynamics.gradient_norm == pytest.approx([gradient_norm(m) for m in model.gpt_neox.layers], rel=TOLERANCE)


@pytest.mark.slow
def test_checkpointed_layers() -> None:
    model = prepared(llama(LAYERS), torch.float64).train()
    expected = ar.training_dynamics(model, BATCH)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    plain = ar.training_dynamics(model, BATCH)
    assert plain.gradient_norm == pytest.approx(expected.gradient_norm, rel=TOLERANCE)
    assert plain.output_rms == pytest.approx(expected.output_rms, rel=TOLERANCE)
    ar.rewrite(model, config=ar.AttnResConfig(2, aggregation="sum"), backend="eager")
    rewritten = ar.training_dynamics(model, BATCH)
    assert rewritten.gradient_norm == pytest.approx(expected.gradient_norm, rel=TOLERANCE)
    assert rewritten.read_rms == pytest.approx(expected.read_rms, rel=TOLERANCE)


@pytest.mark.slow
def test_two_streams_one_of_which_reads_the_other() -> None:
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model = prepared(transformers.T5ForConditionalGeneration(config), torch.float64)
    plain = ar.training_dynamics(model, BATCH)
    hooked = copy.deepcopy(model)
    hooked(**BATCH).loss.backward()
    blocks = [*hooked.encoder.block, *hooked.decoder.block]
    sublayers = [sublayer for block in blocks for sublayer in block.layer]
    assert len(plain.sublayers) == len(sublayers) == 10
    # What is computed once is of none: the encoder's last norm, which every cross-attention reads, and the positions.
    for stack in (hooked.encoder, hooked.decoder):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.zero_()
    assert plain.gradient_norm == pytest.approx([gradient_norm(one) for one in sublayers], rel=TOLERANCE)
    config = ar.AttnResConfig(2, aggregation="sum")
    ar.rewrite(model, config=config, example_inputs=BATCH, backend="eager")
    rewritten = ar.training_dynamics(model, BATCH)
    for field in ("sublayers", "branch_rms", "read_rms", "gradient_norm"):
        values = getattr(plain, field)
        assert getattr(rewritten, field) == (values if field == "sublayers" else pytest.approx(values, rel=TOLERANCE))


class Noisy(nn.Module):
    """A tower with everything that a run may leave a trace in: dropout, a norm with statistics, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.statistics, self.drop = Tower(2), nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.tower(self.drop(self.statistics(x.transpose(1, 2)).transpose(1, 2)))


@pytest.mark.parametrize("rewritten", [False, True])
def test_nothing_of_the_model_changes(rewritten: bool) -> None:
    model = Noisy()
    if rewritten:
        ar.rewrite(model, 2, example_inputs=embeddings(), backend="eager")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(module.__dict__) for module in model.modules()]
    state = torch.get_rng_state()
    first = ar.training_dynamics(model, embeddings(), loss=mean_square)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert [dict(module.__dict__) for module in model.modules()] == attributes
    assert torch.is_grad_enabled()
    assert ar.training_dynamics(model, embeddings(), loss=mean_square) == first


def test_frozen_sublayers_have_no_gradient_norm(tmp_path: Path) -> None:
    model = prepared(Tower(2), torch.bfloat16)
    model.layers[0].second.requires_grad_(False)
    with torch.no_grad():
        dynamics = ar.training_dynamics(model, embeddings().bfloat16(), loss=mean_square)
    assert [math.isnan(norm) for norm in dynamics.gradient_norm] == [False, True, False, False]
    dynamics.save(tmp_path / "dynamics.json")
    saved = json.loads((tmp_path / "dynamics.json").read_text())
    assert saved == dynamics.to_dict()
    assert saved["gradient_norm"][1] is None
    assert saved["output_rms"] == dynamics.output_rms


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain = ar.TrainingDynamics(False, ["a", "b"], [1.0, 2.0], [1.0, 3.0], [1.0, 3.0], [0.5, 0.25], 1.0)
    rewritten = ar.TrainingDynamics(True, ["a", "b"], [1.0, 2.0], [1.0, 2.0], [1.0, 1.5], [0.5, math.nan], 1.0)
    rewritten.plot(tmp_path / "one.png")
    rewritten.plot(tmp_path / "both.png", other=plain)
    one, both = (tmp_path / "one.png").read_bytes(), (tmp_path / "both.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert both.startswith(b"\x89PNG")
    assert one != both


class BreaksBehind(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        logits = self.tower(x)
        torch._dynamo.graph_break()
        return logits.square().mean()


@pytest.mark.slow
def test_a_break_behind_the_layers_is_none_of_its_business() -> None:
    tower = prepared(Tower(2))
    expected = ar.training_dynamics(tower, embeddings(), loss=mean_square)
    dynamics = ar.training_dynamics(BreaksBehind(tower), embeddings())
    assert dynamics.sublayers == [f"tower.{name}" for name in expected.sublayers]
    assert dynamics.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
    rewritten = ar.rewrite(BreaksBehind(tower), 2, example_inputs=embeddings(), backend="eager")
    assert ar.training_dynamics(rewritten, embeddings()).branch_rms[0] == pytest.approx(dynamics.branch_rms[0])


@pytest.mark.parametrize("blocks", [0, 2])
def test_nothing_keeps_the_model_alive(blocks: int) -> None:
    tower = prepared(Tower(2))
    if blocks:
        ar.rewrite(tower, blocks, example_inputs=embeddings(), backend="eager")
    ar.training_dynamics(tower, embeddings(), loss=mean_square)
    weight = weakref.ref(tower.layers[0].first.up.weight)
    del tower
    gc.collect()
    assert weight() is None


def test_a_plain_model_may_have_the_configuration_of_its_rewrite() -> None:
    config = ar.AttnResConfig(sublayers_per_block=3)
    dynamics = ar.training_dynamics(prepared(Tower(2)), embeddings(), loss=mean_square, config=config)
    assert len(dynamics.sublayers) == 4


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module, plain or rewritten, not int"):
        ar.training_dynamics(5)


@pytest.mark.slow
def test_what_is_refused() -> None:
    x = embeddings()
    with pytest.raises(ar.ExampleInputsError, match=r"the model returns a tensor \[2, 9, 61\], and no loss: give"):
        ar.training_dynamics(Tower(2), x)
    with pytest.raises(ar.ExampleInputsError, match="loss= returns a float"):
        ar.training_dynamics(Tower(2), x, loss=lambda output: output.sum().item())
    with pytest.raises(ar.ExampleInputsError, match="does not depend on a parameter"):
        ar.training_dynamics(Tower(2).requires_grad_(False), x, loss=mean_square)
    with pytest.raises(ar.GraphBreakError, match="graph break"):
        ar.training_dynamics(Tower(3, breaks_before=1), x, loss=mean_square)
    with pytest.raises(ar.NoResidualStreamError):
        ar.training_dynamics(Mlp(), x, loss=mean_square)
    with pytest.raises(ar.UnsupportedResidualError, match="post-norm"):
        ar.training_dynamics(bert(), IDS, loss=lambda output: output.last_hidden_state.sum())
