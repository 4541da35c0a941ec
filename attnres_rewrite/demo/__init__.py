"""The demo: a small Llama, trained plain and rewritten on the same bytes, then run in ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from attnres_rewrite.demo.corpus import Corpus, standard_library
from attnres_rewrite.demo.quiet import quiet_exporter
from attnres_rewrite.demo.results import DemoResult, RunResult, plot_losses
from attnres_rewrite.demo.settings import DemoSettings
from attnres_rewrite.demo.training import Learner, build_model, make_learners, train

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

__all__ = ["DemoResult", "DemoSettings", "llama", "run_demo"]


def llama() -> nn.Module:
    """The model of the demo, plain and untrained: a Llama of eight layers to try the other commands on."""
    return build_model(DemoSettings(), torch.device("cpu"))


def run_demo(settings: DemoSettings, console: Console) -> DemoResult:
    """Train both models, export the rewritten one, and write everything to ``settings.out``.

    Args:
        settings: What to train, and for how long.
        console: Where progress and the table go.

    Returns:
        What was measured. The folder then holds ``loss.png``, ``depth_attention.png``, ``model.onnx`` and
        ``results.json``.
    """
    from attnres_rewrite import depth_attention, export_onnx

    device = settings.resolve_device()
    settings.out.mkdir(parents=True, exist_ok=True)
    corpus = standard_library()
    console.print(
        f"Python standard library: {corpus.files} files, {len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.validation) / 1e6:.1f} MB in other files to validate on."
    )
    with console.status("Building the model and finding its residual stream"):
        plain, rewritten = make_learners(settings, device)
    _train(console, (plain, rewritten), corpus, settings)
    # What follows is the same on every machine when it runs on the CPU.
    model = rewritten.model.cpu().eval()
    example = {"input_ids": corpus.validation_batches(1, 2, settings.length)[0]}
    with console.status("Measuring the depth weights"):
        depth_attention(model, example).plot(settings.out / "depth_attention.png")
    with console.status("Exporting to ONNX and comparing with ONNX Runtime"), quiet_exporter():
        exported = export_onnx(model, settings.out / "model.onnx", example)
    tokens = settings.batch * settings.length
    result = DemoResult(
        _result(plain, tokens), _result(rewritten, tokens), exported.max_difference, str(device), settings.to_dict()
    )
    plot_losses(result, settings.out / "loss.png")
    result.save(settings.out / "results.json")
    console.print(result.table())
    console.print(f"Written to {settings.out}: loss.png, depth_attention.png, model.onnx, results.json")
    return result


def _train(console: Console, learners: tuple[Learner, Learner], corpus: Corpus, settings: DemoSettings) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    device = settings.resolve_device()
    with Progress(*columns, console=console) as progress, _tensor_cores(device):
        task = progress.add_task("Compiling both models", total=settings.steps)

        def on_step(done: int) -> None:
            plain, rewritten = (learner.losses[-1] for learner in learners)
            text = f"Training: loss {plain:.3f} plain, {rewritten:.3f} AttnRes"
            progress.update(task, completed=done, description=text)
            # A log file shows no bar.
            if not console.is_terminal and done % 20 == 0:
                console.print(f"{done}/{settings.steps} {text}")

        train(learners, corpus, settings, device, on_step)


@contextlib.contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Let CUDA round float32 matrix products to TF32, as one would in training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _result(learner: Learner, tokens: int) -> RunResult:
    return RunResult(
        parameters=learner.parameters,
        losses=tuple(learner.losses),
        validation=tuple(learner.validation),
        step_seconds=learner.step_seconds,
        tokens_per_second=tokens / learner.step_seconds,
    )
