"""Two models in lock-step: a step of one, a step of the other, on the same batch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.api import attnres_parameters, rewrite
from attnres_rewrite.demo.corpus import Corpus
from attnres_rewrite.demo.settings import DemoSettings

# The first steps compile, and the first of Adam's allocate its state.
WARM_UP = 2
EVALUATIONS = 10


def build_model(settings: DemoSettings, device: torch.device) -> nn.Module:
    """A byte-level causal language model of Llama's architecture; the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.width,
        intermediate_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * settings.length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(settings.seed)
    model: nn.Module = LlamaForCausalLM(config).to(device)
    return model


class Learner:
    """A model with its optimizer and what it went through.

    Args:
        model: The model, compiled.
        settings: Settings of the demo.

    Attributes:
        losses: Training loss of every step, in nats a byte.
        seconds: Wall time of every step.
        validation: Steps taken and validation loss then.
    """

    def __init__(self, model: nn.Module, settings: DemoSettings) -> None:
        self.model = model
        self.parameters = sum(p.numel() for p in model.parameters())
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self._optimizer = make_optimizer(model, settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _warm_up_then_cosine(settings.steps))

    @property
    def step_seconds(self) -> float:
        """Median wall time of a step, without the first ones."""
        return statistics.median(self.seconds[WARM_UP:] or self.seconds[-1:])

    def step(self, batch: Tensor) -> None:
        """One optimizer step on ``batch``, int64 ``[B, T]``."""
        begin = _now(batch.device)
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.seconds.append(_now(batch.device) - begin)
        self.losses.append(loss.item())

    def loss(self, batch: Tensor) -> Tensor:
        """Mean loss of the next byte, in nats."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def evaluate(self, batches: Sequence[Tensor]) -> None:
        """Note the mean loss over ``batches``."""
        # There is no dropout, so the training graph gives the validation loss too. Under no_grad it would
        # have to be compiled a second time.
        loss = statistics.fmean(self.loss(batch).item() for batch in batches)
        self.validation.append((len(self.losses), loss))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warm_up_then_cosine(steps: int) -> Callable[[int], float]:
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, steps - warm_up)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    return factor


def make_optimizer(model: nn.Module, settings: DemoSettings) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices only."""
    attnres = {name for name, _ in attnres_parameters(model)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if name in attnres or parameter.ndim < 2 else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )


def make_learners(settings: DemoSettings, device: torch.device) -> tuple[Learner, Learner]:
    """The plain model and the rewritten one, from the same weights, compiled by the same backend."""
    plain, rewritten = build_model(settings, device), build_model(settings, device)
    plain.compile(backend=settings.backend)
    rewrite(rewritten, settings.blocks, backend=settings.backend)
    return Learner(plain, settings), Learner(rewritten, settings)


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    settings: DemoSettings,
    device: torch.device,
    on_step: Callable[[int], None],
) -> None:
    """Train all ``learners`` in lock-step, with a validation loss before, after and on the way.

    Args:
        learners: Models that all see the same batches.
        corpus: Where the batches come from.
        settings: Settings of the demo.
        device: Where the models are.
        on_step: Called with the number of steps taken so far, after each.
    """
    held_out = corpus.validation_batches(settings.validation_batches, settings.batch, settings.length)
    held_out = [batch.to(device) for batch in held_out]
    batches = corpus.training_batches(settings.batch, settings.length, settings.seed)
    every = max(1, settings.steps // EVALUATIONS)
    for step in range(settings.steps):
        if step % every == 0:
            for learner in learners:
                learner.evaluate(held_out)
        batch = next(batches).to(device)
        # Alternately one and the other goes first, so that neither always finds the caches warm.
        for learner in learners if step % 2 == 0 else reversed(learners):
            learner.step(batch)
        on_step(step + 1)
    for learner in learners:
        learner.evaluate(held_out)
