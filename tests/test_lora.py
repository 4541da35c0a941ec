"""LoRA adapters (peft) on a rewritten model, and a rewrite of a model that has adapters."""

import copy
import logging

import pytest
import torch
from models import VOCAB, llama, names_of, prepared, randomise_sites, relative_error, site_parameters, token_ids
from reference_models import reference_llama
from torch import Tensor, nn

import attnres_rewrite as ar

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow
LAYERS, BLOCKS, RANK, ALPHA = 2, 2, 3, 6
TARGETS = ("q_proj", "v_proj", "down_proj")
TOLERANCE = 1e-5  # float32
IDS = token_ids()


def rewritten(model: nn.Module) -> nn.Module:
    return randomise_sites(ar.rewrite(model, BLOCKS, example_inputs={"input_ids": IDS}, backend="eager"))


def with_adapters(model: nn.Module, **options: object) -> nn.Module:
    """Adapters with random numbers on both sides: those of a new one cancel."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), **options)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def merged_by_hand(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """`plain` with W + (alpha / r) B A in the place of every adapted W."""
    merged = copy.deepcopy(plain)
    found = {name.split("base_model.model.", 1)[1]: p.detach() for name, p in adapted.named_parameters()}
    adapted_modules = [name for name, _ in merged.named_modules() if name.endswith(TARGETS)]
    assert len(adapted_modules) == len(TARGETS) * LAYERS
    with torch.no_grad():
        for name in adapted_modules:
            a, b = found[f"{name}.lora_A.default.weight"], found[f"{name}.lora_B.default.weight"]
            assert (a.shape[0], b.shape[1]) == (RANK, RANK)
            merged.get_submodule(name).weight.add_(ALPHA / RANK * b @ a)
    return merged


def reference(plain: nn.Module, adapted: nn.Module) -> Tensor:
    return reference_llama(merged_by_hand(plain, adapted), IDS, *site_parameters(adapted), blocks=BLOCKS)


ORDERS = {
    "before the rewrite": lambda model: rewritten(with_adapters(model)),
    "after the rewrite": lambda model: with_adapters(rewritten(model)),
}


@pytest.mark.parametrize("order", ["before the rewrite", "after the rewrite"])
def test_numbers_names_and_gradients(order) -> None:
    plain = prepared(llama(LAYERS))
    model = ORDERS[order](copy.deepcopy(plain))
    sites = [name for name, _ in ar.attnres_parameters(model)]
    assert sites == names_of("base_model.model.model.attn_res", 2 * LAYERS)
    # peft freezes what it finds: sites that were there before it have to be asked for once more.
    frozen = [name for name, p in ar.attnres_parameters(model) if not p.requires_grad]
    assert frozen == (sites if order == "after the rewrite" else [])
    for _, parameter in ar.attnres_parameters(model):
        parameter.requires_grad_()

    output = model(IDS).logits
    assert relative_error(output, reference(plain, model)) < TOLERANCE
    queries, gains = site_parameters(model)
    assert relative_error(output, reference_llama(plain, IDS, queries, gains, blocks=BLOCKS)) > 1e-2
    assert relative_error(output, reference_llama(merged_by_hand(plain, model), IDS)) > 1e-2

    (output * torch.randn(2, 9, VOCAB)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(TARGETS) * LAYERS
    assert trained == adapters | set(sites)


@pytest.mark.parametrize("order", ["before the rewrite", "after the rewrite"])
@torch.no_grad()
def test_adapters_merge_and_switch_off(order) -> None:
    plain = prepared(llama(LAYERS))
    model = ORDERS[order](copy.deepcopy(plain))
    expected = reference(plain, model)
    queries, gains = site_parameters(model)
    without = reference_llama(plain, IDS, queries, gains, blocks=BLOCKS)
    with model.disable_adapter():
        assert relative_error(model(IDS).logits, without) < TOLERANCE
    assert relative_error(model(IDS).logits, expected) < TOLERANCE
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == [*merged_names(plain)]
    assert relative_error(merged(IDS).logits, expected) < TOLERANCE


def merged_names(plain: nn.Module) -> list[str]:
    """The keys of the model with its sites, which come after its owner's own."""
    names = list(plain.state_dict())
    last = max(i for i, name in enumerate(names) if name.startswith("model."))
    sites = ["model.attn_res._extra_state", *names_of("model.attn_res", 2 * LAYERS)]
    return [*names[: last + 1], *sites, *names[last + 1 :]]


@torch.no_grad()
def test_saved_adapters_load_into_a_rewritten_model(tmp_path) -> None:
    """The adapter's checkpoint holds the adapter alone; the sites are saved with the model."""
    plain = prepared(llama(LAYERS))
    model = ORDERS["after the rewrite"](copy.deepcopy(plain))
    keys = peft.get_peft_model_state_dict(model)
    assert len(keys) == 2 * len(TARGETS) * LAYERS
    assert not any("attn_res" in key for key in keys)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(rewritten(copy.deepcopy(plain)), tmp_path).eval()
    assert relative_error(again(IDS).logits, reference(plain, model)) < TOLERANCE


def test_an_adapter_carries_the_sites_that_it_trains(tmp_path, caplog) -> None:
    """``modules_to_save`` gives it a copy of them; without the adapter the model has its own ones."""
    plain = prepared(llama(LAYERS))
    before = rewritten(copy.deepcopy(plain))
    own = [p.detach().clone() for _, p in ar.attnres_parameters(before)]
    model = with_adapters(before, modules_to_save=["attn_res"])
    found = dict(ar.attnres_parameters(model))
    assert list(found) == names_of("base_model.model.model.attn_res.modules_to_save.default", 2 * LAYERS)
    assert all(p.requires_grad for p in found.values())
    randomise_sites(model, seed=7)
    queries, gains = site_parameters(model)
    output = model(IDS).logits
    assert relative_error(output, reference(plain, model)) < TOLERANCE
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in found.values())
    with model.disable_adapter(), torch.no_grad():
        expected = reference_llama(plain, IDS, own[::2], own[1::2], blocks=BLOCKS)
        assert relative_error(model(IDS).logits, expected) < TOLERANCE
    assert ar.verify(model, {"input_ids": IDS})

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(rewritten(copy.deepcopy(plain)), tmp_path).eval()
    assert relative_error(again(IDS).logits, output) < TOLERANCE
    merged = again.merge_and_unload()
    assert [p.tolist() for _, p in ar.attnres_parameters(merged)] == [p.tolist() for p in found.values()]
    assert relative_error(merged(IDS).logits, output) < TOLERANCE
    # The first compilation of a process leaves a trace of torch's own.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(ar.CheckpointError, match="rewrite the base model with the same blocks"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    other = ar.rewrite(copy.deepcopy(plain), 1, example_inputs={"input_ids": IDS}, backend="eager")
    with pytest.raises(ar.CheckpointError, match=r"blocks \(\(2, 2\),\) there, \(\(4,\),\) here"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert [queries[0].tolist(), gains[0].tolist()] == [found[name].tolist() for name in list(found)[:2]]


def test_an_adapter_that_does_not_fit_is_taken_off_again(tmp_path) -> None:
    plain = prepared(llama(LAYERS))
    with_adapters(rewritten(copy.deepcopy(plain)), modules_to_save=["attn_res"]).save_pretrained(tmp_path)
    other = ar.rewrite(copy.deepcopy(plain), 1, example_inputs={"input_ids": IDS}, backend="eager")
    for model in (plain, other):
        attributes, modules = set(vars(model)), list(model.modules())
        state = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(ar.CheckpointError):
            peft.PeftModel.from_pretrained(model, tmp_path)
        assert set(vars(model)) == attributes
        assert list(model.modules()) == modules
        after = dict(model.named_parameters())
        assert after.keys() == state.keys()
        assert all(p.requires_grad and torch.equal(p, state[name]) for name, p in after.items())
    # One beside another, which stays.
    adapted = with_adapters(plain)
    output = adapted(IDS).logits
    with pytest.raises(ar.CheckpointError):
        adapted.load_adapter(tmp_path, "second")
    assert list(adapted.peft_config) == ["default"]
    assert adapted.active_adapter == "default"
    assert torch.equal(adapted(IDS).logits, output)


@torch.no_grad()
def test_transformers_loads_adapters_itself(tmp_path) -> None:
    """Without a ``PeftModel`` around it: into the rewritten model, and beside the sites that it carries."""
    plain = prepared(llama(LAYERS))
    model = with_adapters(rewritten(copy.deepcopy(plain)))
    model.save_pretrained(tmp_path)
    again = rewritten(copy.deepcopy(plain))
    without = again(IDS).logits
    again.load_adapter(str(tmp_path))
    assert relative_error(again(IDS).logits, reference(plain, model)) < TOLERANCE
    again.disable_adapters()
    assert relative_error(again(IDS).logits, without) < TOLERANCE


@torch.no_grad()
def test_transformers_and_an_adapter_that_carries_sites(tmp_path) -> None:
    plain = prepared(llama(LAYERS))
    model = with_adapters(rewritten(copy.deepcopy(plain)), modules_to_save=["attn_res"])
    randomise_sites(model, seed=7)
    model.save_pretrained(tmp_path)
    again = rewritten(copy.deepcopy(plain))
    again.load_adapter(str(tmp_path))
    assert relative_error(again(IDS).logits, reference(plain, model)) < TOLERANCE
    expected = plain(IDS).logits
    with pytest.raises(ar.CheckpointError, match="rewrite the base model with the same blocks"):
        plain.load_adapter(str(tmp_path))
    assert torch.equal(plain(IDS).logits, expected)


def test_the_sites_may_be_named_by_their_path(tmp_path, caplog) -> None:
    model = with_adapters(rewritten(prepared(llama(LAYERS))), modules_to_save=["model.attn_res"])
    assert all(parameter.requires_grad for _, parameter in ar.attnres_parameters(model))
    model.save_pretrained(tmp_path)
    assert not [r for r in caplog.records if r.name == "attnres_rewrite.huggingface.adapters"]


@pytest.mark.parametrize("trained", [True, False])
def test_an_adapter_without_the_sites_that_were_trained_says_so(tmp_path, caplog, trained) -> None:
    model = ORDERS["after the rewrite"](prepared(llama(LAYERS)))
    for _, parameter in ar.attnres_parameters(model):
        parameter.requires_grad_(trained)
    model.save_pretrained(tmp_path)
    said = [r.getMessage() for r in caplog.records if r.name == "attnres_rewrite.huggingface.adapters"]
    assert ['modules_to_save=["attn_res"]' in line for line in said] == [True] * trained


@torch.no_grad()
def test_undo_keeps_the_adapters() -> None:
    plain = prepared(llama(LAYERS))
    model = ORDERS["before the rewrite"](copy.deepcopy(plain))
    expected = reference_llama(merged_by_hand(plain, model), IDS)
    ar.undo(model)
    assert relative_error(model(IDS).logits, expected) < TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_checkpointing_as_peft_sets_it_up(order) -> None:
    """It makes the embeddings require gradients, by a hook that breaks the graph in the owner's forward."""

    def prepared_model(checkpointing: bool) -> nn.Module:
        model = prepared(llama(LAYERS))
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return ORDERS[order](model).train()

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}

    found, expected = gradients(prepared_model(True)), gradients(prepared_model(False))
    assert len(found) == 2 * len(TARGETS) * LAYERS
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) < TOLERANCE for name in found)
