"""The live form: a module rewritten in place, with its class, its keys and its methods kept.

The owner of a stream gets two things: a child ``attn_res`` that holds the site parameters, and an
instance attribute ``forward`` that runs the class's forward through the compiler.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.anchor import AnchorSpec, not_rewritten_message
from attnres_rewrite.backend import AttnResBackend
from attnres_rewrite.errors import NotRewrittenError
from attnres_rewrite.inputs import compiled
from attnres_rewrite.output_hooks import install_output_hooks


class AttnResSite(nn.Module):
    """The parameters of one site: pseudo-query ``[D]``, zero at first, and key gain ``[D]``, one at first.

    Args:
        width: D, the width of the stream.
        gain: Whether there is a key gain.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        gain: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.gain = nn.Parameter(torch.ones(width, device=device, dtype=dtype)) if gain else None

    def extra_repr(self) -> str:
        """The width, for ``print(model)``."""
        return f"width={self.query.numel()}, gain={self.gain is not None}"


class AttnResSites(nn.ModuleList):
    """All sites of one owner, in depth order, with the token of its anchor.

    Args:
        sites: The sites.
        state: That of the rewritten model.
        owner: Name of the owner, for messages.
    """

    token: Tensor

    def __init__(self, sites: Sequence[AttnResSite], state: LiveState, owner: str) -> None:
        super().__init__(sites)
        self.state, self.owner = state, owner
        device = sites[0].query.device
        self.register_buffer("token", torch.zeros(1, device=device), persistent=False)

    def flat(self) -> list[Tensor]:
        """Query and gain of every site, in the order in which the anchor takes them."""
        return [p for site in self for p in (site.query, site.gain) if p is not None]  # type: ignore[misc]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of every module, but not for ``torch.fx.symbolic_trace``.

        It asks for the names of the root's modules and then runs the forward of the root's class, past
        the live forward, so that this is where it can be stopped.
        """
        if self.state.enabled and _compat.is_symbolically_tracing():
            raise NotRewrittenError(not_rewritten_message(self.owner))
        named: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return named


class LiveState:
    """What all owners of one rewritten model share.

    Attributes:
        enabled: Whether AttnRes runs; ``disabled(model)`` clears it for a while.
        backend: The one backend that compiles this model's graphs.
        options: Further options of ``torch.compile``.
        scalars: Whether the model is one graph only if ``tensor.item()`` is taken into it.
        whole: Whether the model was captured as one graph.
    """

    def __init__(
        self, backend: AttnResBackend, options: dict[str, Any], *, scalars: bool = False, whole: bool = True
    ) -> None:
        self.enabled = True
        self.backend = backend
        self.options = options
        self.scalars = scalars
        self.whole = whole

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, compiled by the backend, with a cache of its own."""
        _compat.ignore_logged_warnings()
        compiled: Callable[..., Any] = torch.compile(
            _compat.with_own_code(function), backend=self.backend, **self.options
        )
        return compiled

    def run(self, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what was compiled, as the model was captured."""
        with _compat.capturing_scalars(self.scalars):
            return compiled(*args, **kwargs)


class LiveForward:
    """The ``forward`` of an owner: announces the site parameters, then runs the class's own forward.

    Called from Python it goes through the compiler; met by Dynamo inside a larger graph it is inlined.
    A deep copy or an unpickled one compiles anew for its own owner.
    """

    def __init__(self, owner: nn.Module, spec: AnchorSpec, state: LiveState) -> None:
        self.owner, self.state = owner, state
        self.spec = spec.to_json()
        self.replaced = owner.__dict__.get("forward")
        self._of_class = type(owner).forward
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers with AttnRes; raises :class:`NotRewrittenError` where that cannot be."""
        if torch.compiler.is_dynamo_compiling():
            return self.run_layers(*args, **kwargs)
        if not self.state.enabled:
            return self.original(*args, **kwargs)
        if _is_traced() or torch.compiler.is_exporting() or _compat.compile_disabled():
            raise NotRewrittenError(not_rewritten_message(AnchorSpec.from_json(self.spec).owner))
        install_output_hooks(self.owner, kwargs)
        if self._compiled is None:
            self._compiled = self.state.compile(_run_layers)
        return self.state.run(self._compiled, self, *args, **kwargs)

    def run_layers(self, *args: Any, **kwargs: Any) -> Any:
        """The anchor and the original forward, for Dynamo to trace."""
        if self.state.enabled:
            sites: Any = self.owner.attn_res
            torch.ops.attnres.anchor.default(sites.token, sites.flat(), self.spec)
            return _compat.unfused(self.original, *args, **kwargs)
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the owner had before the rewrite."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        # Kept, and not taken from the class here: Dynamo does not look into a class that is allow_in_graph.
        return self._of_class(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # Libraries look at the signature of forward to see which arguments a model takes.
        return inspect.signature(self.replaced or self._of_class.__get__(self.owner))

    @property
    def __code__(self) -> types.CodeType:
        # torch.export looks at the code of a root's forward to tell the user's frames from its own.
        code: types.CodeType = inspect.unwrap(self.replaced or self._of_class).__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        # The class's forward may have no name to be pickled by, where a decorator made it.
        return {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_of_class")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _compiled=None, _of_class=type(state["owner"]).forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveForward:
        new = object.__new__(LiveForward)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


class RootCall:
    """The call of a model whose owners lie deeper, compiled: what surrounds them joins their graph."""

    def __init__(self, model: nn.Module, state: LiveState, owner: str) -> None:
        self.model, self.state, self.owner = model, state, owner
        _compat.ignore_logged_warnings()
        model.compile(backend=state.backend, **state.options, **_compat.isolated_compile_options())
        self.compiled: Any = model._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; raises :class:`NotRewrittenError` for a tracer."""
        if torch.compiler.is_dynamo_compiling() or not self.state.enabled:
            return self.model._call_impl(*args, **kwargs)
        if _is_traced():
            raise NotRewrittenError(not_rewritten_message(self.owner))
        install_output_hooks(self.model, kwargs)
        return self.state.run(self.compiled, *args, **kwargs)


def _is_traced() -> bool:
    """Whether a tracer that cannot follow compiled code is looking."""
    return _compat.is_jit_tracing() or _compat.is_symbolically_tracing()


def _run_layers(forward: LiveForward, *args: Any, **kwargs: Any) -> Any:
    return forward.run_layers(*args, **kwargs)


def live_forwards(model: nn.Module) -> Iterator[tuple[str, LiveForward]]:
    """Name and live forward of every owner in ``model``."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, LiveForward):
            yield name, forward


def run_through(model: nn.Module, call: Callable[[Callable[..., Any]], Any], backend: AttnResBackend) -> Any:
    """What ``call`` gives on the live ``model`` compiled by ``backend``.

    Where the model is not one graph, every owner is compiled by itself: Dynamo's limit of recompilations is one for
    all backends, and what lies between the breaks is the library's code, which other models share.
    """
    forwards = [forward for _, forward in live_forwards(model)]
    state, root = forwards[0].state, model._compiled_call_impl
    if state.whole:
        return call(compiled(model, backend, scalars=state.scalars))
    own, compiled_by_own = state.backend, [forward._compiled for forward in forwards]
    try:
        state.backend, model._compiled_call_impl = backend, None
        for forward in forwards:
            forward._compiled = None
        return call(model)
    finally:
        state.backend, model._compiled_call_impl = own, root
        for forward, before in zip(forwards, compiled_by_own, strict=True):
            forward._compiled = before


def install(model: nn.Module, specs: Sequence[AnchorSpec], widths: Sequence[Sequence[int]], state: LiveState) -> None:
    """Give every owner its parameters and its live forward, and compile the root.

    Args:
        model: The model, changed in place.
        specs: One entry an owner.
        widths: For every owner, the width of every site.
        state: What the owners share.
    """
    for spec, site_widths in zip(specs, widths, strict=True):
        owner = model.get_submodule(spec.owner)
        like = next((p for p in owner.parameters() if p.is_floating_point()), None)
        placing = {"device": like.device, "dtype": like.dtype} if like is not None else {}
        sites = [AttnResSite(width, gain=spec.config.key_gain, **placing) for width in site_widths]  # type: ignore[arg-type]
        owner.attn_res = AttnResSites(sites, state, spec.owner)
        owner.attn_res.train(owner.training)
        owner.forward = LiveForward(owner, spec, state)
    if not any(spec.owner == "" for spec in specs):
        # What surrounds the owners (embedding, head, loss) is compiled with them as one graph.
        model._compiled_call_impl = RootCall(model, state, specs[0].owner)


def uninstall(model: nn.Module) -> None:
    """Take parameters and live forwards out again."""
    for _, forward in list(live_forwards(model)):
        owner = forward.owner
        del owner.forward
        if forward.replaced is not None:
            owner.forward = forward.replaced
        del owner.attn_res
    model._compiled_call_impl = None
