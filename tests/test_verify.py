"""verify: passes on a right rewrite, fails on a wrong one, and leaves the model as it was."""

import math

import pytest
import torch
from models import Tower, embeddings, llama, randomise_sites, token_ids

import attnres_rewrite as ar
from attnres_rewrite.passes import CheckRewrite
from attnres_rewrite.passes.parts import PartWriter
from attnres_rewrite.verification import relative_difference


def test_a_trained_model_passes_and_keeps_its_queries() -> None:
    model = randomise_sites(ar.rewrite(llama(), blocks=3, backend="eager"))
    before = [p.clone() for _, p in ar.attnres_parameters(model)]
    logits = model(token_ids()).logits
    result = ar.verify(model, token_ids())
    assert result.passed
    assert result.sites == 10
    assert result.sum_difference < 1e-5
    assert result.aggregation == "mean"
    assert "verification passed: 10 sites" in str(result)
    assert all(torch.equal(p, b) for (_, p), b in zip(ar.attnres_parameters(model), before, strict=True))
    assert torch.equal(model(token_ids()).logits, logits)


def test_mean_differs_by_the_norms_epsilon_and_sum_does_not() -> None:
    model = ar.rewrite(Tower().double(), blocks=3, example_inputs=embeddings().double(), backend="eager")
    result = ar.verify(model, embeddings().double())
    assert result.sum_difference < 1e-13
    assert 1e-9 < result.difference < 1e-3


def test_dropout_draws_the_same_numbers_on_both_sides() -> None:
    model = ar.rewrite(llama(attention_dropout=0.5).train(), blocks=2, backend="eager")
    assert ar.verify(model, token_ids()).passed


def test_a_wrong_source_list_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckRewrite, "call", lambda self, module, plan, sites, before: len(sites))
    monkeypatch.setattr(PartWriter, "total", lambda self, left, right, *, like: left)
    model = ar.rewrite(Tower(), blocks=2, example_inputs=embeddings(), backend="eager")
    result = ar.verify(model, embeddings())
    assert not result.passed
    assert "FAILED" in str(result)


def test_a_plain_model_is_an_error() -> None:
    with pytest.raises(ar.AttnResError, match="call rewrite"):
        ar.verify(Tower(), embeddings())


def test_a_difference_is_never_lost_in_nan() -> None:
    ones, inf = torch.ones(2, 3), torch.tensor([1.0, -torch.inf])
    nan = torch.where(torch.eye(2, 3) > 0, torch.nan, ones)
    assert relative_difference([ones, ones], [ones, ones]) == 0.0
    assert relative_difference([nan, ones], [ones, ones]) == math.inf
    assert relative_difference([ones, ones], [nan, ones]) == math.inf
    assert relative_difference([inf], [inf]) == 0.0
    assert relative_difference([torch.tensor([2.0, -torch.inf])], [inf]) == 1.0
    assert relative_difference([torch.tensor([1.0, 0.0])], [inf]) == math.inf
    assert relative_difference([ones[:1]], [ones]) == math.inf
