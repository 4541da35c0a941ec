"""A rewrite as data, with which it is done again in another model of the same modules, without tracing it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.backend import AttnResBackend
from attnres_rewrite.forms.layer_guard import LayerGuard
from attnres_rewrite.forms.live import install, require_live, require_plain
from attnres_rewrite.forms.live_state import LiveState

_FORMAT = 1
_COMPILE_OPTIONS = {"mode", "options", "dynamic", "fullgraph"}


@dataclasses.dataclass(frozen=True)
class RecordedOwner:
    """What one owner got.

    Attributes:
        spec: What its anchor says.
        widths: D of every site.
        layers: Names of the modules that have a guard.
    """

    spec: AnchorSpec
    widths: tuple[int, ...]
    layers: tuple[str, ...]

    def renamed(self, rename: Callable[[str], str]) -> RecordedOwner:
        """The same in a model that has its modules under other names."""
        plain = tuple(rename(name) for name in self.spec.plain)
        spec = dataclasses.replace(self.spec, owner=rename(self.spec.owner), plain=plain)
        return RecordedOwner(spec, self.widths, tuple(rename(name) for name in self.layers))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """All that a rewrite put into a module, but for the values of the parameters.

    Attributes:
        owners: One entry an owner.
        plain_streams: As in :class:`AttnResBackend`.
        scalars: As in :class:`LiveState`.
        whole: Likewise.
    """

    owners: tuple[RecordedOwner, ...]
    plain_streams: tuple[str, ...]
    scalars: bool
    whole: bool

    @classmethod
    def of(cls, model: nn.Module) -> Recorded:
        """What is in ``model``; raises :class:`AttnResError` if that was not rewritten in place."""
        live = require_live(model, "save_pretrained")
        guards = [
            (name, hook.owner)
            for name, module in model.named_modules()
            for hook in _compat.pre_hooks(module, LayerGuard)
        ]
        owners = []
        for name, forward in live:
            of_root = AnchorSpec.from_json(forward.spec)
            # A part of the model that was rewritten names its modules without the way to itself.
            way = of_root.owner.removesuffix(name)
            plain = tuple(path.removeprefix(way) for path in of_root.plain if path.startswith(way))
            spec = dataclasses.replace(of_root, owner=name, plain=plain)
            widths = tuple(site.query.numel() for site in forward.sites)
            layers = tuple(layer for layer, owner in guards if owner == of_root.owner)
            owners.append(RecordedOwner(spec, widths, layers))
        state = live[0][1].state
        return cls(tuple(owners), state.backend.plain_streams, state.scalars, state.whole)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        owners = [
            {"spec": json.loads(one.spec.to_json()), "widths": list(one.widths), "layers": list(one.layers)}
            for one in self.owners
        ]
        return {
            "format": _FORMAT,
            "owners": owners,
            "plain_streams": list(self.plain_streams),
            "scalars": self.scalars,
            "whole": self.whole,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recorded:
        """What :meth:`to_dict` gave; raises :class:`CheckpointError` for a format that this version does not know."""
        if fields.get("format") != _FORMAT:
            raise CheckpointError(
                f"this folder has Attention Residuals in a format ({fields.get('format')}) that this version does not "
                f"know (it knows {_FORMAT}): load it with a newer attnres_rewrite"
            )
        owners = tuple(
            RecordedOwner(AnchorSpec.from_json(json.dumps(one["spec"])), tuple(one["widths"]), tuple(one["layers"]))
            for one in fields["owners"]
        )
        return cls(owners, tuple(fields["plain_streams"]), fields["scalars"], fields["whole"])

    def renamed(self, rename: Callable[[str], str]) -> Recorded:
        """The same in a model that has its modules under other names."""
        plain = tuple(rename(name) for name in self.plain_streams)
        return dataclasses.replace(self, owners=tuple(one.renamed(rename) for one in self.owners), plain_streams=plain)

    def install(
        self, model: nn.Module, backend: str | Callable[..., Any] = "inductor", **compile_options: Any
    ) -> nn.Module:
        """Do the rewrite again, in place.

        Nothing is traced. That the graph of ``model`` is the recorded one is seen when it is compiled, as it always is.

        Raises:
            CheckpointError: ``model`` lacks a module that was recorded.
            UnsupportedResidualError: It has Attention Residuals already.
            TypeError: ``torch.compile`` has no such option.
        """
        require_plain(model)
        check_compile_options(compile_options)
        names = {name for name, _ in model.named_modules()}
        wanted = [name for one in self.owners for name in (one.spec.owner, *one.layers)]
        if missing := [name for name in wanted if name not in names]:
            raise CheckpointError(
                f"these Attention Residuals belong to another model: they are recorded for module {missing[0]!r}, "
                f"which this {type(model).__name__} does not have"
            )
        self.put_into(model, backend, compile_options)
        return model

    def put_into(self, model: nn.Module, backend: str | Callable[..., Any], compile_options: Mapping[str, Any]) -> None:
        """Install the record in the ``model`` that it is of, with options of ``torch.compile``."""
        options = dict(compile_options)
        inner = {name: options.pop(name, None) for name in ("mode", "options")}
        attnres = AttnResBackend(backend, plain_streams=self.plain_streams, **inner)
        state = LiveState(attnres, options, scalars=self.scalars, whole=self.whole)
        layers = {one.spec.owner: one.layers for one in self.owners}
        install(model, [one.spec for one in self.owners], [one.widths for one in self.owners], layers, state)


def check_compile_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`TypeError` for an option that ``torch.compile`` does not have, or that is said otherwise."""
    if unknown := sorted(options.keys() - _COMPILE_OPTIONS):
        raise TypeError(f"rewrite got unknown options {unknown}; known: {sorted(_COMPILE_OPTIONS)}")
