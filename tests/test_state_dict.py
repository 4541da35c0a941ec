"""Names: what the model had keeps its keys, the new ones are predictable, and weights move in and out."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from models import (
    ARCHITECTURES,
    WIDTH,
    Encoder,
    Tower,
    embeddings,
    llama,
    logits,
    mostly_slow,
    names_of,
    prepared,
    randomise_sites,
    relative_error,
    token_ids,
)
from torch import nn

import attnres_rewrite as ar


def rewrite(model: nn.Module, **options: object) -> nn.Module:
    return ar.rewrite(model, 2, **{"backend": "eager", **options})


@pytest.mark.parametrize("name", mostly_slow(ARCHITECTURES, "gpt2"))
def test_old_names_stay_and_new_names_are_the_owners(name) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.make(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [key for key, _ in model.named_parameters()]
    kind, methods = type(model), inspect.signature(model.forward)
    rewrite(model, example_inputs=architecture.inputs(2, 9))
    after = model.state_dict()
    expected = names_of(f"{architecture.owner}.attn_res", 3 * architecture.sites_per_layer)
    settings = f"{architecture.owner}.attn_res._extra_state"
    assert [key for key in after if key not in before] == [settings, *expected]
    assert [key for key in after if key in before] == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [key for key, _ in model.named_parameters() if "attn_res" not in key] == parameters
    assert [key for key, _ in ar.attnres_parameters(model)] == expected
    assert (type(model), inspect.signature(model.forward)) == (kind, methods)


def test_the_root_as_owner() -> None:
    model = rewrite(Tower(2), example_inputs=embeddings())
    assert [name for name, _ in ar.attnres_parameters(model)] == names_of("attn_res", 4)


def test_without_gains() -> None:
    config = ar.AttnResConfig(key_gain=False)
    model = ar.rewrite(llama(3), 2, config=config, backend="eager")
    assert [name for name, _ in ar.attnres_parameters(model)] == names_of("model.attn_res", 6, ["query"])


def test_parameters_take_dtype_and_device_of_the_owner() -> None:
    with torch.device("meta"):
        model = llama(3).to(torch.bfloat16)
    rewrite(model, example_inputs=token_ids())
    for name, parameter in ar.attnres_parameters(model):
        assert (parameter.shape, parameter.dtype) == ((WIDTH,), torch.bfloat16), name
        assert parameter.device.type == "meta"
    assert model.config.use_cache is True
    model = rewrite(llama(3).double())
    values = {(name.rsplit(".", 1)[-1], *p.unique().tolist()) for name, p in ar.attnres_parameters(model)}
    assert values == {("query", 0.0), ("gain", 1.0)}
    assert {p.dtype for _, p in ar.attnres_parameters(model)} == {torch.float64}
    assert all(p.requires_grad for _, p in ar.attnres_parameters(model))


def test_loading_a_plain_checkpoint_reports_the_new_names() -> None:
    checkpoint = prepared(llama(3)).state_dict()
    model = rewrite(llama(3))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*model\.attn_res\.0\.query"):
        model.load_state_dict(checkpoint)
    report = model.load_state_dict(checkpoint, strict=False)
    assert report.missing_keys == ["model.attn_res._extra_state", *names_of("model.attn_res", 6)]
    assert report.unexpected_keys == []
    plain = llama(3)
    plain.load_state_dict(checkpoint)
    ids = token_ids()
    with torch.no_grad(), ar.disabled(model):
        assert torch.equal(logits(model(ids)), logits(plain(ids)))


def test_loading_a_rewritten_checkpoint_into_a_plain_model() -> None:
    report = llama(3).load_state_dict(rewrite(llama(3)).state_dict(), strict=False)
    assert report.unexpected_keys == ["model.attn_res._extra_state", *names_of("model.attn_res", 6)]
    assert report.missing_keys == []


@pytest.mark.slow
def test_saved_state_restores_the_model() -> None:
    model = randomise_sites(rewrite(prepared(llama(3))))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = rewrite(llama(3).eval())
    # Weights that are loaded after a graph was compiled count all the same.
    twin(token_ids())
    assert twin.load_state_dict(torch.load(file, weights_only=True)) is not None
    assert torch.equal(logits(twin(token_ids())), logits(model(token_ids())))


@pytest.mark.slow
def test_pickle_keeps_everything() -> None:
    model = randomise_sites(rewrite(prepared(llama(3))))
    expected = logits(model(token_ids()))
    twin = pickle.loads(pickle.dumps(model))
    state, copied = model.state_dict(), twin.state_dict()
    assert list(state) == list(copied)
    assert all(torch.equal(copied[key], value) for key, value in state.items())
    assert torch.equal(logits(twin(token_ids())), expected)
    with ar.disabled(twin):
        assert not torch.equal(logits(twin(token_ids())), expected)
    ar.undo(twin)
    assert [key for key, _ in ar.attnres_parameters(twin)] == []


@pytest.mark.parametrize("make", [llama, Encoder], ids=["llama", "encoder"])
def test_undo_restores_the_model(make) -> None:
    model = prepared(make(3))
    ids = token_ids()
    original = copy.deepcopy(model)
    look = [(name, sorted(module.__dict__)) for name, module in model.named_modules()]
    randomise_sites(rewrite(model))
    assert relative_error(logits(model(ids)), logits(original(ids))) > 1e-2
    assert ar.undo(model) is model
    assert [(name, sorted(set(m.__dict__) - {"_compiled_call_impl"})) for name, m in model.named_modules()] == look
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == list(original.state_dict())
    assert torch.equal(logits(model(ids)), logits(original(ids)))
    assert torch.equal(logits(torch.compile(model, backend="eager")(ids)), logits(original(ids)))
    with pytest.raises(ar.AttnResError, match=r"undo: this .* was not rewritten in place"):
        ar.undo(model)


@pytest.mark.slow
def test_rewrite_after_undo_starts_afresh() -> None:
    model = prepared(llama(3))
    plain = logits(model(token_ids())).detach()
    randomise_sites(rewrite(model))
    model(token_ids())
    ar.undo(model)
    config = ar.AttnResConfig(blocks="full", aggregation="sum")
    ar.rewrite(model, config=config, backend="eager")
    assert relative_error(logits(model(token_ids())), plain) < 1e-5


@pytest.mark.slow
def test_a_forward_of_the_instance_is_kept_and_given_back() -> None:
    """As libraries leave there that wrap the forward of a module (accelerate's hooks do)."""
    model = prepared(llama(3))
    calls = []
    inner = model.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(torch.compiler.is_compiling())
        return inner(*args, **kwargs)

    model.model.forward = counted
    rewrite(model)
    calls.clear()
    model(token_ids())
    assert calls, "the wrapper runs"
    ar.undo(model)
    assert model.model.forward is counted


def test_modes_and_devices_reach_the_sites() -> None:
    model = rewrite(llama(3).eval())
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.requires_grad_(False)
    assert not any(p.requires_grad for _, p in ar.attnres_parameters(model))
    assert "AttnResSite(width=32, gain=True)" in repr(model)


def test_names_of_a_graph_module_match_its_tree() -> None:
    module = ar.rewrite(torch.fx.symbolic_trace(Tower(2)), 2, example_inputs=embeddings())
    assert [name for name, _ in ar.attnres_parameters(module)] == names_of("attn_res", 4)
    twin = copy.deepcopy(module)
    randomise_sites(twin)
    module.load_state_dict(twin.state_dict())
    assert torch.equal(module(embeddings()), twin(embeddings()))
