"""Records, while a graph is interpreted, what its sublayers put out and which parameters they compute with."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import AttnResError
from attnres_rewrite.forms.anchor import Anchor, anchors_of
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.graph.memory import writers_of
from attnres_rewrite.graph.nodes import data_inputs, is_inside, module_path, module_stack
from attnres_rewrite.passes import Site
from attnres_rewrite.pipeline import find_streams
from attnres_rewrite.streams import Addend, Branch, ResidualStream, StreamPlan


@dataclasses.dataclass(eq=False)
class Sublayer:
    """One branch output, where it is in a graph, and what was recorded of it.

    Attributes:
        name: The module that computes it.
        outputs: What is added to the stream; together they are the branch output.
        parameters: The placeholders that it computes with, and nothing else does.
        running: The node of the running sum after it.
        read: The node of what is read there.
        has_site: Whether that is a site.
        branch_rms: As in :class:`TrainingDynamics`.
        output_rms: The same.
        read_rms: The same.
    """

    name: str
    outputs: tuple[Addend, ...]
    parameters: list[fx.Node]
    running: fx.Node
    read: fx.Node
    has_site: bool = False
    branch_rms: float = math.nan
    output_rms: float = math.nan
    read_rms: float = math.nan


class Recording:
    """What one call of ``model`` computes, sublayer by sublayer.

    Attributes:
        sublayers: In the order in which they ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sublayers: list[Sublayer] = []
        self._trained = {id(p): p for p in model.parameters() if p.requires_grad}
        self._parameters: list[list[Tensor]] = []

    def interpret(self, module: fx.GraphModule, sublayers: Sequence[Sublayer]) -> Callable[..., Any]:
        """What runs ``module`` and records its ``sublayers``."""
        recorded = self

        def run(*arguments: Any) -> Any:
            recorder = _Recorder(module, sublayers)
            outputs = recorder.run(*arguments)
            for sublayer in recorder.finished:
                given = (id(recorder.given[node]) for node in sublayer.parameters)
                recorded.sublayers.append(sublayer)
                recorded._parameters.append([recorded._trained[key] for key in given if key in recorded._trained])
            return outputs

        return run

    def close(self) -> None:
        """Drop the parameters of the model and the nodes of its graphs."""
        self.sublayers, self._trained, self._parameters = [], {}, []

    def gradient_norms(self, loss: Tensor) -> list[float]:
        """For every sublayer the norm of the gradient of ``loss`` by its parameters; no gradient is accumulated."""
        parameters = list({id(p): p for own in self._parameters for p in own}.values())
        if not parameters:
            return [math.nan] * len(self.sublayers)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = {
            id(parameter): 0.0 if gradient is None else _mean_square(gradient) * gradient.numel()
            for parameter, gradient in zip(parameters, gradients, strict=True)
        }
        return [math.sqrt(sum(squares[id(p)] for p in own)) if own else math.nan for own in self._parameters]


def _mean_square(value: Tensor) -> float:
    value = value.detach()
    return value.to(torch.promote_types(value.dtype, torch.float32)).square().mean().item()


class _Recorder(fx.Interpreter):
    """Interprets a graph and notes magnitudes as they come: later operations may work in place."""

    def __init__(self, module: fx.GraphModule, sublayers: Sequence[Sublayer]) -> None:
        super().__init__(module)
        self.given: dict[fx.Node, Any] = {}
        self.finished: list[Sublayer] = []
        self._waiting = {id(one): {output.node for output in one.outputs} for one in sublayers}
        self._sums: dict[int, Tensor] = {}
        self._at = collections.defaultdict[fx.Node, list[Sublayer]](list)
        for one in sublayers:
            for node in {one.running, one.read, *(output.node for output in one.outputs)}:
                self._at[node].append(one)

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``, which is noted where a sublayer has it."""
        value = super().run_node(n)
        if n.op in ("placeholder", "get_attr"):
            self.given[n] = value
        for sublayer in self._at.get(n, ()):
            self._note(sublayer, n, value)
        return value

    def _note(self, sublayer: Sublayer, node: fx.Node, value: Tensor) -> None:
        for output in sublayer.outputs:
            if output.node is node:
                term, before = output.factor * value.detach(), self._sums.get(id(sublayer))
                self._sums[id(sublayer)] = term if before is None else before + term
                self._waiting[id(sublayer)].discard(node)
                if not self._waiting[id(sublayer)]:
                    sublayer.branch_rms = math.sqrt(_mean_square(self._sums.pop(id(sublayer))))
                    self.finished.append(sublayer)
        if node is sublayer.running:
            sublayer.output_rms = math.sqrt(_mean_square(value))
        if node is sublayer.read:
            sublayer.read_rms = math.sqrt(_mean_square(value))


class RecordingBackend(AttnResBackend):
    """Interprets the graphs of a plain or a rewritten model and records their sublayers.

    Args:
        recorded: Where to.
        plain_streams: As in :class:`AttnResBackend`.
        owners: The owners of the plain streams to record; ``None`` means all.
    """

    def __init__(self, recorded: Recording, plain_streams: tuple[str, ...], owners: set[str] | None = None) -> None:
        super().__init__(self._interpret, plain_streams=plain_streams)
        self.recorded, self.owners = recorded, owners
        self._found: dict[fx.Node, Sublayer] = {}
        self._rewritten: list[Branch] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        """Find the sublayers while the graph is as it was traced, then rewrite it if its model is rewritten."""
        self._found, self._rewritten = {}, []
        # What is wrong with the graph is said by what rewrites it, in the way that Dynamo passes on.
        with contextlib.suppress(AttnResError):
            plain = set[str]().union(*(anchor.plain_paths for anchor in anchors_of(module)))
            streams = [s for s in find_streams(module).streams if self._takes(s.owner) and s.owner not in plain]
            self._found = _sublayers_of(module.graph, streams)
        try:
            return super().__call__(module, inputs, **options)
        finally:
            # Dynamo holds on to a backend, which must not hold on to a graph.
            self._found, self._rewritten = {}, []

    def _takes(self, owner: str) -> bool:
        return owner not in self.plain_streams and (self.owners is None or owner in self.owners)

    def configure(self, config: AttnResConfig) -> AttnResConfig:
        """The configuration with which one node has all the sources of its site."""
        return dataclasses.replace(config, schedule="per_read")

    def planned(self, anchor: Anchor, plan: StreamPlan) -> None:
        """Note which branches the sites will be of."""
        self._rewritten += plan.stream.branches

    def inserted(self, sites: list[Site]) -> None:
        """Note where the running sums and the reads are now."""
        for branch, site in zip(self._rewritten, sites, strict=True):
            if branch.adds:
                sublayer = self._found[branch.value]
                # The branch output has just joined the last of the sources.
                sublayer.running, sublayer.read, sublayer.has_site = site.sources[-1], site.node, True

    def _interpret(self, module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        return self.recorded.interpret(module, list(self._found.values()))


def _sublayers_of(graph: fx.Graph, streams: Iterable[ResidualStream]) -> dict[fx.Node, Sublayer]:
    """The sublayers of ``streams``, by the value of the stream that they lead to."""
    streams = list(streams)
    values = frozenset[fx.Node]().union(*(stream.values for stream in streams))
    branches = [branch for stream in streams for branch in stream.branches if branch.adds]
    writers = writers_of(graph)
    insides = [_inside(branch, values, writers) for branch in branches]
    # A mask, or an encoder's last norm, is of no sublayer alone. Of a shared parameter only the placeholder is shared.
    uses = collections.Counter(itertools.chain.from_iterable(insides))
    found = {}
    for branch, inside in zip(branches, insides, strict=True):
        own = [node for node in inside if uses[node] == 1]
        read = {m: None for node in own for m in node.all_input_nodes if m.op in ("placeholder", "get_attr")}
        outputs = tuple(output for add in branch.adds for output in add.outputs)
        found[branch.value] = Sublayer(_name(branch, values), outputs, list(read), branch.value, branch.value)
    return found


def _inside(branch: Branch, values: frozenset[fx.Node], writers: Mapping[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """What a branch output computes from, back to the stream, nearest first; without what the graph is given."""
    pending = collections.deque(output.node for add in branch.adds for output in add.outputs)
    found = dict.fromkeys(pending)
    while pending:
        node = pending.popleft()
        # What is written into a tensor counts as well as what the tensor was made from.
        for source in (*data_inputs(node), *writers.get(node, ())):
            if source not in found and source not in values and source.op not in ("placeholder", "get_attr"):
                found[source] = None
                pending.append(source)
    return list(found)


def _name(branch: Branch, values: frozenset[fx.Node]) -> str:
    """The module that computes a branch output: a child of that which adds it, or the latter where it has several."""
    layer = module_path(branch.adds[-1].node)
    pending = [output.node for add in branch.adds for output in add.outputs]
    children, seen = set(), set(pending)
    while pending:
        node = pending.pop()
        child = next((path for path in module_stack(node) if path != layer and is_inside(path, layer)), None)
        if child is not None:
            children.add(child)
        elif node.op != "placeholder":
            fresh = [source for source in data_inputs(node) if source not in seen and source not in values]
            seen.update(fresh)
            pending += fresh
    return children.pop() if len(children) == 1 else layer
