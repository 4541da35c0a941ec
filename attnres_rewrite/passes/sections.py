"""Which nodes compute a branch, whether two branches are computed in the same way, and what forbids moving them.

A *section* is the nodes between a read of the stream and the branch output: what could be a graph of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.memory import aliases_of, overwritten_by
from attnres_rewrite.graph.nodes import SHAPE_ONLY, data_inputs, op_name, value_of

Mode = tuple[object, ...]

# Operators whose result depends on the state of a generator; of those in a body, which are traced, the tags tell.
_RANDOM = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout bernoulli multinomial normal rand "
    "rand_like randn randn_like randint randint_like randperm rrelu".split()
)

# Counts that somebody called something.
_NO_EFFECT = "_log_api_usage_once"

# Arguments that are the same if they are written the same.
_PLAIN = (int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclasses.dataclass(frozen=True)
class Section:
    """The nodes of one branch.

    Attributes:
        nodes: In graph order. No path leads out of them and in again.
        mode: What they run in, as :func:`modes` says it.
        operands: For every use of a value from outside, in the order of the uses, the node of the value.
        structure: Equal for two sections that compute the same function of their operands.
        outputs: Positions in ``nodes`` of those that are used outside.
    """

    nodes: tuple[Node, ...]
    mode: Mode
    operands: tuple[Node, ...]
    structure: tuple[object, ...]
    outputs: frozenset[int]

    @classmethod
    def of(cls, nodes: Iterable[Node], mode: Mode) -> Section:
        """The section of ``nodes``, in graph order, which run in ``mode``."""
        nodes = tuple(nodes)
        position = {node: i for i, node in enumerate(nodes)}
        operands: list[Node] = []

        def encoded(argument: Any) -> object:
            if isinstance(argument, Node):
                if argument in position:
                    return "node", position[argument]
                operands.append(argument)
                return "operand", _kind(value_of(argument))
            return _encoded(argument, encoded)

        structure = tuple(
            (node.op, node.target, encoded(node.args), encoded(node.kwargs), _kind(value_of(node))) for node in nodes
        )
        outputs = frozenset(i for i, node in enumerate(nodes) if any(user not in position for user in node.users))
        return cls(nodes, mode, tuple(operands), (mode, *structure), outputs)

    def span(self) -> Iterator[Node]:
        """Everything in the graph from the first node to the last."""
        return _from(self.nodes[0], self.nodes[-1])


def _from(first: Node, last: Node) -> Iterator[Node]:
    """Everything in a graph from ``first`` to ``last``, these included."""
    node = first
    while node is not last:
        yield node
        node = node.next
    yield node


def _encoded(argument: Any, inner: Any) -> object:
    """``argument`` as something that can be compared and hashed; ``inner`` is applied to what it contains."""
    if isinstance(argument, (tuple, list)):
        return ("sequence", *map(inner, argument))
    if isinstance(argument, dict):
        return ("mapping", *((key, inner(value)) for key, value in argument.items()))
    if isinstance(argument, slice):
        return "slice", inner(argument.start), inner(argument.stop), inner(argument.step)
    # Another object may do something else, whatever it calls itself.
    return type(argument), repr(argument) if isinstance(argument, _PLAIN) else id(argument)


def _kind(value: Any) -> object:
    """What the code that is compiled for a value depends on."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(value.device), str(tuple(value.shape)), str(value.stride())
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    # A number is a constant of the body for the call that is traced first, and so for all.
    return type(value), str(value) if isinstance(value, (int, torch.SymInt)) else ""


def nodes_between(start: Node, ends: Iterable[Node], index: Mapping[Node, int]) -> list[Node]:
    """The nodes, in graph order, that compute from the data of ``start`` and lead to ``ends``, these included.

    What writes into their memory leads to the ends as well.
    """
    pending, leading = list(ends), set[Node]()
    last = max(pending, key=index.__getitem__)
    writers = [node for node in _from(start, last) if overwritten_by(node)]
    while pending:
        while pending:
            node = pending.pop()
            if node not in leading and index.get(node, -1) > index[start]:
                leading.add(node)
                pending += node.all_input_nodes
        found: dict[Node, None] = {}
        for node in sorted(leading, key=index.__getitem__):
            if start in data_inputs(node) or any(source in found for source in node.all_input_nodes):
                found[node] = None
        pending = [node for node in writers if node not in leading and not _written(node).isdisjoint(found)]
    return list(found)


def _written(node: Node) -> set[Node]:
    """The nodes whose memory ``node`` writes into."""
    return set[Node]().union(*map(aliases_of, overwritten_by(node)))


def why_it_stays(section: Section, index: Mapping[Node, int]) -> str | None:
    """What forbids making a graph of its own of ``section``, ``None`` if nothing does; ``index`` has the order."""
    inside = set(section.nodes)
    if len(section.mode) > 1:
        # The graph has left autocast when a body is traced again, which then computes in another dtype.
        return "it is under autocast that is entered in the graph"
    if not section.outputs:
        return "nothing reads it"
    for node in section.span():
        if not _writes_into_its_own(node, inside, index[section.nodes[-1]], index):
            return f"{node.name} ({op_name(node)}) writes into memory that is not the branch's alone"
        if node not in inside:
            effect = value_of(node) is None and op_name(node) != _NO_EFFECT
            if node.op.startswith("call") and (effect or op_name(node) in _RANDOM):
                return f"{node.name} ({op_name(node)}) runs in the midst of it, for its effect"
        elif node.op not in ("call_function", "call_method"):
            return f"{node.name} is a {node.op} node"
        elif "recompute" in node.meta or "ac_graph_id" in node.meta:
            return "it is in a region of activation checkpointing"
        elif isinstance(node.target, _compat.HigherOrderOperator):
            return f"{node.name} ({op_name(node)}) runs a graph of its own"
        elif str(node.target).startswith("attnres.") and node is not section.nodes[0]:
            return f"{node.name} is a site of another stream"
    for node in (*section.nodes, *section.operands):
        if any(tensor.is_complex() for tensor in _compat.tensors_in(value_of(node))):
            return f"{node.name} is complex, and a conjugate that is kept for the backward cannot be passed to a body"
    for node in section.operands:
        if not isinstance(value_of(node), (torch.Tensor, torch.SymInt, int)):
            return f"its operand {node.name} is a {type(value_of(node)).__name__}"
    for i in section.outputs:
        if not isinstance(value_of(section.nodes[i]), torch.Tensor):
            return f"{section.nodes[i].name}, which is read outside, is no tensor"
    return None


def _writes_into_its_own(node: Node, inside: Set[Node], last: int, index: Mapping[Node, int]) -> bool:
    """Whether what ``node`` writes into, if anything, is made in a section, and read outside after all of it."""
    written = _written(node)
    if not written:
        return True
    early = [user for own in written & inside for user in own.users if user not in inside and index[user] < last]
    return node in inside and not early and all(other in inside or index[other] > last for other in written)


def modes(graph: Graph) -> Iterator[tuple[Node, Mode]]:
    """Every node with what it runs in: whether gradients are recorded, and the settings of autocast, innermost last."""
    setters = [mode for node in graph.nodes if (mode := _compat.sets_grad_enabled(node)) is not None]
    recording = not setters[0] if setters else True
    autocast: dict[Node, str] = {}
    for node in graph.nodes:
        if (mode := _compat.sets_grad_enabled(node)) is not None:
            recording = mode
        elif op_name(node) == "_enter_autocast":
            autocast[node] = repr(node.args)
        elif op_name(node) == "_exit_autocast":
            autocast.pop(node.all_input_nodes[0], None)
        yield node, (recording, *autocast.values())


def wants_gradients(graph: Graph) -> dict[Node, bool]:
    """Whether the value of a node requires gradients where the graph is run with those of its inputs.

    Found by propagation: the fake values are those of the plain model, whose weights may all be frozen, and those of
    the sites were made without gradients.
    """
    found: dict[Node, bool] = {}
    for node, (recording, *_) in modes(graph):
        value = value_of(node)
        if recording and any(found[source] for source in node.all_input_nodes):
            found |= dict.fromkeys(found.keys() & _written(node), True)
        if not node.op.startswith("call"):
            found[node] = isinstance(value, torch.Tensor) and value.requires_grad
            continue
        differentiable = any(t.is_floating_point() or t.is_complex() for t in _compat.tensors_in(value))
        cut = op_name(node) in SHAPE_ONLY or op_name(node) == "detach"
        found[node] = bool(recording) and differentiable and not cut and any(found[s] for s in node.all_input_nodes)
    return found
