"""What the owners of one rewritten model share, and what of it belongs to one thread alone."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Taken
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.second_backend import Backend, SecondBackend
from attnres_rewrite.forms.wrappers import naming_sharded_layers, refuse_flattened, require_known_sites


class LiveState:
    """What all owners of one rewritten model share.

    Whether AttnRes is on, and which backend runs, are asked in the thread that makes the call: ``disabled`` and
    ``verify`` in one thread change nothing for a call in another. Copies begin with AttnRes on.

    Attributes:
        backend: The one backend that compiles this model's graphs.
        options: Further options of ``torch.compile``.
        scalars: Whether the model is one graph only if ``tensor.item()`` is taken into it.
        whole: Whether the model was captured as one graph.
        undone: Whether the rewrite was taken out again. Whoever still holds a part of it then runs the original.
        taken: What the user had compiled of the modules around the layers; ``undo`` gives it back.
    """

    def __init__(
        self, backend: AttnResBackend, options: dict[str, Any], *, scalars: bool = False, whole: bool = True
    ) -> None:
        self.backend = backend
        self.options = options
        self.scalars = scalars
        self.whole = whole
        self.undone = False
        self.taken: Taken = []
        self._kept: dict[Backend, SecondBackend] = {}
        # The DistributedDataParallel that was last seen to know the sites.
        self._known_to: weakref.ref[nn.Module] | None = None
        self._here = threading.local()

    @property
    def enabled(self) -> bool:
        """Whether AttnRes runs in this thread. Dynamo guards on the answer, in the thread that calls."""
        return not getattr(self._here, "plain", False)

    @contextlib.contextmanager
    def plain_here(self) -> Iterator[None]:
        """Within the context this thread runs plain residuals."""
        before = not self.enabled
        self._here.plain = True
        try:
            yield
        finally:
            self._here.plain = before

    def kept(self, backend: Backend) -> SecondBackend:
        """What ``backend`` has compiled of the model so far; kept as long as the rewrite is, and not in copies."""
        if backend not in self._kept:
            # Of two threads that come first together one compiles in vain.
            self._kept.setdefault(backend, SecondBackend(backend, scalars=self.scalars))
        return self._kept[backend]

    def forget_kept(self) -> None:
        """Drop what :meth:`kept` keeps."""
        self._kept.clear()

    @contextlib.contextmanager
    def compiled_here_by(self, second: SecondBackend) -> Iterator[None]:
        """Within the context this thread compiles every owner by itself, with another backend."""
        before = self.override
        self._here.override = second
        try:
            yield
        finally:
            self._here.override = before

    @property
    def override(self) -> SecondBackend | None:
        """What this thread compiles the owners with instead of :attr:`backend`."""
        return getattr(self._here, "override", None)

    def compile(self, function: Callable[..., Any], backend: Backend | None = None) -> Callable[..., Any]:
        """``function``, compiled by ``backend`` or that of the model, with a cache of its own."""
        compiled: Callable[..., Any] = torch.compile(
            _compat.with_own_code(function), backend=backend or self.backend, **self.options
        )
        return compiled

    def run_watched(
        self, modes: Sequence[Any], module: nn.Module, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``function`` with its graphs rewritten and interpreted, so that dispatch modes see every operator.

        Args:
            modes: The modes that are active, outermost first. Dynamo does nothing while they are, so it traces
                without them.
            module: The module that is called.
            function: What to compile.
            *args: Its arguments.
            **kwargs: Its keyword arguments.
        """

        def interpreted(module: GraphModule, _: list[Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                with contextlib.ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode)
                    return module.forward(*arguments)

            return run

        backend = AttnResBackend(interpreted, plain_streams=self.backend.plain_streams)
        with _compat.without_dispatch_modes():
            return self.run(module, self.compile(function, backend), *args, **kwargs)

    def run(self, module: nn.Module, compiled: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call what was compiled of ``module``, as the model was captured."""
        wrapper = _compat.active_data_parallel()
        if wrapper is not None and (self._known_to is None or self._known_to() is not wrapper):
            require_known_sites(wrapper)
            self._known_to = weakref.ref(wrapper)
        refuse_flattened(module)
        # A stream is whole or not rewritten, so a graph is not split for what it gains in communication.
        settings = _compat.tracing_settings(self.scalars, whole=wrapper is not None)
        with naming_sharded_layers(module), settings:
            return compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Like nn.Module, a copy of which is not compiled.
        return {**self.__dict__, "taken": [], "_kept": None, "_known_to": None, "_here": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept={}, _here=threading.local())
