"""The depth weights of a rewritten model: how much each site attends to each source."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_rewrite.capture.inputs import ExampleInputs, as_it_was, example_call, without_traces
from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import GraphBreakError, MissingPackageError
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.live import require_live, run_through
from attnres_rewrite.graph.nodes import carries_data, module_path
from attnres_rewrite.ops import depth_weights
from attnres_rewrite.passes import Site
from attnres_rewrite.patterns import Transparent


@dataclasses.dataclass(frozen=True)
class DepthAttention:
    """Mean depth weights alpha of every site (paper, Block AttnRes: the softmax over the sources).

    Attributes:
        sites: For every site, the module that reads it.
        sources: Names of the columns: ``b_0`` to ``b_N``, and ``partial`` for the block in progress.
        weights: ``[sites, sources]`` float32, the mean over all tokens; NaN where a site does not have
            the source. Each row sums to one.
    """

    sites: list[str]
    sources: list[str]
    weights: Tensor

    def save(self, path: str | PathLike[str]) -> None:
        """Write sites, sources and weights to a JSON file; a source that a site lacks is null."""
        rows = [[None if value != value else value for value in row] for row in self.weights.tolist()]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"sites": self.sites, "sources": self.sources, "weights": rows}, file, indent=1)

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a heatmap, sites by sources, to an image file.

        Raises:
            MissingPackageError: matplotlib is not installed (extra ``plot``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError("plotting", "matplotlib", "plot") from error
        height = 1.2 + 0.24 * len(self.sites)
        figure = Figure(figsize=(3.5 + 0.55 * len(self.sources), height), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.weights.numpy(), aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(self.sources)), self.sources)
        axes.set_yticks(range(len(self.sites)), self.sites, fontsize=7)
        axes.set_xlabel("source")
        axes.set_title("mean depth weight")
        axes.set_facecolor("0.92")
        figure.colorbar(image)
        figure.savefig(path, dpi=120)


@dataclasses.dataclass(frozen=True)
class _SiteWeights:
    name: str
    weights: list[float]
    has_partial: bool


class _RecordingBackend(AttnResBackend):
    """Interprets the rewritten graph and records the weights of every site."""

    def __init__(self) -> None:
        super().__init__(self._interpret)
        self.partial_of: dict[fx.Node, bool] = {}
        self.recorded: dict[fx.Node, _SiteWeights] = {}

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        # One node then has all the sources of its site.
        return dataclasses.replace(config, schedule="per_read")

    def inserted(self, sites: list[Site]) -> None:
        self.partial_of.update((site.node, site.has_partial) for site in sites)

    def _interpret(self, module: fx.GraphModule, _: list[Any]) -> Any:
        backend = self

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n in backend.partial_of:
                    sources, query, gain, eps, scale, _ = self.fetch_args_kwargs_from_env(n)[0]
                    alpha = depth_weights(sources, query, gain, eps=eps, scale=scale)
                    mean = alpha.float().flatten(1).mean(1).tolist()
                    backend.recorded[n] = _SiteWeights(_reader(n), mean, backend.partial_of[n])
                return super().run_node(n)

        return Recorder(module).run


def _reader(site: fx.Node) -> str:
    """The module that reads the site: that of its first user, behind casts and reshapes."""
    users = [user for user in site.users if user.op != "output" and carries_data(user)]
    if not users:
        return f"output of {module_path(site) or 'the model'}"
    inserted = isinstance(Transparent().match(users[0]), fx.Node) and module_path(users[0]) == module_path(site)
    if inserted and users[0].users:
        return _reader(users[0])
    return module_path(users[0]) or users[0].name


def depth_attention(model: nn.Module, example_inputs: ExampleInputs | None = None) -> DepthAttention:
    """Mean depth weights of every site of a rewritten model on ``example_inputs``.

    Args:
        model: A rewritten ``nn.Module``; runs once, without gradients, in the mode that it is in.
        example_inputs: As for :func:`attnres_rewrite.rewrite`.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
        GraphBreakError: No AttnRes site ran on these inputs.
        ExampleInputsError: The example inputs are missing or of the wrong kind.
    """
    require_live(model, "depth_attention")
    call = example_call(model, example_inputs)
    backend = _RecordingBackend()
    with as_it_was(model), without_traces(model):
        run_through(model, call.run, backend)
    return _table(list(backend.recorded.values()))


def _table(sites: list[_SiteWeights]) -> DepthAttention:
    if not sites:
        raise GraphBreakError("no AttnRes site ran on these inputs")
    blocks = max(len(site.weights) - site.has_partial for site in sites)
    weights = torch.full((len(sites), blocks + 1), float("nan"))
    for row, site in zip(weights, sites, strict=True):
        complete = len(site.weights) - site.has_partial
        row[:complete] = torch.tensor(site.weights[:complete])
        if site.has_partial:
            row[-1] = site.weights[-1]
    names = [*(f"b_{i}" for i in range(blocks)), "partial"]
    if bool(weights[:, -1].isnan().all()):
        # Full AttnRes has no partial at all.
        weights, names = weights[:, :-1], names[:-1]
    return DepthAttention([site.name for site in sites], names, weights)
