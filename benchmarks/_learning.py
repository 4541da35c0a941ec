"""One training run of `benchmarks/learning.py`: who learns, from what, and what is written down."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _environment import environment, write_results
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import AttnResConfig, log_dict, parameter_groups, rewrite, training_dynamics
from attnres_rewrite.demo.corpus import Corpus, standard_library

VOCABULARY = 256
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
WARM_UP = 0.05
# Parts of a run at which the held-out loss is taken, and those at which the inside of the model is looked at.
EVALUATIONS = 20
LOOKS = (0.0, 0.1, 0.25, 0.5, 1.0)

STAGES = ("scratch", "retrofit")
# None is a model that is not rewritten.
CONTESTANTS: dict[str, AttnResConfig | None] = {
    "plain": None,
    "mean-2": AttnResConfig(blocks=2),
    "mean-4": AttnResConfig(blocks=4),
    "mean-8": AttnResConfig(blocks=8),
    "full": AttnResConfig(blocks="full"),
    "sum-8": AttnResConfig(blocks=8, aggregation="sum"),
    "add-8": AttnResConfig(blocks=8, aggregation="add"),
    "mean-8-gate": AttnResConfig(blocks=8, gate=True),
    "sum-8-gate": AttnResConfig(blocks=8, aggregation="sum", gate=True),
    "add-8-gate": AttnResConfig(blocks=8, aggregation="add", gate=True),
    "mhc-4": None,
}
# Manifold-constrained hyper-connections, by the number of streams; from a package that is asked for then only.
STREAMS = {"mhc-4": 4}


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama over bytes, and how long it learns: ``steps`` of ``batch`` windows of ``length`` bytes."""

    layers: int
    width: int
    batch: int
    length: int
    steps: int
    held_out: int = 128
    backend: str = "inductor"
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    extra_rates: int = 3
    seeds: int = 3

    @property
    def tokens(self) -> int:
        """Bytes trained on."""
        return self.steps * self.batch * self.length


SIZES = {
    "quick": Size(2, 32, 2, 32, steps=4, held_out=4, backend="eager", rates=(2e-3,), extra_rates=0, seeds=2),
    "0.4M": Size(layers=8, width=64, batch=16, length=128, steps=1000),
    "1.6M": Size(layers=8, width=128, batch=16, length=128, steps=2000),
    "5M": Size(layers=12, width=192, batch=16, length=128, steps=4000, rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "50M": Size(layers=16, width=512, batch=64, length=512, steps=8000, rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides the numbers of a run: nothing else does, but the versions and the machine that its file names.

    Attributes:
        size: A key of ``SIZES``.
        contestant: A key of ``CONTESTANTS``.
        rate: The learning rate.
        seed: Of the weights and of the order of the text.
        stage: ``"scratch"``, or ``"retrofit"``: a trained plain model goes on with other text.
        attnres_rate: The learning rate of the sites, as a multiple.
    """

    size: str
    contestant: str
    rate: float
    seed: int
    stage: str = "scratch"
    attnres_rate: float = 1.0

    @property
    def path(self) -> Path:
        """Its file, below the folder of results."""
        folder = Path(self.size) if self.stage == "scratch" else Path(self.size) / self.stage
        times = "" if self.attnres_rate == 1.0 else f"x{self.attnres_rate:g}"
        return folder / f"{self.contestant}_lr{self.rate:g}{times}_seed{self.seed}.json"

    @property
    def shape(self) -> Size:
        """The model and how long it learns: half as long where it goes on."""
        size = SIZES[self.size]
        return size if self.stage == "scratch" else dataclasses.replace(size, steps=size.steps // 2)


class Text:
    """Training text, and two parts that are held out, of other files: one to choose by, one to report."""

    def __init__(self, corpus: Corpus) -> None:
        held_out = corpus.validation
        # A zero byte ends every file.
        ends = (held_out == 0).nonzero().flatten()
        middle = int(ends[len(ends) // 2]) + 1
        self.train = corpus
        self.validation = dataclasses.replace(corpus, validation=held_out[:middle])
        self.test = dataclasses.replace(corpus, validation=held_out[middle:])

    def batch(self, size: Size, seed: int, step: int) -> Tensor:
        """Windows of the training text, int64 ``[batch, length]``: the same for every contestant."""
        return next(self.train.training_batches(size.batch, size.length, 1_000_003 * (seed + 1) + step))

    def digest(self) -> str:
        """Says whether two runs had the same text."""
        text = torch.cat([self.train.train, self.train.validation]).numpy().tobytes()
        return hashlib.sha256(text).hexdigest()[:16]


def read_text(stage: str = "scratch") -> Text:
    """The standard library; for a model that goes on, its tests, which the standard library does not have in it."""
    return Text(standard_library(None if stage == "scratch" else Path(sysconfig.get_path("stdlib")) / "test"))


def build(
    run: Run, device: torch.device, weights: dict[str, Tensor] | None = None
) -> tuple[LlamaForCausalLM, nn.Module]:
    """The model, and what is called to run it; contestants of one seed begin with the same weights, or ``weights``."""
    size, contestant = run.shape, run.contestant
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 32),
        num_key_value_heads=max(1, size.width // 32),
        max_position_embeddings=size.length,
        use_cache=False,
    )
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(config).to(device)
    if weights is not None:
        model.load_state_dict(weights)
    if contestant in STREAMS:
        from _hyper_connections import use_hyper_connections

        use_hyper_connections(model, STREAMS[contestant])
        model.to(device)
    chosen = CONTESTANTS[contestant]
    if chosen is None:
        return model, torch.compile(model, backend=size.backend, dynamic=False)  # type: ignore[return-value]
    example = {"input_ids": torch.zeros(2, size.length, dtype=torch.long, device=device)}
    rewrite(model, example_inputs=example, config=chosen, backend=size.backend, dynamic=False)
    return model, model


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed, vectors are not, sites learn at a multiple of the rate of the others."""
    if CONTESTANTS[run.contestant] is not None:
        groups = parameter_groups(model, weight_decay=WEIGHT_DECAY, attnres_lr=run.rate * run.attnres_rate)
    else:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=BETAS)
    for group in optimizer.param_groups:
        group["full_rate"] = group["lr"]
    return optimizer


def rate_at(step: int, steps: int) -> float:
    """The part of the learning rate at ``step``: it rises for a twentieth of the run, and falls to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


@torch.no_grad()
def held_out_loss(call: nn.Module, batches: list[Tensor], device: torch.device) -> float:
    """Mean loss in nats a byte."""
    call.eval()
    losses = [_loss(call, batch.to(device)).item() for batch in batches]
    call.train()
    return statistics.fmean(losses)


def _batches(corpus: Corpus, size: Size, windows: int) -> list[Tensor]:
    return corpus.validation_batches(max(1, windows // size.batch), size.batch, size.length)


def _loss(call: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        loss: Tensor = call(input_ids=batch, labels=batch).loss
    return loss


def inside(model: nn.Module, contestant: str, batch: Tensor) -> dict[str, Any]:
    """Output magnitudes and gradient norms by depth; depth weights of the sites of a rewritten model."""
    small = {"input_ids": batch[:2], "labels": batch[:2]}
    if contestant in STREAMS:
        return {}
    found = training_dynamics(model, small).to_dict()
    kept = {name: [_short(x) for x in found[name]] for name in ("branch_rms", "output_rms", "gradient_norm")}
    if CONTESTANTS[contestant] is not None:
        values = log_dict(model, {"input_ids": batch[:2]})
        for name in ("weight_entropy", "largest_weight", "query_norm"):
            kept[name] = [_short(value) for key, value in values.items() if key.startswith(f"attnres/{name}/")]
    return kept


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def train(
    run: Run,
    text: Text,
    device: torch.device,
    folder: Path,
    work: Path,
    *,
    look: bool,
    weights: dict[str, Tensor] | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train to the end and write the file of ``run`` below ``folder``; what ``work`` has of it is gone on with.

    Args:
        run: What to train.
        text: What on.
        device: Where.
        folder: That of the results.
        work: Where a run that is not finished keeps its state.
        look: Whether output magnitudes, gradient norms and depth weights are written down on the way.
        weights: Those to begin with.
        keep: Where to save the last weights.
    """
    size = run.shape
    model, call = build(run, device, weights)
    optimizer = optimizer_of(model, run)
    progress = _Progress(work / run.path.with_suffix(".pt"), model, optimizer)
    looks = {round(part * size.steps): part for part in LOOKS} if look else {}
    every = max(1, size.steps // EVALUATIONS)
    validation = _batches(text.validation, size, size.held_out)
    for step in range(progress.step, size.steps):
        if step in looks:
            progress.looks.append({"part": looks[step], **inside(model, run.contestant, validation[0].to(device))})
        progress.seconds.append(_step(call, optimizer, text.batch(size, run.seed, step).to(device), run, step))
        done = step + 1
        if done % every == 0 or done == size.steps:
            loss = held_out_loss(call, validation, device)
            if not math.isfinite(loss):
                break
            progress.curve.append([done * size.batch * size.length, round(loss, 5)])
            progress.save(done)
    else:
        if size.steps in looks:
            progress.looks.append({"part": 1.0, **inside(model, run.contestant, validation[0].to(device))})
    ended = bool(progress.curve) and progress.curve[-1][0] == size.tokens
    test = _batches(text.test, size, 4 * size.held_out)
    result = {
        "run": dataclasses.asdict(run),
        "size": dataclasses.asdict(size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": text.digest(),
        "curve": progress.curve,
        # None of a run that diverged.
        "validation": progress.curve[-1][1] if ended else None,
        "test": round(held_out_loss(call, test, device), 5) if ended else None,
        "median_step_seconds": round(statistics.median(progress.seconds), 5) if progress.seconds else None,
        "looks": progress.looks,
        "environment": environment(),
    }
    if keep is not None:
        torch.save(model.state_dict(), keep)
    write_results(folder / run.path, result)
    progress.remove()
    return result


def _step(call: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, run: Run, step: int) -> float:
    """One step of training; its seconds."""
    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * rate_at(step, run.shape.steps)
    _loss(call, batch).backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class _Progress:
    """How far a run has come; on disk, so that an interrupted one goes on."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.model, self.optimizer = path, model, optimizer
        self.step = 0
        self.curve: list[list[float]] = []
        self.looks: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        if path.exists():
            saved = torch.load(path, weights_only=False)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.step, self.curve, self.looks = saved["step"], saved["curve"], saved["looks"]

    def save(self, step: int) -> None:
        """Replace what is on disk, at once."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save({**state, "step": step, "curve": self.curve, "looks": self.looks}, part)
        part.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def finished(folder: Path, size: str, stage: str = "scratch") -> Iterator[dict[str, Any]]:
    """The runs of ``size`` that are written."""
    for path in sorted((folder / Run(size, "plain", 1.0, 0, stage).path).parent.glob("*_seed*.json")):
        yield json.loads(path.read_text())
