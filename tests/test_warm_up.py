"""What `warm_up` compiles is not compiled later, and nothing else is changed by it."""

import logging

import pytest
import torch
from models import VOCAB, Tower, embeddings, llama, prepared, randomise_sites, token_ids
from torch import nn

import attnres_rewrite as ar


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        self.graphs += 1
        return module.forward


def test_calls_of_the_sizes_and_modes_compile_nothing_more() -> None:
    counting = Counting()
    model = prepared(llama(2))
    model.config.use_cache = False
    randomise_sites(ar.rewrite(model, 2, backend=counting))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.grad = gradient = torch.ones_like(model.lm_head.weight)
    random = torch.random.get_rng_state()

    def step(length: int) -> None:
        ids = token_ids(length=length)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()

    def evaluate(length: int) -> None:
        ids = token_ids(length=length)
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, labels=ids)

    examples = [{"input_ids": ids, "labels": ids} for ids in (token_ids(length=9), token_ids(length=12))]
    ar.warm_up(model, examples)
    compiled = counting.graphs
    # The first mode makes the sizes dynamic for the second one.
    assert compiled == 3
    assert not model.training
    assert model.lm_head.weight.grad is gradient
    assert (gradient == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    for length in (9, 12, 15):
        step(length)
        evaluate(length)
    assert counting.graphs == compiled


def test_the_backward_is_compiled_too() -> None:
    backwards = []

    def loss(output: torch.Tensor) -> torch.Tensor:
        output.register_hook(lambda gradient: backwards.append(gradient.shape))
        return output.square().mean()

    model = ar.rewrite(prepared(Tower(2)), 2, example_inputs=embeddings(), backend="eager").eval()
    ar.warm_up(model, embeddings(), modes=["eval"])
    assert backwards == []
    ar.warm_up(model, embeddings(), modes=["train"], loss=loss)
    assert backwards == [(*embeddings().shape[:2], VOCAB)]


def test_it_says_what_it_compiled(caplog) -> None:
    model = ar.rewrite(prepared(Tower(2)), 2, example_inputs=embeddings(), backend="eager")
    with caplog.at_level(logging.INFO, "attnres_rewrite"):
        ar.warm_up(model, [embeddings()])
    lines = [r.getMessage() for r in caplog.records if r.name == "attnres_rewrite.compile_ahead"]
    assert [line.split(":")[0] for line in lines] == [
        f"{m} call [{tuple(embeddings().shape)}]" for m in ("train", "eval")
    ]


def test_rewrite_says_once_when_a_model_compiles(caplog) -> None:
    ar.api._say_when_it_compiles.cache_clear()
    with caplog.at_level(logging.INFO, "attnres_rewrite.api"):
        for _ in range(2):
            ar.rewrite(prepared(Tower(2)), 2, example_inputs=embeddings(), backend="eager")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "attnres_rewrite.api"]
    assert "warm_up(model, [inputs, ...])" in line


def test_bad_input() -> None:
    plain = prepared(Tower(2))
    with pytest.raises(ar.AttnResError, match="warm_up: this Tower was not rewritten"):
        ar.warm_up(plain, embeddings())
    model: nn.Module = ar.rewrite(plain, 2, example_inputs=embeddings(), backend="eager")
    with pytest.raises(ValueError, match="not 'test'"):
        ar.warm_up(model, embeddings(), modes=["test"])
    with pytest.raises(ar.ExampleInputsError, match="no inputs"):
        ar.warm_up(model, [])
    with pytest.raises(ar.ExampleInputsError, match="is a int"):
        ar.warm_up(model, [3])
