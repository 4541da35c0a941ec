"""Reading a traced graph in either dialect: Dynamo's torch-level graph or export's ATen graph.

Both dialects are ``torch.fx`` graphs; they differ in the operators, in where a node keeps its fake
value, and in how module paths are spelt. The functions here hide those differences, so that patterns
and passes are written once.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from attnres_rewrite import _compat

# A mark on nodes whose operator worked in place when it was traced, and gives a tensor of its own now.
FRESH = "attnres_fresh"

# Operators whose result depends on the shape, dtype and device of the argument, not on its data.
SHAPE_ONLY = frozenset(
    (
        "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones "
        "new_empty new_full size sym_size dim numel sym_numel stride sym_stride _assert_tensor_metadata"
    ).split()
)
# Operators that take the shape or dtype of their second argument, and the data of the first alone.
_LIKE_ANOTHER = frozenset("expand_as view_as reshape_as type_as to".split())


def value_of(node: Node) -> Any:
    """The fake value of ``node``: a tensor, a number or a nest of them; ``None`` without metadata."""
    return node.meta.get("val", node.meta.get("example_value"))


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor of ``node``, if ``node`` is a node whose value is one tensor."""
    value = value_of(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def require_tensor(node: object) -> torch.Tensor:
    """The fake tensor of a node that is known to have one."""
    value = tensor_of(node)
    assert value is not None, f"{node} has no fake tensor"
    return value


def is_float_tensor(node: object) -> bool:
    """Whether ``node`` is a node whose value is a floating-point tensor of at least one dimension."""
    value = tensor_of(node)
    return value is not None and value.is_floating_point() and value.dim() > 0


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two fake tensors have the same shape for every size that the trace allows."""
    return left.dim() == right.dim() and all(
        statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True)
    )


def op_name(node: Node) -> str:
    """The operator's bare name in either dialect: ``add`` for ``operator.add`` and ``aten.add.Tensor``.

    Empty for what is no call of an operator, such as an input, a parameter or a module: these may have any name.
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, _compat.Overload):
        return str(target.overloadpacket.__name__)
    if isinstance(target, str):
        return target.rsplit(".", 1)[-1]
    # In torch 2.11 Dynamo calls the methods of a DTensor ``prim from_local`` and ``prim_to_local``.
    return str(getattr(target, "__name__", target)).removeprefix("prim ").removeprefix("prim_")


def indices(graph: Graph) -> dict[Node, int]:
    """The position of every node in topological order."""
    return {node: index for index, node in enumerate(graph.nodes)}


def data_inputs(node: Node) -> Iterator[Node]:
    """The nodes whose tensor data ``node`` computes from. A query of shapes has none."""
    if op_name(node) in SHAPE_ONLY:
        return
    sources = node.args[:1] if op_name(node) in _LIKE_ANOTHER and node.args else node.all_input_nodes
    for source in sources:
        if isinstance(source, Node) and carries_data(source):
            yield source


def carries_data(node: Node) -> bool:
    """Whether the value of ``node`` holds tensor data, and not sizes, dtypes or devices alone."""
    if op_name(node) in ("size", "dim", "numel", "sym_size", "sym_numel"):
        return False
    if op_name(node) == "getattr" and node.op == "call_function":
        return node.args[1] not in ("shape", "device", "dtype", "ndim", "is_cuda", "layout")
    value = value_of(node)
    return not isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))


def depends_on(
    node: Node,
    is_value: Callable[[Node], bool],
    earliest: int,
    index: dict[Node, int],
    *,
    through: Callable[[Node], bool] = lambda _: True,
    written: Callable[[Node], Iterable[Node]] = lambda _: (),
) -> bool:
    """Whether ``node`` computes, through tensor data, from a node for which ``is_value`` holds.

    Searched backwards in descending topological order, so that a branch is left as soon as the value
    that it reads is met: the cost is the size of the branch, not of the graph.

    Args:
        node: Where the search starts.
        is_value: Which nodes are looked for.
        earliest: No such node has an index below this one.
        index: The topological order, from :func:`indices`.
        through: Which nodes the search goes on from.
        written: What writes into the tensor of a node; what is written counts as what the tensor was made from does.
    """
    pending, seen = [(-index[node], node)], {node}
    while pending:
        _, current = heapq.heappop(pending)
        if is_value(current):
            return True
        for source in (*data_inputs(current), *written(current)):
            if source not in seen and index[source] >= earliest and through(source):
                seen.add(source)
                heapq.heappush(pending, (-index[source], source))
    return False


def bodies_of(node: Node) -> list[GraphModule]:
    """The graphs that ``node`` is given to run, as a region that is compiled on its own or a branch of a condition."""
    owner = node.graph.owning_module
    given = (getattr(owner, str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr")
    return [body for body in given if isinstance(body, GraphModule)]


def submodule_of(node: Node) -> torch.nn.Module | None:
    """The module that ``node`` calls, in a graph that calls modules."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


_ROOT = re.compile(r"^[LG]\[[^\]]*\](\.__self__|\[\d+\])*")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
_LIVE_OWNER = re.compile(r"(^|\.)(forward|attn_res\.live)\.attnres_owner(?=\.|$)|^attnres_owner(?=\.|$)")


def normalise_path(path: str) -> str:
    """A module path as ``state_dict`` spells it, relative to the root of the trace.

    Dynamo writes ``L['self'].model.layers.0``, export ``model.layers.0``. The modules of a rewritten
    owner are reached through its wrapped forward, which Dynamo spells ``model.forward.attnres_owner.layers.0``, or
    through the child that holds the site parameters.
    """
    path = _INDEX.sub(r".\1", _ROOT.sub("", path)).replace(".__dict__.", ".").replace("._modules.", ".").strip(".")
    return _LIVE_OWNER.sub("", path).strip(".")


def module_stack(node: Node) -> tuple[str, ...]:
    """Normalised paths of the modules whose forward ``node`` ran in, outermost first, without the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = (normalise_path(entry[0]) for entry in stack.values())
    return tuple(dict.fromkeys(path for path in paths if path))


def sequential_paths(node: Node) -> set[str]:
    """Which of the paths in :func:`module_stack` are ``nn.Sequential``, whose forward runs every child."""
    stack = node.meta.get("nn_module_stack") or {}
    return {normalise_path(path) for path, kind in stack.values() if _is_sequential(kind)}


def _is_sequential(kind: object) -> bool:
    # An exported program names classes, Dynamo has them.
    return issubclass(kind, torch.nn.Sequential) if isinstance(kind, type) else str(kind).endswith(".Sequential")


def is_inside(path: str, outer: str) -> bool:
    """Whether the module at ``path`` is the one at ``outer`` or within it; all are within the root, ``""``."""
    return not outer or f"{path}.".startswith(f"{outer}.")


def module_path(node: Node) -> str:
    """Normalised path of the innermost module whose forward ``node`` ran in; ``""`` for the root."""
    stack = module_stack(node)
    return stack[-1] if stack else ""


_PACKAGE = str(Path(__file__).parents[1])
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def source_line(node: Node) -> str:
    """Where in the user's code ``node`` comes from, as ``module: file:line: code``."""
    frames = [frame for frame in _FRAME.findall(node.stack_trace or "") if not frame[0].startswith(_PACKAGE)]
    where = f"module {module_path(node) or '(root)'!r}"
    if not frames:
        return f"{where}: node {node.name} ({op_name(node) or node.target})"
    file, line, _, code = frames[-1]
    return f"{where}: {file}:{line}: {code.strip()}"


def copy_meta(source: Node, target: Node) -> Node:
    """Give the new node ``target`` the provenance of ``source``: its module, source line and the like."""
    for key, field in source.meta.items():
        if key not in ("val", "example_value", "tensor_meta", "unbacked_bindings", FRESH):
            target.meta.setdefault(key, field)
    return target


class GraphBuilder:
    """Adds operators to a graph, each with the fake value and provenance that a tracer would give it.

    Args:
        module: The graph module whose graph is edited.
    """

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self._value_key = "val" if any("val" in n.meta for n in module.graph.nodes) else "example_value"

    def call(self, target: Callable[..., Any], *args: Any, like: Node, name: str | None = None) -> Node:
        """A call of ``target``, at the graph's insertion point, with the provenance of ``like``."""
        node = self.graph.create_node("call_function", target, args, {}, name=name)
        values = map_arg(args, value_of)
        mode = next((m for m in map(_fake_mode, _tensors(values)) if m is not None), None)
        with torch.no_grad(), _entered(mode):
            node.meta[self._value_key] = target(*values)
        return copy_meta(like, node)

    def retype(self, node: Node, dtype: torch.dtype) -> None:
        """Note that the value of ``node`` now has ``dtype``."""
        node.meta[self._value_key] = require_tensor(node).to(dtype)

    def attribute(self, name: str, value: torch.Tensor, *, fake_like: Node) -> Node:
        """A read of the module attribute ``name``, whose fake value lives beside that of ``fake_like``."""
        node = self.graph.get_attr(name)
        node.meta[self._value_key] = require_tensor(fake_like).new_empty(value.shape, dtype=value.dtype)
        return node


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _fake_mode(value: torch.Tensor) -> Any:
    return getattr(value, "fake_mode", None)


def _entered(mode: Any) -> Any:
    return mode if mode is not None else contextlib.nullcontext()
