"""Autocast, models in half precision, and dropout: what reduced precision and noise may change, and what not."""

import copy

import pytest
import torch
from models import (
    VOCAB,
    Tower,
    embeddings,
    llama,
    logits,
    prepared,
    randomise_sites,
    relative_error,
    site_parameters,
    token_ids,
)
from reference_models import run_stream
from torch import Tensor, nn

import attnres_rewrite as ar

LAYERS, BLOCKS = 2, 2
pytestmark = pytest.mark.slow
HALVES = [torch.bfloat16, torch.float16]
IDS = token_ids()
SUM = ar.AttnResConfig(blocks=BLOCKS, aggregation="sum")


def tolerance(dtype: torch.dtype) -> float:
    """A few roundings of random sign: one a matrix product and one an add of the stream, of which there are 30."""
    return 30**0.5 * torch.finfo(dtype).eps


def step(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients, under autocast to ``dtype`` if given."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = logits(model(IDS))
    # A sum and no mean, whose gradients would be too small for float16 without a scaler of the loss.
    (output.float() * torch.linspace(-1, 1, VOCAB)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return prepared(llama(LAYERS))


@pytest.fixture
def model(original) -> nn.Module:
    """With random queries, in float32."""
    return randomise_sites(ar.rewrite(copy.deepcopy(original), BLOCKS, backend="aot_eager"))


def test_autocast_equals_float32(model) -> None:
    expected, gradients = step(model)
    for dtype in HALVES:
        actual, found = step(model, dtype)
        assert actual.dtype == dtype
        assert 1e-5 < relative_error(actual.float(), expected) < tolerance(dtype)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        # Together: single queries get a sum of terms that cancel, of which the model by hand rounds as much.
        sites = [torch.cat([group[name] for name, _ in ar.attnres_parameters(model)]) for group in (found, gradients)]
        assert relative_error(*sites) < 4 * tolerance(dtype), dtype
    # What was compiled under autocast is not used without it.
    assert torch.equal(step(model)[0], expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_at_zero_queries_equals_the_original_under_autocast(original, dtype) -> None:
    expected, gradients = step(original, dtype)
    model = ar.rewrite(copy.deepcopy(original), config=SUM, backend="eager")
    actual, found = step(model, dtype)
    assert relative_error(actual.float(), expected.float()) < tolerance(dtype)
    together = [torch.cat([group[name].flatten() for name in gradients]) for group in (found, gradients)]
    assert relative_error(*together) < 2 * tolerance(dtype)
    exact = step(model)[0]
    # No further from float32 than plain residuals are, but for luck.
    assert relative_error(actual.float(), exact) < 1.5 * relative_error(expected.float(), step(original)[0])


def test_stream_stays_in_float32_under_autocast() -> None:
    """Autocast leaves adds alone, and so the sites: a float32 stream is not rounded where AttnRes reads it."""
    seen = []

    def inner(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        attnres = torch.ops.attnres.block_attn_res.default
        seen.extend(n.meta["example_value"].dtype for n in module.graph.nodes if n.target is attnres)
        return module.forward

    model = ar.rewrite(prepared(llama(LAYERS)), BLOCKS, backend=inner)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert seen == [torch.float32] * 2 * LAYERS


@pytest.mark.parametrize("dtype", HALVES)
def test_model_in_half_precision(original, model, dtype) -> None:
    expected = logits(model(IDS)).detach()
    half = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    actual, gradients = step(half)
    assert actual.dtype == dtype
    assert 1e-5 < relative_error(actual.float(), expected) < tolerance(dtype)
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    assert all(gradients[name].isfinite().all() and gradients[name].any() for name, _ in ar.attnres_parameters(half))


@torch.no_grad()
def test_half_precision_at_zero_queries_equals_the_original(original) -> None:
    for dtype in HALVES:
        plain = copy.deepcopy(original).to(dtype)
        model = ar.rewrite(copy.deepcopy(plain), config=SUM, backend="eager")
        assert {p.dtype for _, p in ar.attnres_parameters(model)} == {dtype}
        error = relative_error(logits(model(IDS)).float(), logits(plain(IDS)).float())
        assert error < tolerance(dtype)
        rounding = relative_error(logits(plain(IDS)).float(), logits(original(IDS)))
        assert relative_error(logits(model(IDS)).float(), logits(original(IDS))) < 1.5 * rounding


class Dropping(Tower):
    """With dropout in every layer, and on the root of the stream."""

    def __init__(self) -> None:
        super().__init__(4)
        self.embed = nn.Sequential(self.embed, nn.Dropout(0.2))
        for layer in self.layers:
            layer.first.down = nn.Sequential(layer.first.down, nn.Dropout(0.2))
            layer.second.down = nn.Sequential(layer.second.down, nn.Dropout(0.2))

    def by_hand(self, x: Tensor) -> Tensor:
        """The same sublayers in the same order, so the same masks under one seed."""
        layers = [(layer.first, layer.second) for layer in self.layers]
        return self.head(self.norm(run_stream(self.embed(x), layers, *site_parameters(self), blocks=BLOCKS)))


@torch.no_grad()
def test_dropout_with_random_queries_equals_the_model_by_hand() -> None:
    x = embeddings().double()
    model = prepared(Dropping(), torch.float64).train()
    randomise_sites(ar.rewrite(model, BLOCKS, example_inputs=x, backend="eager"))
    outputs = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs[seed] = model(x)
        torch.manual_seed(seed)
        assert relative_error(outputs[seed], model.by_hand(x)) < 1e-9
    assert relative_error(outputs[1], outputs[2]) > 1e-2
    torch.manual_seed(1)
    assert torch.equal(model(x), outputs[1])
    model.eval()
    assert relative_error(model(x), model.by_hand(x)) < 1e-9
    assert torch.equal(model(x), model(x))
