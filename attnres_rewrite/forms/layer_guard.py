"""The layers of a rewritten model answer for themselves: run past their owner, they raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from attnres_rewrite import _compat
from attnres_rewrite.errors import NotRewrittenError
from attnres_rewrite.forms.anchor import not_rewritten_message
from attnres_rewrite.forms.live_state import LiveState
from attnres_rewrite.graph.nodes import data_inputs, module_stack
from attnres_rewrite.streams import Branch, ResidualStream


class LayerGuard:
    """A forward pre-hook of a layer: lets it run where its owner's forward is traced, and nowhere else.

    Traced by Dynamo it is a constant, and leaves nothing in the graph. It lets pass, beside the traced forward, a
    thread that wants plain residuals, and whatever runs in a backward: there a checkpointed layer runs once more that
    has been asked before.

    Args:
        state: That of the rewritten model.
        owner: Name of the owner, for messages.
        forward: The function that announces the site parameters and then runs the layers.
    """

    def __init__(self, state: LiveState, owner: str, forward: Callable[..., Any]) -> None:
        self.state, self.owner, self.forward = state, owner, forward

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Raise :class:`NotRewrittenError` if ``module`` is about to run with plain residuals unasked."""
        if torch.compiler.is_dynamo_compiling():
            if _compat.is_tracing_within(self.forward):
                return
        elif self.state.undone or _compat.is_in_backward():
            return
        if self.state.enabled:
            raise NotRewrittenError(
                f"a layer ({type(module).__name__}) is run past the module that owns it: "
                + not_rewritten_message(self.owner)
            )


def layers_of(stream: ResidualStream) -> set[str]:
    """Names of the modules below the owner that are called to run the layers of ``stream``.

    Where a layer is a list of sublayers, or the adds are in the owner's own forward, these are the modules that
    compute the branch outputs.
    """
    found = (_called_in(stream, branch) for branch in stream.branches)
    return {name for name in found if name is not None}


def _called_in(stream: ResidualStream, branch: Branch) -> str | None:
    prefix = f"{stream.scope}." if stream.scope else ""

    def child(node: Node) -> str | None:
        return next((path for path in module_stack(node) if path.startswith(prefix) and path != stream.scope), None)

    if not branch.adds:
        return None
    if (name := child(branch.adds[-1].node)) is not None:
        return name
    pending = [output.node for add in branch.adds for output in add.outputs]
    seen = set(pending)
    while pending:
        node = pending.pop(0)
        if (name := child(node)) is not None:
            return name
        fresh = [n for n in data_inputs(node) if n not in seen and n not in stream.values]
        seen.update(fresh)
        pending.extend(fresh)
    return None


def install_guards(model: nn.Module, names: Iterable[str], guard: LayerGuard) -> None:
    """Make the modules ``names`` of ``model`` ask ``guard`` before they run."""
    for name in sorted(names):
        if (module := _module_at(model, name)) is not None:
            # Before the hooks of libraries, which may move or gather what a layer needs to run.
            module.register_forward_pre_hook(guard, prepend=True)


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module that a graph calls ``name``, also where the model keeps it in a list or dictionary of Python."""
    found: Any = model
    for part in name.split("."):
        if isinstance(found, (list, tuple)):
            found = found[int(part)] if part.isdigit() and int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def remove_guards(model: nn.Module) -> None:
    """Take the guards off every module of ``model``."""
    for module in model.modules():
        _compat.remove_pre_hooks(module, LayerGuard)
