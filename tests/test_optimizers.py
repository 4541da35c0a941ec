"""Parameter groups of a rewritten model, and an optimizer that goes on where that of the plain model stopped."""

import copy

import pytest
import torch
from models import Tower, embeddings, llama, names_of, prepared, token_ids
from torch import nn

import attnres_rewrite as ar

LAYERS = 2


def rewritten_llama(**options: object) -> nn.Module:
    return ar.rewrite(prepared(llama(LAYERS, **options)), 2, backend="eager")


def named(model: nn.Module, groups: list[dict]) -> list[set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_the_sites_have_a_group_of_their_own() -> None:
    model = rewritten_llama(attention_bias=True)
    groups = ar.parameter_groups(model, weight_decay=0.1, attnres_lr=0.5)
    matrices, vectors, sites = named(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group.get("lr") for group in groups] == [None, None, 0.5]
    assert sites == set(names_of("model.attn_res", 2 * LAYERS))
    assert all("norm" in name or "bias" in name for name in vectors)
    assert len(vectors) == 1 + LAYERS * (2 + 4)
    assert matrices | vectors | sites == {name for name, _ in model.named_parameters()}
    assert all(p.ndim == 2 for p in groups[0]["params"])
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.5]


def test_frozen_parameters_are_in_no_group() -> None:
    model = rewritten_llama()
    model.lm_head.requires_grad_(False)
    model.model.attn_res.requires_grad_(False)
    next(iter(model.model.attn_res)).query.requires_grad_()
    matrices, _, sites = named(model, ar.parameter_groups(model))
    assert "lm_head.weight" not in matrices
    assert sites == {"model.attn_res.0.query"}
    model.model.attn_res.requires_grad_(False)
    with pytest.raises(ar.AttnResError, match=r"are frozen .* call requires_grad_\(\)"):
        ar.parameter_groups(model)


def test_a_plain_model_has_no_sites_to_group() -> None:
    for function in (ar.parameter_groups, ar.muon_groups):
        with pytest.raises(ar.AttnResError, match=r"rewrite\(model, blocks=8\)"):
            function(prepared(llama(LAYERS)))


def test_what_is_no_model() -> None:
    for call in (ar.parameter_groups, ar.muon_groups, lambda one: ar.load_plain_optimizer_state(one, {}, one)):
        with pytest.raises(TypeError, match=r"rewritten nn\.Module, not int"):
            call(5)


def test_muon_gets_the_matrices_of_the_layers() -> None:
    model = rewritten_llama()
    muon, others = ar.muon_groups(model, weight_decay=0.1)
    (matrices,) = named(model, muon)
    projections = {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(LAYERS)
        for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }
    assert matrices == projections
    rest = named(model, others)
    assert set().union(*rest, matrices) == {name for name, _ in model.named_parameters()}
    assert rest[-1] == set(names_of("model.attn_res", 2 * LAYERS))
    assert {"model.embed_tokens.weight", "lm_head.weight"} == rest[0]
    # It refuses whatever is no matrix.
    optimizers = torch.optim.Muon(muon, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    unchanged = {n for n, p in model.state_dict().items() if torch.equal(p, before[n])}
    # A gain gets no gradient while its query is zero.
    assert unchanged == {"model.attn_res._extra_state", *(f"model.attn_res.{i}.gain" for i in range(2 * LAYERS))}


def test_state_of_the_plain_models_optimizer_goes_on() -> None:
    """Trained plainly, then rewritten: with zero queries and "sum" the old parameters take the plain model's step."""
    x = embeddings()

    def groups_of(model: nn.Module) -> list[dict]:
        if any(ar.attnres_parameters(model)):
            return ar.parameter_groups(model, weight_decay=0.1)
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        return [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = prepared(Tower(2), torch.float64)
    x = x.double()
    old = torch.optim.AdamW(groups_of(plain), lr=1e-2)
    for _ in range(3):
        step(plain, old)
    config = ar.AttnResConfig(2, aggregation="sum")
    model = ar.rewrite(copy.deepcopy(plain), config=config, example_inputs=x, backend="eager")
    new = torch.optim.AdamW(groups_of(model), lr=1.0)
    ar.load_plain_optimizer_state(new, copy.deepcopy(old.state_dict()), model)
    assert [group["lr"] for group in new.param_groups] == [1e-2, 1e-2, 1.0]
    without = copy.deepcopy(model)
    step(plain, old)
    step(model, new)
    step(without, torch.optim.AdamW(groups_of(without), lr=1e-2))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-9)
    assert any(
        (without.get_parameter(name) - parameter).abs().max() > 1e-3 for name, parameter in plain.named_parameters()
    )


def test_state_that_does_not_fit_is_refused_and_nothing_loaded() -> None:
    model = rewritten_llama()
    optimizer = torch.optim.AdamW(ar.parameter_groups(model))
    plain = prepared(llama(LAYERS))
    every = torch.optim.AdamW(plain.parameters())
    with pytest.raises(ar.CheckpointError, match=r"begins with 'model\.embed_tokens\.weight'"):
        ar.load_plain_optimizer_state(optimizer, every.state_dict(), model)
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    turned = torch.optim.AdamW([{"params": matrices[::-1]}, {"params": vectors}])
    for parameter in plain.parameters():
        parameter.grad = torch.ones_like(parameter)
    turned.step()
    with pytest.raises(ar.CheckpointError, match="are in another order"):
        ar.load_plain_optimizer_state(optimizer, turned.state_dict(), model)
    more = torch.optim.AdamW([{"params": matrices}, {"params": vectors}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(ar.CheckpointError, match="more parameter groups"):
        ar.load_plain_optimizer_state(optimizer, more.state_dict(), model)
    same = torch.optim.AdamW([{"params": matrices}, {"params": vectors}]).state_dict()
    with pytest.raises(ar.CheckpointError, match=r"in none of its groups: \[99\]"):
        ar.load_plain_optimizer_state(optimizer, {**same, "state": {99: {}}}, model)
    assert optimizer.state_dict()["state"] == {}
