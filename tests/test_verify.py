"""verify: passes on a right rewrite, fails on a wrong one in any dtype, and leaves the model as it was."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    VOCAB,
    WIDTH,
    Encoder,
    Tower,
    embeddings,
    gpt2,
    gpt_neox,
    llama,
    mostly_slow,
    opt,
    prepared,
    randomise_sites,
    token_ids,
)
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.inspection.verification import relative_difference
from attnres_rewrite.passes import CheckRewrite
from attnres_rewrite.passes.parts import PartWriter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
def test_a_trained_model_passes_and_keeps_its_queries() -> None:
    model = randomise_sites(ar.rewrite(llama(), blocks=3, backend="eager"))
    before = [p.clone() for _, p in ar.attnres_parameters(model)]
    logits = model(token_ids()).logits
    result = ar.verify(model, token_ids())
    assert result
    assert result.passed
    assert result.sites == 10
    assert result.sum_difference < 1e-12
    assert result.without_norm == ()
    assert result.aggregation == "mean"
    assert "verification passed: 10 sites" in str(result)
    assert all(torch.equal(p, b) for (_, p), b in zip(ar.attnres_parameters(model), before, strict=True))
    assert torch.equal(model(token_ids()).logits, logits)


def test_mean_differs_by_the_norms_epsilon_and_sum_does_not() -> None:
    model = ar.rewrite(Tower().double(), blocks=3, example_inputs=embeddings().double(), backend="eager")
    result = ar.verify(model, embeddings().double())
    assert result.sum_difference < 1e-13
    assert 1e-9 < result.difference < 1e-3


@pytest.mark.slow
def test_dropout_draws_the_same_numbers_on_both_sides() -> None:
    model = ar.rewrite(llama(attention_dropout=0.5).train(), blocks=2, backend="eager")
    assert ar.verify(model, token_ids())


PASSING = [*((llama, dtype) for dtype in DTYPES), *((make, torch.bfloat16) for make in (gpt2, gpt_neox, opt, Encoder))]


@pytest.mark.parametrize("case", mostly_slow(PASSING, (llama, torch.bfloat16)))
def test_every_dtype_passes(case) -> None:
    make, dtype = case
    model = randomise_sites(ar.rewrite(prepared(make(2), dtype), blocks=2, backend="eager"))
    result = ar.verify(model, token_ids())
    assert result, result
    assert result.tolerance == 1e-8


class Batched(Tower):
    """Its norm counts, and so does the module itself."""

    def __init__(self) -> None:
        super().__init__(3)
        self.counts, self.calls, self.seen = nn.BatchNorm1d(9), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape[0])
        return super().forward(self.counts(x))


def explained(model: nn.Module, x: Tensor) -> object:
    return ar.explain(ar.undo(model), 2, example_inputs=x)


@pytest.mark.parametrize("verb", [ar.verify, ar.depth_attention, explained])
def test_buffers_and_attributes_stay(verb) -> None:
    model = ar.rewrite(Batched().train(), 2, example_inputs=embeddings(), backend="eager")
    model(embeddings())
    before = {name: value.clone() for name, value in model.state_dict().items() if "attn_res" not in name}
    calls, seen = model.calls, list(model.seen)
    verb(model, embeddings(seed=3))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert (model.calls, model.seen) == (calls, seen)


# Sabotage


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("wrong", ["a term dropped", "the root twice", "a source left out", "a block twice"])
def test_a_wrong_source_of_one_site_fails_in_every_dtype(monkeypatch, dtype, wrong) -> None:
    """In the last site alone, and of small branches: the smallest fault that there is."""

    def sabotaged(
        self: CheckRewrite, module: torch.fx.GraphModule, plan: object, sites: list[Any], before: object
    ) -> int:
        node, sources = sites[-1].node, list(sites[-1].node.args[0])
        with module.graph.inserting_before(node):
            zero = module.graph.call_function(torch.zeros_like, (sources[-1],))
            both = module.graph.call_function(torch.add, (sources[-1], sources[0]))
        zero.meta, both.meta = dict(sources[-1].meta), dict(sources[-1].meta)
        made = {
            "a term dropped": [*sources[:-1], zero],
            "the root twice": [*sources[:-1], both],
            "a source left out": sources[:-1],
            "a block twice": [sources[0], *sources[:-1]],
        }
        node.args = (made[wrong], *node.args[1:])
        return len(sites)

    monkeypatch.setattr(CheckRewrite, "call", sabotaged)
    model = prepared(Tower(2), dtype)
    with torch.no_grad():
        for layer in model.layers:
            layer.first.down.weight.mul_(1e-2)
            layer.second.down.weight.mul_(1e-2)
    x = embeddings().to(dtype)
    ar.rewrite(model, blocks=2, example_inputs=x, backend="eager")
    result = ar.verify(model, x)
    assert not result
    assert result.sum_difference > 100 * result.tolerance


def test_a_wrong_source_list_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckRewrite, "call", lambda self, module, plan, sites, before: len(sites))
    monkeypatch.setattr(PartWriter, "total", lambda self, left, right, *, like: left)
    model = ar.rewrite(Tower(), blocks=2, example_inputs=embeddings(), backend="eager")
    result = ar.verify(model, embeddings())
    assert not result
    assert not result.passed
    assert "FAILED" in str(result)


# Reads without a norm


class NoLastNorm(Tower):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Taken(Tower):
    """A middle value is read by a linear layer as it is."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__(layers)
        self.side = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers[:2]:
            x = layer(x)
        middle = x
        for layer in self.layers[2:]:
            x = layer(x)
        return self.head(self.norm(x)) + self.side(middle)


class ByHand(nn.Module):
    """A norm that no name tells."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class OwnNorms(Tower):
    def __init__(self, centred: bool) -> None:
        super().__init__(3)
        self.norm = ByHand(centred)
        for layer in self.layers:
            layer.first.norm, layer.second.norm = ByHand(centred), ByHand(centred)


FORMS: dict[str, Callable[[nn.Module], object]] = {
    "module": lambda m: ar.rewrite(m, 2, example_inputs=embeddings(), backend="eager"),
    "program": lambda m: ar.rewrite(torch.export.export(m, (embeddings(),)), 2),
    "graph": lambda m: ar.rewrite(torch.fx.symbolic_trace(m), 2, example_inputs=embeddings()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [NoLastNorm, Taken])
def test_rewrite_says_which_reads_have_no_norm(caplog, form, make) -> None:
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        FORMS[form](prepared(make(4)))
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("attnres_rewrite")]
    assert told.startswith("a residual stream is read without a norm at ")
    assert 'AttnResConfig(aggregation="sum") starts as it was everywhere' in told


@pytest.mark.parametrize("make", [lambda: Tower(3), lambda: OwnNorms(False), lambda: OwnNorms(True)])
@pytest.mark.parametrize("form", FORMS)
def test_norms_are_recognised(caplog, form, make) -> None:
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        FORMS[form](prepared(make()))
    assert [record for record in caplog.records if record.name.startswith("attnres_rewrite")] == []


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox, opt, Encoder])
def test_norms_of_known_models_are_recognised(caplog, make) -> None:
    assert [stream.without_norm for stream in ar.explain(make(2), 2).streams] == [()]
    with caplog.at_level(logging.WARNING, "attnres_rewrite"):
        ar.rewrite(make(2), 2, backend="eager")
    assert [record for record in caplog.records if record.name.startswith("attnres_rewrite")] == []


@pytest.mark.parametrize("make", mostly_slow([NoLastNorm, Taken], NoLastNorm))
def test_verify_judges_the_aggregation_of_the_model(make) -> None:
    x = embeddings()
    (stream,) = ar.explain(prepared(make(4)), 2, example_inputs=x).streams
    mean = ar.verify(ar.rewrite(prepared(make(4)), 2, example_inputs=x, backend="eager"), x)
    assert not mean
    assert mean.sum_difference <= mean.tolerance
    assert mean.difference > 0.1
    assert len(mean.without_norm) == 1
    assert stream.without_norm == tuple(mean.without_norm)
    assert "is read without a norm at" in str(mean)
    config = ar.AttnResConfig(2, aggregation="sum")
    summed = ar.verify(ar.rewrite(prepared(make(4)), config=config, example_inputs=x, backend="eager"), x)
    assert summed
    assert summed.difference < 1e-12
    assert "norm" not in str(summed)


class Around(nn.Module):
    """The graph breaks on both sides of the tower."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.tower, self.after = nn.Linear(WIDTH, WIDTH), Tower(3), nn.Linear(VOCAB, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        torch._dynamo.graph_break()
        x = self.tower(x)
        torch._dynamo.graph_break()
        return self.after(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_several_graphs(dtype) -> None:
    x = embeddings().to(dtype)
    model = randomise_sites(ar.rewrite(prepared(Around(), dtype), 2, example_inputs=x, backend="eager"))
    result = ar.verify(model, x)
    assert result, result
    assert (result.sites, result.tolerance) == (6, 1e-8)


def test_an_operator_without_float64() -> None:
    """It runs as it is, and the tolerance follows."""

    @torch.library.custom_op("attnres_test::halves_only", mutates_args=())
    def halves_only(x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return x * 2

    halves_only.register_fake(torch.empty_like)

    class Fixed(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(halves_only(x))

    x = embeddings().bfloat16()
    result = ar.verify(ar.rewrite(prepared(Fixed(3), torch.bfloat16), 2, example_inputs=x, backend="eager"), x)
    assert result
    assert result.tolerance == 4 * torch.finfo(torch.bfloat16).eps


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
