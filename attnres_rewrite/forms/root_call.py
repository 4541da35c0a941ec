"""The call of a rewritten root, which joins what surrounds the owners with their graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.errors import NotRewrittenError
from attnres_rewrite.forms.anchor import not_rewritten_message
from attnres_rewrite.forms.live_state import LiveState
from attnres_rewrite.forms.output_hooks import install_output_hooks, make_hooks_traceable


class RootCall:
    """The call of a model whose owners lie deeper, compiled: what surrounds them joins their graph."""

    def __init__(self, model: nn.Module, state: LiveState, owner: str) -> None:
        self.model, self.state, self.owner = model, state, owner
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; raises :class:`NotRewrittenError` for a tracer."""
        state = self.state
        if torch.compiler.is_dynamo_compiling() or not state.enabled or state.undone or state.override is not None:
            return _compat.call_uncompiled(self.model, *args, **kwargs)
        if is_traced():
            raise NotRewrittenError(not_rewritten_message(self.owner))
        install_output_hooks(self.model, kwargs)
        make_hooks_traceable(self.model)
        if modes := _compat.active_dispatch_modes():
            return state.run_watched(modes, self.model, _call, self.model, *args, **kwargs)
        if self._compiled is None:
            # At the first call and not before: a copy is not complete yet when it gets its call.
            self._compiled = _compat.compile_call(self.model, backend=state.backend, **state.options)
        return state.run(self.model, self._compiled, *args, **kwargs)


class CopiesOfRoot:
    """What a copy of a root is compiled as: a deep or an unpickled one like the root, a replica at its owners alone.

    It stands where ``nn.DataParallel`` asks a module for a replica. ``nn.Module`` leaves what is compiled out of its
    copies, so this object, which is copied with the root, gives the copy a call of its own.
    """

    def __init__(self, model: nn.Module, state: LiveState, owner: str) -> None:
        self.model, self.state, self.owner = model, state, owner

    def __call__(self) -> nn.Module:
        """A replica for another device."""
        replica: nn.Module = getattr(type(self.model), _compat.REPLICATE)(self.model)
        _compat.set_compiled_call(replica, None)
        return replica

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        # The copy has no attributes yet, so it takes none the usual way.
        _compat.set_compiled_call(self.model, RootCall(self.model, self.state, self.owner))


def is_traced() -> bool:
    """Whether a tracer that cannot follow compiled code is looking."""
    return _compat.is_jit_tracing() or _compat.is_symbolically_tracing()


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _compat.call_uncompiled(model, *args, **kwargs)
