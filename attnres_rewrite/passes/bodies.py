"""One graph for sections of equal structure, and a call of it in the place of each."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_rewrite import _compat
from attnres_rewrite.graph.nodes import GraphBuilder, copy_meta, require_tensor, value_of
from attnres_rewrite.passes.sections import Section
from attnres_rewrite.patterns import through_transparent


class Body:
    """The graph that sections of equal structure share.

    Args:
        sections: They differ in their operands alone.

    Attributes:
        sections: As given.
        outputs: Positions of the nodes whose values a call returns: those that any of the sections needs outside.
        graph: A placeholder for every operand, the nodes, and a tuple of the outputs.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = sections
        self.outputs = sorted(frozenset[int]().union(*(section.outputs for section in sections)))
        # Uses of one value in every section are one operand.
        self._columns: dict[tuple[Node, ...], int] = {}
        columns = zip(*(section.operands for section in sections), strict=True)
        self._operand_of_use = [self._columns.setdefault(column, len(self._columns)) for column in columns]
        self.graph = self._copied()

    def _copied(self) -> Graph:
        graph, model = Graph(), self.sections[0]
        placeholders = [graph.placeholder(f"operand_{i}") for i in range(len(self._columns))]
        for placeholder, column in zip(placeholders, self._columns, strict=True):
            placeholder.meta["example_value"] = value_of(column[0])
        uses = iter(self._operand_of_use)
        copies: dict[Node, Node] = {}
        for node in model.nodes:
            # In the order in which a section's operands are: arguments first, then keywords.
            args = _mapped(node.args, copies, placeholders, uses)
            kwargs = _mapped(node.kwargs, copies, placeholders, uses)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            copies[node].meta = dict(node.meta)
        for i in self.outputs:
            # It says whether the value requires gradients, and is believed. In the plain model, this was another value.
            copies[model.nodes[i]].meta.pop("example_value", None)
        graph.output(tuple(copies[model.nodes[i]] for i in self.outputs))
        return graph

    def operands(self, section: int) -> list[Node]:
        """What a call of the graph is given in the place of the section with this number."""
        return [column[section] for column in self._columns]

    def why_it_stays(self) -> str | None:
        """What forbids the graph, now that it can be run on fake values; ``None`` if nothing does."""
        given = [_detached(value_of(column[0])) for column in self._columns]
        try:
            results, calls = _compat.operators_run(GraphModule({}, self.graph), given)
        except Exception as error:
            # Whatever it is that fake values alone do not suffice for, the inline form has no need of it.
            return f"it cannot be tried on fake values: {str(error).splitlines()[0] if str(error) else repr(error)}"
        own = {storage for value in _compat.tensors_in(given) if (storage := _compat.storage_of(value)) is not None}
        for name, random, written in calls:
            if random:
                return f"{name} draws random numbers, of which a body would draw others"
            if not own.isdisjoint(written):
                return f"{name} writes into an operand"
        storages = [_compat.storage_of(result) for result in results]
        if not own.isdisjoint(storages):
            return "an output is a view of an operand"
        if len(set(storages)) < len(storages):
            return "two outputs are views of one tensor"
        return None

    def call_from(self, module: GraphModule, name: str, earlier: dict[Node, Node]) -> None:
        """Put calls of the graph, which ``module`` has under ``name``, in the place of the sections.

        Args:
            module: Whose graph has the sections.
            name: Of the graph.
            earlier: What the nodes of sections have been replaced by; those of these sections are added.
        """
        build = GraphBuilder(module)
        for number, section in enumerate(self.sections):
            last, inside = section.nodes[-1], set(section.nodes)
            operands = [earlier.get(node, node) for node in self.operands(number)]
            with module.graph.inserting_before(last):
                for i, node in enumerate(operands):
                    # A body is traced with the operands of one call. Two that are one tensor there would be for all.
                    if isinstance(value_of(node), torch.Tensor) and _among(node, operands[:i]):
                        operands[i] = build.call(torch.ops.aten.alias.default, node, like=last)
                body = module.graph.get_attr(name)
                call = module.graph.call_function(_compat.invoke_subgraph(), (body, name, *operands))
                call.meta["example_value"] = tuple(value_of(section.nodes[i]) for i in self.outputs)
                copy_meta(last, call)
                for j, i in enumerate(self.outputs):
                    item = module.graph.call_function(operator.getitem, (call, j))
                    item.meta = dict(section.nodes[i].meta)
                    earlier[section.nodes[i]] = item
            for i in self.outputs:
                _replace_outside(section.nodes[i], earlier[section.nodes[i]], inside)
            for node in reversed(section.nodes):
                module.graph.erase_node(node)


def _replace_outside(old: Node, new: Node, inside: Set[Node]) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)


def _mapped(argument: Any, copies: dict[Node, Node], placeholders: Sequence[Node], uses: Iterator[int]) -> Any:
    """``argument`` with copies of nodes, and for nodes from outside the placeholder of their next use."""
    if isinstance(argument, Node):
        return copies[argument] if argument in copies else placeholders[next(uses)]
    if isinstance(argument, (tuple, list)):
        return type(argument)([_mapped(value, copies, placeholders, uses) for value in argument])
    if isinstance(argument, dict):
        return {key: _mapped(value, copies, placeholders, uses) for key, value in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(_mapped(part, copies, placeholders, uses) for part in parts))
    return argument


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _among(node: Node, others: Sequence[Node]) -> bool:
    """Whether ``node`` may be the same tensor as one of ``others``: a cast or a dropout may return its argument."""
    own = through_transparent(node)
    storage = _compat.storage_of(require_tensor(node))
    return any(
        through_transparent(other) is own or _compat.storage_of(value) == storage
        for other in others
        if isinstance(value := value_of(other), torch.Tensor)
    )
