"""What the operators refuse as they are traced: a pipeline of one stage, where several were asked for."""

from __future__ import annotations

from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.errors import UnsupportedResidualError


def refuse_unsplit() -> None:
    """Raise :class:`UnsupportedResidualError` within a ``pipeline`` that is to split at modules that nothing calls.

    ``torch.distributed.pipelining`` splits before the call of a module. The module of an ``ExportedProgram`` has their
    names, for its parameters, and runs the operators of all of them itself.
    """
    if (traced := _compat.split_by_pipelining()) is None:
        return
    module, places = traced
    if not isinstance(module, GraphModule):
        return
    called = {node.target for node in module.graph.nodes if node.op == "call_module"}
    if missing := [name for name in places if name not in called]:
        raise UnsupportedResidualError(
            f"pipeline(split_spec=...) is to split at {missing[0]!r}, but the graph that it was given calls no such "
            "module, so it would be one stage. Give it the modules back: pipeline(torch.export.unflatten(program), "
            "...) in place of program.module()"
        )
