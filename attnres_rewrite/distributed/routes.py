"""What crosses from stage to stage of a pipeline, and what a process keeps (paper, section 4: cross-stage caching).

With ``P`` processes, stage ``s`` runs on process ``s mod P``. A value that stage ``j`` computes and a later stage needs
goes from stage to stage, ``j + 1``, ``j + 2`` and so on. At ``j + P`` it would be back where it came from: by then
every process has seen it. So with caching it stops there, and the stages from ``j + P`` on take it from what their
process keeps. Gradients go the same way back.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import Pipe
from torch.fx import Node

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError


@dataclasses.dataclass(frozen=True)
class StageCall:
    """One stage of a pipeline as a function.

    Attributes:
        module: What computes it.
        arguments: The names of the values that it takes.
        results: The names of the values that it gives; ``None`` for those that nothing takes.
        is_tuple: Whether it gives a tuple, also of one value.
    """

    module: nn.Module
    arguments: tuple[str, ...]
    results: tuple[str | None, ...]
    is_tuple: bool

    def __call__(self, values: dict[str, Tensor], run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """The named results, of named values among which its arguments are.

        Args:
            values: The arguments by name, and maybe others.
            run: What is called with the arguments in place of the module.
        """
        output = (run or self.module)(*(values[name] for name in self.arguments))
        results = output if self.is_tuple else (output,)
        return {name: value for name, value in zip(self.results, results, strict=True) if name is not None}


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor that is computed in one stage and needed in later ones.

    Attributes:
        source: The stage that computes it; the first one for what the model is called with.
        users: The later stages that need it, in order. The last stage needs what the model gives.
    """

    source: int
    users: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Routes:
    """The stages of a pipeline, and what crosses between them.

    Attributes:
        calls: The stages.
        inputs: The names of what the model is called with.
        outputs: The names of what the model gives.
        values: What crosses, by name.
        examples: Shape and dtype of every value, and whether it has a gradient, on the meta device, by name.
        period: After how many stages a value has been everywhere: the number of processes with caching, without it
            the number of stages.
    """

    calls: tuple[StageCall, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    examples: dict[str, Tensor]
    period: int

    def incoming(self, stage: int) -> tuple[str, ...]:
        """What ``stage`` gets from the one before."""
        if stage == 0:
            return self.inputs
        return tuple(n for n, v in self.values.items() if stage - self.period < v.source < stage <= v.users[-1])

    def outgoing(self, stage: int) -> tuple[str, ...]:
        """What ``stage`` gives to the next one."""
        return self.outputs if stage == len(self.calls) - 1 else self.incoming(stage + 1)

    def taken(self, stage: int) -> tuple[str, ...]:
        """What ``stage`` needs and finds at its process."""
        return tuple(n for n, v in self.values.items() if stage in v.users and v.source <= stage - self.period)

    def kept(self, stage: int) -> tuple[str, ...]:
        """What is new to its process in ``stage``, and which of its later stages take."""
        later = {n for one in range(stage + self.period, len(self.calls), self.period) for n in self.taken(one)}
        return tuple(n for n in self.values if n in later and stage - self.period < self.values[n].source <= stage)

    def is_last_to_take(self, stage: int, name: str) -> bool:
        """Whether no later stage of its process takes ``name`` after ``stage``."""
        return not any((user - stage) % self.period == 0 for user in self.values[name].users if user > stage)


def routes_of(pipe: Pipe, processes: int | None) -> Routes:
    """What crosses between the stages of ``pipe``.

    Args:
        pipe: What ``torch.distributed.pipelining.pipeline`` made of an unflattened program.
        processes: How many processes keep what they have seen; ``None`` if every stage gets all that it, or a later
            one, needs from the stage before.

    Raises:
        UnsupportedResidualError: Something else than a tensor crosses.
    """
    graph = pipe.info().graph
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = tuple(_call(node, pipe.get_stage_module(stage)) for stage, node in enumerate(nodes))
    inputs = {node.name: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
    outputs = tuple(_names(graph.output_node().args))
    source = dict.fromkeys(inputs, 0)
    source |= {name: stage for stage, call in enumerate(calls) for name in call.results if name is not None}
    users: dict[str, set[int]] = {name: set() for name in source}
    for stage, call in enumerate(calls):
        for name in (*call.arguments, *(outputs if call is calls[-1] else ())):
            users[name].add(stage)
    values = {
        name: Value(stage, tuple(sorted(later)))
        for name, stage in source.items()
        if (later := {user for user in users[name] if user > stage})
    }
    return Routes(calls, tuple(inputs), outputs, values, _examples(calls, inputs), processes or len(calls))


def _call(node: Node, module: nn.Module) -> StageCall:
    parts = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
    if not parts:
        return StageCall(module, tuple(_names(node.args)), (node.name,), False)
    results = tuple(parts.get(index) for index in range(_number_of_results(module)))
    return StageCall(module, tuple(_names(node.args)), results, True)


def _number_of_results(module: Any) -> int:
    (results,) = module.graph.output_node().args
    return len(results)


def _names(arguments: Any) -> Iterator[str]:
    """The names of the values in arguments of a node."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _names(argument)
        elif isinstance(argument, Node):
            yield argument.name
        else:
            raise UnsupportedResidualError(
                f"a stage of the pipeline is called with {argument!r}, and only tensors cross between processes: make "
                "it a constant of the model, or a tensor, before torch.export"
            )


def _examples(calls: Sequence[StageCall], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value as the stages compute it, with nothing computed; which have gradients is not in the graph."""
    with _compat.fake_mode(), torch.enable_grad():
        values = {
            name: torch.empty(value.shape, dtype=value.dtype, device=value.device) for name, value in inputs.items()
        }
        for call in calls:
            values |= call(values)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UnsupportedResidualError(
                f"{name}, a {type(value).__name__}, would cross between stages of the pipeline, and only tensors can: "
                "export the model with a batch of the size of a micro-batch, and no dynamic shapes"
            )
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta").requires_grad_(value.requires_grad)
        for name, value in values.items()
    }
