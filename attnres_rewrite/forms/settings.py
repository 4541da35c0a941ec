"""The settings that the numbers of a rewritten model depend on, as they travel with its weights.

They are in every ``state_dict``, as the extra state of the container of the site parameters: bytes of JSON in a tensor,
so that no pickle is needed and safetensors keeps them. Whatever loads weights compares them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite.config import AttnResConfig
from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.anchor import AnchorSpec

# The name that torch gives to the extra state of a module in a state_dict.
EXTRA_STATE = "_extra_state"
_FORMAT = 2
# What format 1 cannot say, and what it means by that.
_LATER = {"gate": False, "value_norm": False}
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the sites of one owner compute, but for their parameters.

    Attributes:
        blocks: For each of its streams, in graph order, the number of branch outputs in every block.
        aggregation: As in :class:`AttnResConfig`, like the others.
        eps: Epsilon of the norm of the keys.
        scale: Factor on the logits.
        key_gain: Whether there are gains.
        gate: Whether there are gates.
        value_norm: As in :class:`AttnResConfig`.
    """

    blocks: tuple[tuple[int, ...], ...]
    aggregation: str
    eps: float
    scale: float | str
    key_gain: bool
    gate: bool = False
    value_norm: bool = False

    @classmethod
    def of(cls, spec: AnchorSpec) -> Settings:
        """The settings of an owner."""
        config = spec.config
        fields = (config.aggregation, config.eps, config.scale, config.key_gain, config.gate, config.value_norm)
        return cls(spec.blocks, *fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the number of its format: the lowest that says all of it."""
        fields = dataclasses.asdict(self)
        if fields == {**fields, **_LATER}:
            return {"format": _FORMAT - 1, **{name: value for name, value in fields.items() if name not in _LATER}}
        return {"format": _FORMAT, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Settings:
        """The settings that :meth:`to_dict` gave, perhaps by way of JSON.

        Raises:
            CheckpointError: They are of a format that this version does not know.
        """
        fields = dict(fields)
        if (number := fields.pop("format", None)) not in (_FORMAT - 1, _FORMAT):
            raise CheckpointError(
                f"these weights have Attention Residuals in a format ({number}) that this version does not know "
                f"(it knows {_FORMAT} and before): load them with a newer attnres_rewrite"
            )
        return cls(**{**fields, "blocks": tuple(tuple(sizes) for sizes in fields["blocks"])})

    def to_tensor(self) -> Tensor:
        """The settings as bytes ``[n]``, uint8."""
        return torch.tensor(list(json.dumps(self.to_dict(), sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, state: Tensor) -> Settings:
        """The settings that :meth:`to_tensor` wrote."""
        return cls.from_dict(json.loads(bytes(state.tolist())))

    def require(self, other: Settings, owner: str) -> None:
        """Raise :class:`CheckpointError` unless ``other``, those of the weights that are loaded, are the same."""
        differing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if differing:
            named = "; ".join(f"{name} {getattr(other, name)} there, {getattr(self, name)} here" for name in differing)
            raise CheckpointError(
                f"these weights were trained with other Attention Residuals than module {owner or '(root)'!r} has: "
                f"{named}. Rewrite the model with the settings of the weights, or train anew"
            )


class SavedSettings(nn.Module):
    """The container of the sites of an owner in a graph module, with the settings that its graph was made with."""

    def __init__(self, owner: str, config: AttnResConfig) -> None:
        super().__init__()
        self.spec = AnchorSpec(owner, (), config)

    def add(self, blocks: tuple[int, ...]) -> None:
        """Take in the next stream of the owner: the number of branch outputs in every one of its blocks."""
        self.spec = dataclasses.replace(self.spec, blocks=(*self.spec.blocks, blocks))

    def get_extra_state(self) -> Tensor:
        """The settings, which are saved with the parameters."""
        return Settings.of(self.spec).to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the settings of parameters that are loaded; raises :class:`CheckpointError` if they are others."""
        Settings.of(self.spec).require(Settings.from_tensor(state), self.spec.owner)


def warn_of_missing(state: Mapping[str, Any], prefix: str, own: Settings, owner: str, *, wanted: bool) -> None:
    """Warn of a ``state_dict`` that has no settings under ``prefix`` to compare with those of an owner.

    Args:
        state: The ``state_dict``, or a part of it, as a sharded checkpoint is loaded.
        prefix: The path of the container of the site parameters in it, with a full stop.
        own: The settings of the owner.
        owner: Its name, for messages.
        wanted: Whether the model is to run with Attention Residuals, and not with plain residuals for a while.
    """
    if f"{prefix}{EXTRA_STATE}" in state:
        return
    if any(key.startswith(prefix) for key in state):
        _logger.warning(
            "these weights of module %r have queries but not the settings that they were trained with (as those of an "
            "ExportedProgram, or saved by version 0.1): whether they are those of the model, %s, cannot be checked",
            owner or "(root)",
            own.to_dict(),
        )
    elif wanted:
        _logger.warning(
            "these weights have no queries for module %r, so those that it has stay: the weights are of a plain model, "
            "or a part of a checkpoint. For a plain one, say so: with attnres_rewrite.disabled(model): "
            "model.load_state_dict(..., strict=False)",
            owner or "(root)",
        )
