"""The two forms of a model, compiled, and the steps that are timed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from attnres_rewrite.api import attnres_parameters, rewrite
from attnres_rewrite.bench.settings import BenchSettings, Form, Kind
from attnres_rewrite.bench.workload import (
    LENGTH,
    Step,
    Workload,
    decode_step,
    filled_cache,
    inference_step,
    make_workload,
    training_step,
)
from attnres_rewrite.capture.inputs import ExampleInputs
from attnres_rewrite.errors import UnsupportedResidualError
from attnres_rewrite.forms import backend
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.live import live_forwards

# A model, or a model and example inputs for it as rewrite() takes them, not compiled and not rewritten.
MakeModel = Callable[[], nn.Module | tuple[nn.Module, ExampleInputs | None]]


@dataclasses.dataclass
class Bench:
    """A model ready to be measured.

    Attributes:
        plain: The model before it is compiled; the inputs, and what a decode step finds in its cache, come from it.
        workload: The inputs of both forms.
        models: The compiled forms; they may be fewer than two.
        device: Where they are.
        settings: What to measure.
        rewrite_s: Seconds that :func:`attnres_rewrite.rewrite` took.
    """

    plain: nn.Module
    workload: Workload
    models: dict[Form, nn.Module]
    device: torch.device
    settings: BenchSettings
    rewrite_s: float = 0.0

    @property
    def cached(self) -> int:
        """Tokens in the cache of a decode step."""
        sizes = next(iter(self.workload.sizes.values()), [])
        return self.settings.cached or (sizes[1] if len(sizes) > 1 else LENGTH)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks of every stream of the rewritten form; none where there is no such form."""
        live = live_forwards(self.models["rewritten"]) if "rewritten" in self.models else ()
        return tuple(len(sizes) for _, forward in live for sizes in AnchorSpec.from_json(forward.spec).blocks)

    def steps(self, kind: Kind) -> dict[Form, Step]:
        """A step of every form, after the forms were switched to training or evaluation.

        Raises:
            CannotDecode: ``kind`` is ``"decode"``, and the model has no cache that could be filled.
        """
        for model in self.models.values():
            model.train(kind == "training")
        if kind == "training":
            return {form: training_step(model, self.workload) for form, model in self.models.items()}
        if kind == "inference":
            return {form: inference_step(model, self.workload) for form, model in self.models.items()}
        torch.manual_seed(self.settings.seed)
        cache, ids = filled_cache(self.plain.eval(), self.workload, self.cached)
        return {form: decode_step(model, copy.deepcopy(cache), ids) for form, model in self.models.items()}


def make_bench(make_model: MakeModel, settings: BenchSettings, forms: tuple[Form, ...]) -> Bench:
    """Make, compile and, for ``"rewritten"``, rewrite a model, once for every one of ``forms``.

    Args:
        make_model: Makes the model; called under the same seed every time.
        settings: What to measure.
        forms: Which forms to make.

    Raises:
        AttnResError: The model cannot be rewritten, or there are no inputs for it.
        ValueError: There is no such device.
    """
    device = settings.resolve_device()

    def make() -> tuple[nn.Module, ExampleInputs | None]:
        torch.manual_seed(settings.seed)
        made = make_model()
        model, inputs = made if isinstance(made, tuple) else (made, None)
        return model.to(device, None if settings.dtype is None else getattr(torch, settings.dtype)), inputs

    plain, example_inputs = make()
    if any(attnres_parameters(plain)):
        raise UnsupportedResidualError(
            f"the {type(plain).__name__} already has Attention Residuals, so there is no plain form to compare it "
            "with: make the model without calling rewrite"
        )
    workload = make_workload(plain, example_inputs, settings)
    made = Bench(plain, workload, {}, device, settings)
    for form in forms:
        if form == "plain":
            plain.compile(backend=settings.backend)
            made.models[form] = plain
            continue
        # Its inputs came from a plain model; alone in its process it is that model itself.
        model = make()[0] if "plain" in forms else plain
        start = time.perf_counter()
        config = settings.config()
        rewrite(model, example_inputs=workload.example_inputs, config=config, backend=settings.backend)
        made.rewrite_s = time.perf_counter() - start
        randomise_queries(model, settings.seed)
        made.models[form] = model
    return made


def randomise_queries(model: nn.Module, seed: int = 0) -> None:
    """Give the pseudo-queries of ``model`` a standard deviation of ``D ** -0.5``, since zeros could hide work."""
    torch.manual_seed(seed)
    for name, parameter in attnres_parameters(model):
        if name.endswith("query"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


@contextlib.contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Within the context, seconds that the passes take over each graph that Dynamo hands to the backend."""
    seconds: list[float] = []
    original = backend.rewrite_captured

    def timed(*args: object) -> object:
        start = time.perf_counter()
        try:
            return original(*args)  # type: ignore[arg-type]
        finally:
            seconds.append(time.perf_counter() - start)

    # From outside, the call of the backend cannot be told from the inner compiler that it ends in.
    vars(backend)["rewrite_captured"] = timed
    try:
        yield seconds
    finally:
        vars(backend)["rewrite_captured"] = original
