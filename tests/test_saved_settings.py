"""The settings that the numbers depend on travel with the weights, and every way of loading compares them."""

import copy
import dataclasses
import io
import logging

import pytest
import torch
from models import Tower, embeddings, mostly_slow, prepared, randomise_sites, relative_error
from torch import nn

import attnres_rewrite as ar

X = embeddings()
CONFIG = ar.AttnResConfig(blocks=2)


class Wrapped(nn.Module):
    """The owner is not the root, and what is loaded first is not the owner's."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.tower = nn.Linear(X.shape[-1], X.shape[-1]), Tower(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tower(self.embed(x))


def rewritten(config: ar.AttnResConfig = CONFIG, kind: type[nn.Module] = Wrapped) -> nn.Module:
    return ar.rewrite(prepared(kind(4)), config=config, example_inputs=X, backend="eager")


OTHERS = {
    "blocks": ar.AttnResConfig(blocks=4),
    "uneven blocks": ar.AttnResConfig(blocks=[1, 3]),
    "full": ar.AttnResConfig(blocks="full"),
    "aggregation": ar.AttnResConfig(blocks=2, aggregation="sum"),
    "eps": ar.AttnResConfig(blocks=2, eps=1e-5),
    "scale": ar.AttnResConfig(blocks=2, scale=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("strict", [True, False])
def test_other_settings_are_refused_before_anything_is_loaded(name: str, strict: bool) -> None:
    state = randomise_sites(rewritten(OTHERS[name])).state_dict()
    model = rewritten()
    with torch.no_grad():
        model.embed.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    field = "blocks" if name in ("uneven blocks", "full") else name
    with pytest.raises(ar.CheckpointError, match=f"module 'tower' has: {field} .* there, .* here") as raised:
        model.load_state_dict(state, strict=strict)
    assert str(getattr(OTHERS[name], field)) in str(raised.value) or field == "blocks"
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", [Tower, Wrapped])
def test_the_same_settings_bring_the_numbers_back(kind: type[nn.Module]) -> None:
    model = randomise_sites(rewritten(kind=kind))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = rewritten(kind=kind)
    # No pickle but tensors.
    assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert relative_error(other(X), model(X)) == 0
    # What says no more than another number of blocks with the same boundaries is no difference.
    config = ar.AttnResConfig(layers_per_block=2, schedule="two_phase")
    rewritten(config, kind).load_state_dict(model.state_dict())


def test_safetensors_keeps_them(tmp_path) -> None:
    from safetensors.torch import load_model, save_model

    model = randomise_sites(rewritten())
    save_model(model, str(tmp_path / "model.safetensors"))
    other = rewritten()
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert relative_error(other(X), model(X)) == 0
    with pytest.raises(ar.CheckpointError, match="scale"):
        load_model(rewritten(OTHERS["scale"]), str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("form", mostly_slow(["copy", "graph module", "moved"], "graph module"))
def test_every_form_has_the_same_key(form: str) -> None:
    model = randomise_sites(rewritten())
    state = model.state_dict()
    if form == "graph module":
        other = ar.rewrite(torch.fx.symbolic_trace(prepared(Wrapped(4))), config=CONFIG, example_inputs=X)
        wrong = ar.rewrite(torch.fx.symbolic_trace(prepared(Wrapped(4))), config=OTHERS["blocks"], example_inputs=X)
    else:
        make = copy.deepcopy if form == "copy" else lambda m: m.to(torch.bfloat16).to(torch.float32)
        other, wrong = make(rewritten()), make(rewritten(OTHERS["blocks"]))
    assert other.state_dict().keys() == state.keys()
    other.load_state_dict(state)
    assert relative_error(other(X), model(X)) < 1e-6
    with pytest.raises(ar.CheckpointError, match="blocks"):
        wrong.load_state_dict(state)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package logged."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("attnres_rewrite")]


def test_weights_of_version_0_1_load_with_a_warning(caplog) -> None:
    model = randomise_sites(rewritten())
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")}
    other = rewritten()
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        other.load_state_dict(state)
    assert "cannot be checked" in said(caplog)[0]
    assert relative_error(other(X), model(X)) == 0


def test_a_format_of_the_future_is_refused() -> None:
    model = rewritten(kind=Tower)
    state = model.state_dict()
    state["attn_res._extra_state"] = torch.tensor(list(b'{"format": 3}'), dtype=torch.uint8)
    with pytest.raises(ar.CheckpointError, match=r"format \(3\) that this version does not know"):
        model.load_state_dict(state)


def test_a_plain_checkpoint_needs_a_word(caplog) -> None:
    plain = prepared(Wrapped(4)).state_dict()
    model = rewritten()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*tower\.attn_res\.0\.query"):
        model.load_state_dict(plain)
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        model.load_state_dict(plain, strict=False)
        assert "with attnres_rewrite.disabled(model)" in said(caplog)[-1]
        caplog.clear()
        with ar.disabled(model):
            model.load_state_dict(plain, strict=False)
    assert said(caplog) == []


def test_undo_takes_the_comparison_out() -> None:
    state = rewritten(OTHERS["blocks"]).state_dict()
    model = ar.undo(rewritten())
    assert not any("attn_res" in key for key in model.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        model.load_state_dict(state)
    assert set(model.load_state_dict(state, strict=False).unexpected_keys) == {k for k in state if "attn_res" in k}


def test_every_field_that_numbers_depend_on_is_compared() -> None:
    """One that is added to the configuration is put on one side or the other, here too."""
    names = {field.name for field in dataclasses.fields(ar.AttnResConfig)}
    assert names == {"blocks", "aggregation", "eps", "scale", "key_gain", "gate", "value_norm"} | {
        # How the layers are grouped is compared as blocks; how sites are evaluated makes no difference.
        *("layers_per_block", "sublayers_per_block", "schedule", "compile_layers", "streams", "leftovers"),
    }
