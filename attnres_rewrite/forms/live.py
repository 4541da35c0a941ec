"""The live form: a module rewritten in place, with its class, its keys and its methods kept.

The owner of a stream gets two things: a child ``attn_res`` that holds the site parameters, and an
instance attribute ``forward`` that runs the class's forward through the compiler. Its layers get a guard.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Taken, give_back_compilation, take_compilation
from attnres_rewrite.errors import AttnResError, NotRewrittenError, UnsupportedResidualError
from attnres_rewrite.forms.anchor import AnchorSpec, not_rewritten_message
from attnres_rewrite.forms.layer_guard import LayerGuard, install_guards, remove_guards
from attnres_rewrite.forms.live_state import LiveState
from attnres_rewrite.forms.output_hooks import OwnCompiledCall, install_output_hooks, make_hooks_traceable
from attnres_rewrite.forms.root_call import CopiesOfRoot, RootCall, is_traced
from attnres_rewrite.forms.second_backend import Backend, SecondBackend
from attnres_rewrite.forms.settings import EXTRA_STATE
from attnres_rewrite.forms.site_parameters import AttnResSite, AttnResSites
from attnres_rewrite.forms.wrappers import refuse_wrapped


class LiveForward:
    """The ``forward`` of an owner: announces the site parameters, then runs the class's own forward.

    Called from Python it goes through the compiler; met by Dynamo inside a larger graph it is inlined.
    A deep copy or an unpickled one compiles anew for its own owner.
    """

    def __init__(self, owner: nn.Module, spec: AnchorSpec, state: LiveState) -> None:
        # No name that a module of a user's would have: graphs tell modules by their path.
        self.attnres_owner, self.state = owner, state
        self.spec = spec.to_json()
        # The same in all copies.
        self.rewrite = uuid.uuid4().hex
        self.replaced = owner.__dict__.get("forward")
        self._of_class = type(owner).forward
        self._compiled: Callable[..., Any] | None = None

    @property
    def __self__(self) -> nn.Module:
        return self.attnres_owner

    @property
    def __func__(self) -> Callable[..., Any]:
        # As of a bound method: libraries take it to wrap it and bind the result again, which a deep copy follows.
        def forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.of(owner, *args, **kwargs)

        return forward

    @property
    def sites(self) -> AttnResSites:
        """The parameters of the owner's sites."""
        sites = sites_of(self.attnres_owner)
        assert sites is not None, "the rewrite was taken out"
        return sites

    def of(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of ``owner``, the module that was rewritten or a copy of it, as it is now."""
        sites = sites_of(owner)
        if sites is not None and sites.live.rewrite == self.rewrite:
            return sites.live.run(owner, *args, **kwargs)
        # Taken out, and perhaps rewritten anew: then whoever wraps this is called by the new one.
        return self.original(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers with AttnRes; raises :class:`NotRewrittenError` where that cannot be."""
        if args and isinstance(args[0], _CalledOn):
            return self.run(args[0].module, *args[1:], **kwargs)
        return self.run(self.attnres_owner, *args, **kwargs)

    def run(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward of ``owner``, which may be a shallow copy of the one that was rewritten."""
        if torch.compiler.is_dynamo_compiling():
            return self.run_layers(owner, *args, **kwargs)
        state = self.state
        # Plain residuals too are compiled where another backend is to see them.
        if state.undone or (not state.enabled and state.override is None):
            return self.original(owner, *args, **kwargs)
        if is_traced() or torch.compiler.is_exporting() or _compat.compile_disabled():
            raise NotRewrittenError(not_rewritten_message(AnchorSpec.from_json(self.spec).owner))
        install_output_hooks(owner, kwargs)
        make_hooks_traceable(owner)
        if modes := _compat.active_dispatch_modes():
            return state.run_watched(modes, owner, _run_layers, self, owner, *args, **kwargs)
        return state.run(owner, self._compiled_here(), self, owner, *args, **kwargs)

    def _compiled_here(self) -> Callable[..., Any]:
        if (override := self.state.override) is not None:
            if id(self) not in override.of_owner:
                override.of_owner[id(self)] = self.state.compile(_run_layers, override.backend)
            return override.of_owner[id(self)]
        compiled = self._compiled
        if compiled is None:
            # Of two threads that come first together one compiles in vain.
            compiled = self._compiled = self.state.compile(_run_layers)
        return compiled

    def run_layers(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The anchor and the original forward, for Dynamo to trace."""
        if self.state.undone:
            return self.original(owner, *args, **kwargs)
        container: Any = owner.attn_res
        sites = container.itself
        if self.state.enabled:
            torch.ops.attnres.anchor.default(sites.token, sites.flat(), self.spec)
        elif not _compat.is_exporting():
            torch.ops.attnres.plain_anchor.default(sites.token, self.spec)
        return _compat.unfused(self.original, owner, *args, **kwargs)

    def original(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward that the owner had before the rewrite."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        # Kept, and not taken from the class here: Dynamo does not look into a class that is allow_in_graph.
        return self._of_class(owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # Libraries look at the signature of forward to see which arguments a model takes.
        return inspect.signature(self.replaced or self._of_class.__get__(self.attnres_owner))

    @property
    def __code__(self) -> types.CodeType:
        # torch.export looks at the code of a root's forward to tell the user's frames from its own.
        code: types.CodeType = inspect.unwrap(self.replaced or self._of_class).__code__
        return code

    def __getstate__(self) -> dict[str, Any]:
        # The class's forward may have no name to be pickled by, where a decorator made it.
        return {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_of_class")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _compiled=None, _of_class=type(state["attnres_owner"]).forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveForward:
        new = object.__new__(LiveForward)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


class _CalledOn:
    """The first argument of a live forward that is called on another module than its owner."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class TellsItsModule:
    """A forward pre-hook of an owner: tells the live forward which module is called.

    The instance attribute ``forward`` of a shallow copy, or of a replica that ``nn.DataParallel`` makes, belongs to the
    original, and would run its weights.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments, after the module if that is not the owner."""
        container: Any = module.attn_res
        sites = container.itself
        if sites.live.attnres_owner is module:
            return None
        if sites.live.replaced is not None:
            raise NotRewrittenError(
                f"this {type(module).__name__} is a shallow copy of a rewritten module whose forward is one of an "
                "object, so it would run the original's weights: make a copy with copy.deepcopy"
            )
        return (_CalledOn(module), *args), kwargs


class ChecksSettings:
    """A pre-hook of a root's ``load_state_dict``: weights with other settings are refused before any is loaded."""

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Raise :class:`CheckpointError` for the first owner whose settings are others."""
        for name, live in live_forwards(module):
            if (state := state_dict.get(f"{prefix}{name}{'.' * bool(name)}attn_res.{EXTRA_STATE}")) is not None:
                live.sites.set_extra_state(state)


def _run_layers(forward: LiveForward, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward.run_layers(owner, *args, **kwargs)


def live_forwards(model: nn.Module) -> Iterator[tuple[str, LiveForward]]:
    """Name and live forward of every owner in ``model``, also of one that a library has wrapped since."""
    for name, module in model.named_modules():
        if (sites := sites_of(module)) is not None:
            yield name, sites.live


def sites_of(module: nn.Module) -> AttnResSites | None:
    """The site parameters of ``module`` that are in use, if it is an owner; peft may have wrapped their container."""
    child = dict(module.named_children()).get("attn_res")
    found = getattr(child, "itself", None)
    return found if isinstance(found, AttnResSites) else None


def require_live(model: object, verb: str) -> list[tuple[str, LiveForward]]:
    """The live forwards of ``model``; an error that names ``verb`` if it has none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a rewritten nn.Module, not {type(model).__name__}")
    found = list(live_forwards(model))
    if not found:
        raise AttnResError(
            f"{verb}: this {type(model).__name__} was not rewritten in place; call rewrite(model, blocks=8) first"
        )
    return found


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context ``model`` runs its plain residual path, as if it had not been rewritten.

    In this thread, and for this model alone; a copy or a file that is made within the context has AttnRes on.

    Raises:
        AttnResError: ``model`` is not a rewritten ``nn.Module``.
    """
    states = {id(forward.state): forward.state for _, forward in require_live(model, "disabled")}
    with contextlib.ExitStack() as stack:
        for state in states.values():
            stack.enter_context(state.plain_here())
        yield model


def run_through(
    model: nn.Module, call: Callable[[Callable[..., Any]], Any], backend: Backend, *, keep: bool = False
) -> Any:
    """What ``call`` gives on the live ``model`` compiled by ``backend``, in this thread.

    Where the model is not one graph, every owner is compiled by itself: Dynamo's limit of recompilations is one for
    all backends, and what lies between the breaks is the library's code, which other models share.

    Args:
        model: A rewritten model.
        call: Takes what is to be called in place of the model.
        backend: What compiles. Dynamo holds on to it until it is reset, so it should hold on to nothing.
        keep: Whether what is compiled is kept with the model, for the next call with the same ``backend``.
    """
    state = next(live_forwards(model))[1].state
    second = state.kept(backend) if keep else SecondBackend(backend, scalars=state.scalars)
    if state.whole:
        return call(second.on(model))
    with state.compiled_here_by(second):
        return call(model)


def require_plain(model: nn.Module) -> None:
    """Raise :class:`UnsupportedResidualError` if ``model`` was rewritten in place already, or wrapped too early."""
    rewritten = [name for name, _ in live_forwards(model)]
    if rewritten:
        raise UnsupportedResidualError(
            f"the model already has Attention Residuals, in module {rewritten[0] or '(root)'!r}: undo(model) takes "
            "them out, then it can be rewritten again"
        )
    refuse_wrapped(model)


def set_backend(model: nn.Module, backend: str | Callable[..., Any]) -> None:
    """Let ``backend`` compile the rewritten graphs of ``model``, of which none is compiled yet."""
    for _, live in live_forwards(model):
        live.state.backend.inner = backend


def install(
    model: nn.Module,
    specs: Sequence[AnchorSpec],
    widths: Sequence[Sequence[int]],
    layers: Mapping[str, Iterable[str]],
    state: LiveState,
) -> None:
    """Give every owner its parameters and its live forward, guard its layers, and compile the root.

    Args:
        model: The model, changed in place.
        specs: One entry an owner.
        widths: For every owner, the width of every site.
        layers: For every owner, the names of the modules that may run in its forward alone.
        state: What the owners share.
    """
    around = [model.get_submodule(name) for name in _around(specs)]
    state.taken = take_compilation(around)
    for module in around:
        if hasattr(module, "get_compiled_call"):
            module.__dict__["get_compiled_call"] = OwnCompiledCall(module)
    for spec, site_widths in zip(specs, widths, strict=True):
        owner = model.get_submodule(spec.owner)
        like = next((p for p in owner.parameters() if p.is_floating_point()), None)
        which = {"gain": spec.config.key_gain, "gate": spec.config.gate}
        placing = {"device": like.device, "dtype": like.dtype} if like is not None else {}
        sites = [AttnResSite(width, **which, **placing) for width in site_widths]  # type: ignore[arg-type]
        live = LiveForward(owner, spec, state)
        owner.attn_res = AttnResSites(sites, state, spec.owner, live)
        owner.attn_res.train(owner.training)
        owner.forward = live
        owner.register_forward_pre_hook(TellsItsModule(), prepend=True, with_kwargs=True)
        install_guards(model, layers[spec.owner], LayerGuard(state, spec.owner, LiveForward.run_layers))
    model.register_load_state_dict_pre_hook(ChecksSettings())
    if not any(spec.owner == "" for spec in specs):
        # What surrounds the owners (embedding, head, loss) is compiled with them as one graph.
        _compat.set_compiled_call(model, RootCall(model, state, specs[0].owner))
        model.__dict__[_compat.REPLICATE] = CopiesOfRoot(model, state, specs[0].owner)


def _around(specs: Sequence[AnchorSpec]) -> list[str]:
    """Names of the owners and of all modules that contain one, the root first."""
    parts = [spec.owner.split(".") if spec.owner else [] for spec in specs]
    return sorted({".".join(path[:depth]) for path in parts for depth in range(len(path) + 1)})


def uninstall(model: nn.Module) -> None:
    """Take parameters, live forwards, guards and compilation out again; the user's own compilation comes back."""
    taken: Taken = []
    for name, live in list(live_forwards(model)):
        owner, state = model.get_submodule(name), live.state
        state.undone = True
        state.forget_kept()
        if owner.__dict__.get("forward") is live:
            del owner.forward
            if live.replaced is not None:
                owner.forward = live.replaced
        # Behind the forward of a library it stays, and passes the call on.
        del owner.attn_res
        _compat.remove_pre_hooks(owner, TellsItsModule)
        taken, state.taken = [*taken, *state.taken], []
    remove_guards(model)
    # The root that was rewritten may be a part of ``model``, as within a LightningModule.
    for module in model.modules():
        _compat.remove_load_hooks(module, ChecksSettings)
        if isinstance(module.__dict__.get("get_compiled_call"), OwnCompiledCall):
            del module.__dict__["get_compiled_call"]
        if isinstance(_compat.compiled_call(module), RootCall):
            _compat.set_compiled_call(module, None)
        module.__dict__.pop(_compat.REPLICATE, None)
    give_back_compilation(taken)
