"""Activation checkpointing changes the memory of a rewritten model and not its numbers."""

import logging

import pytest
import torch
from models import (
    VOCAB,
    Tower,
    activations_kept,
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
from torch.utils.checkpoint import checkpoint

import attnres_rewrite as ar

pytestmark = pytest.mark.slow
LAYERS, BLOCKS = 3, 2
TOLERANCE = 1e-9  # float64


class CheckpointedTower(Tower):
    """Every layer a checkpointed region; ``span`` layers where it is more than one."""

    def __init__(self, layers: int = LAYERS, span: int = 1, reentrant: bool = False) -> None:
        super().__init__(layers)
        self.span, self.reentrant = span, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for first in range(0, len(self.layers), self.span):
            x = checkpoint(self.run, x, first, use_reentrant=self.reentrant)
        return self.head(self.norm(x))

    def run(self, x: Tensor, first: int) -> Tensor:
        for layer in self.layers[first : first + self.span]:
            x = layer(x)
        return x


def train_step(model: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and how many bytes of activations were kept for the backward pass."""
    model.zero_grad()
    with activations_kept(model) as kept:
        output = logits(model(inputs))
        loss = (output * torch.linspace(-1, 1, VOCAB, dtype=output.dtype)).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, sum(kept.values())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    floor = 1e-6 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= TOLERANCE * torch.maximum(gradient.norm(), floor), name


def regions(caplog: pytest.LogCaptureFixture) -> int:
    """How many checkpointed regions the last graph had."""
    return [int(m.split()[1]) for m in caplog.messages if m.startswith("InlineRegions:")][-1]


def plain_llama() -> nn.Module:
    model = prepared(llama(2), torch.float64).train()
    # With the cache on, checkpointing says at every step that it switches the cache off.
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, dict[str, Tensor], int]:
    model = randomise_sites(ar.rewrite(plain_llama(), BLOCKS, backend="aot_eager"))
    return train_step(model, token_ids())


@pytest.mark.parametrize("enabled", ["before the rewrite", "after a step"])
def test_hugging_face(expected, enabled, caplog) -> None:
    caplog.set_level(logging.DEBUG, "attnres_rewrite")
    loss, gradients, kept = expected
    model = plain_llama()
    if enabled == "before the rewrite":
        model.activation_checkpointing_enable()
    randomise_sites(ar.rewrite(model, BLOCKS, backend="aot_eager"))
    if enabled == "after a step":
        assert relative_error(train_step(model, token_ids())[0], loss) < TOLERANCE
        assert regions(caplog) == 0
        model.activation_checkpointing_enable()
    actual, grads, less = train_step(model, token_ids())
    assert regions(caplog) == 2
    assert relative_error(actual, loss) < TOLERANCE
    assert_same(grads, gradients)
    assert less < 0.6 * kept


def test_hugging_face_with_its_cache_left_on(expected) -> None:
    model = plain_llama()
    model.config.use_cache = True
    model.activation_checkpointing_enable()
    randomise_sites(ar.rewrite(model, BLOCKS, backend="eager"))
    assert relative_error(train_step(model, token_ids())[0], expected[0]) < TOLERANCE


def reference(model: Tower, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the tower, run by hand with its own sublayers."""
    layers = [(layer.first, layer.second) for layer in model.layers]
    queries, gains = ([p.clone().requires_grad_() for p in part] for part in site_parameters(model))
    model.zero_grad()
    output = model.head(model.norm(run_stream(model.embed(x), layers, queries, gains, blocks=BLOCKS)))
    (output * torch.linspace(-1, 1, VOCAB, dtype=output.dtype)).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if "attn_res" not in name}
    for i, (query, gain) in enumerate(zip(queries, gains, strict=True)):
        found |= {f"attn_res.{i}.query": query.grad, f"attn_res.{i}.gain": gain.grad}
    return found


@pytest.mark.parametrize(
    ("backend", "reentrant", "span"), [("eager", False, 2), ("aot_eager", False, 1), ("aot_eager", True, 2)]
)
def test_by_hand(backend, reentrant, span, caplog) -> None:
    """Regions of one layer, and regions that end elsewhere than the blocks do."""
    caplog.set_level(logging.DEBUG, "attnres_rewrite")
    x = embeddings().double()
    model = prepared(CheckpointedTower(4, span, reentrant), torch.float64).train()
    randomise_sites(ar.rewrite(model, BLOCKS, example_inputs=x, backend=backend))
    assert [name for name, _ in ar.attnres_parameters(model)][-1] == "attn_res.7.gain"
    _, gradients, kept = train_step(model, x)
    assert regions(caplog) == 4 // span
    assert_same(gradients, reference(model, x))
    if backend == "aot_eager":
        plain = prepared(Tower(4), torch.float64).train()
        randomise_sites(ar.rewrite(plain, BLOCKS, example_inputs=x, backend=backend))
        assert kept < 0.7 * train_step(plain, x)[2]


class Dropping(CheckpointedTower):
    """With dropout, whose masks the recomputation has to draw again."""

    def __init__(self) -> None:
        super().__init__(4)
        for layer in self.layers:
            layer.first.down = nn.Sequential(layer.first.down, nn.Dropout(0.3))


def test_dropout_inside_regions() -> None:
    """Forward and recomputation draw one mask: the gradient is that of the loss, by finite differences."""
    x = embeddings().double()
    model = prepared(Dropping(), torch.float64).train()
    randomise_sites(ar.rewrite(model, BLOCKS, example_inputs=x, backend="aot_eager"))
    torch.manual_seed(3)
    loss, gradients, _ = train_step(model, x)
    for name in ("attn_res.2.query", "layers.0.first.up.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            torch.manual_seed(3)
            losses.append(train_step(model, x)[0])
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-5)
        slope = (losses[0] - losses[1]) / 2e-5
        assert relative_error((gradients[name] * direction).sum(), slope) < 1e-5, name
    torch.manual_seed(4)
    assert relative_error(train_step(model, x)[0], loss) > 1e-3


def test_without_gradients() -> None:
    model = plain_llama()
    model.activation_checkpointing_enable()
    randomise_sites(ar.rewrite(model, BLOCKS, backend="eager"))
    with torch.no_grad():
        trained = logits(model(token_ids()))
        evaluated = logits(model.eval()(token_ids()))
    assert relative_error(evaluated, trained) < TOLERANCE
