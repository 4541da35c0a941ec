"""Which reads of a stream are followed by a norm: only there ``aggregation="mean"`` starts as the plain stream."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence

from torch.fx import Node

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.graph.nodes import carries_data, is_float_tensor, module_path, op_name, source_line, submodule_of
from attnres_rewrite.passes import Site
from attnres_rewrite.patterns import Transparent

_logger = logging.getLogger(__name__)
_NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm group_norm batch_norm normalize".split())
_ELEMENTWISE = frozenset("pow square abs mul add sqrt rsqrt reciprocal clamp clamp_min clip maximum to float".split())
_REDUCTIONS = frozenset("mean sum var std var_mean std_mean norm vector_norm linalg_vector_norm amax".split())
_SHAPE_ONLY = frozenset("size shape dim getattr sym_size new_zeros zeros_like".split())
# How many nodes a norm written by hand has between its input and its statistic.
_DEEPEST = 8


def reads_without_norm(values: Iterable[Node], on_stream: Container[Node] = ()) -> list[str]:
    """Source line, with its module, of every reader of one of ``values`` that is no norm; each line once.

    Args:
        values: The results of the sites; before there are any, the values that they will be the reads of.
        on_stream: What goes on with the stream, and does not read it.
    """
    found = (reader for value in values for reader in _readers(value, on_stream) if not _normalises(reader, value))
    return list(dict.fromkeys("the output of the model" if n.op == "output" else source_line(n) for n in found))


def tell_reads_without_norm(sites: Sequence[Site], config: AttnResConfig) -> None:
    """Log a warning of the reads of a new rewrite that are no longer what they were."""
    if not config.starts_plain and (found := reads_without_norm(site.read for site in sites)):
        _logger.warning("%s", explanation(found))


def explanation(found: Sequence[str]) -> str:
    """What it means that the reads ``found`` are not followed by a norm."""
    return (
        f"a residual stream is read without a norm at {found[0]}"
        + (f" and at {len(found) - 1} more lines" if len(found) > 1 else "")
        + ': with aggregation="mean" (the paper\'s) a read is the average of its sources, with zero queries the plain '
        "stream divided by their number. A norm takes that factor out; here it stays, so the model does not start as "
        'it was. AttnResConfig(aggregation="sum") starts as it was everywhere, and so does any with gate=True'
    )


def _readers(value: Node, on_stream: Container[Node] = ()) -> list[Node]:
    """What computes from ``value``, directly or behind transparent operations."""
    readers, pending, seen = [], [value], {value}
    while pending:
        for user in pending.pop().users:
            if user in seen or user in on_stream:
                continue
            seen.add(user)
            if isinstance(Transparent().match(user), Node):
                pending.append(user)
            elif user.op == "output" or (carries_data(user) and op_name(user) not in _SHAPE_ONLY):
                readers.append(user)
    return readers


def _normalises(reader: Node, value: Node) -> bool:
    """Whether a factor on ``value`` is lost in what ``reader`` makes of it."""
    if op_name(reader) in _NORMS or "norm" in type(submodule_of(reader)).__name__.lower():
        return True
    if module_path(reader) != module_path(value) and "norm" in _innermost_class(reader).lower():
        return True
    if _leads_to_statistic(reader):
        return True
    if op_name(reader) not in ("mul", "div", "truediv", "sub"):
        return False
    others = [n for n in reader.all_input_nodes if _is_statistic(n)]
    if op_name(reader) == "sub":
        # The mean is taken off first, and what is left divided by its size.
        return bool(others) and all(_normalises(user, reader) for user in _readers(reader))
    return bool(others)


def _innermost_class(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # An exported program names classes, Dynamo has them.
    kind = stack[-1][1] if stack else ""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _is_statistic(node: Node) -> bool:
    """Whether ``node`` is computed from a reduction by elementwise operations alone."""
    for _ in range(_DEEPEST):
        if op_name(node) in _REDUCTIONS:
            return True
        inputs = [n for n in node.all_input_nodes if is_float_tensor(n)]
        if (op_name(node) not in _ELEMENTWISE and op_name(node) != "getitem") or len(inputs) != 1:
            return False
        node = inputs[0]
    return False


def _leads_to_statistic(node: Node) -> bool:
    """Whether nothing but a reduction is computed from ``node``, by elementwise operations."""
    for _ in range(_DEEPEST):
        if op_name(node) in _REDUCTIONS:
            return True
        users = [user for user in node.users if carries_data(user)]
        if op_name(node) not in _ELEMENTWISE or len(users) != 1:
            return False
        node = users[0]
    return False
