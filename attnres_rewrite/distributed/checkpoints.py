"""Distributed checkpoints: settings are compared before the first weight is read.

``torch.distributed.checkpoint`` reads into the tensors of a ``state_dict``, which are the model's own, and
``set_model_state_dict`` copies into them where it shards. By the time that ``load_state_dict`` could compare settings
the weights are in place, and for a plain module nobody would ask. So the two functions through which every load goes
are wrapped; what has no Attention Residuals on either side goes through as it was.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.settings import EXTRA_STATE, SavedSettings, Settings, warn_of_missing
from attnres_rewrite.forms.site_parameters import AttnResSites

# The settings of an owner, also those of a copy that an adapter of peft trains, below whatever holds the model.
_SETTINGS = re.compile(rf"^(?P<owner>(?:.*\.)?)attn_res\.(?:\w+\.)*{EXTRA_STATE}$")
_logger = logging.getLogger(__name__)


def watch_state_dict_loader(module: Any) -> None:
    """Compare settings in every load by ``module``, which is ``torch.distributed.checkpoint.state_dict_loader``."""
    _compat.watch_checkpoint_plans(module, require_fitting_settings, CheckpointError)


def watch_state_dict(module: Any) -> None:
    """Compare settings in ``set_model_state_dict`` of ``module``, ``torch.distributed.checkpoint.state_dict``."""
    _compat.watch_state_dict_setters(module, require_fitting_state_dict)


def require_fitting_settings(
    wanted: Mapping[str, Any], saved: Mapping[str, Any], read: Callable[[str], Tensor]
) -> None:
    """Compare the settings of a checkpoint with those of what is about to be loaded from it.

    Args:
        wanted: What is to be loaded, flat: the tensors of the model, and whatever else there is.
        saved: What the checkpoint has, by the same names, without the values.
        read: Reads one tensor of the checkpoint.

    Raises:
        CheckpointError: The weights were trained with other Attention Residuals than the model has.
    """
    own = {key: found["owner"] for key in wanted if (found := _SETTINGS.match(key)) and _is_settings(wanted[key])}
    for key, owner in own.items():
        settings = Settings.from_tensor(wanted[key])
        warn_of_missing(saved, key.removesuffix(EXTRA_STATE), settings, owner.rstrip("."), wanted=True)
        if key in saved:
            settings.require(Settings.from_tensor(read(key)), owner.rstrip("."))
    for key in saved:
        if (found := _SETTINGS.match(key)) and found["owner"] not in own.values():
            _warn_of_no_settings(found["owner"], wanted, saved)


def _is_settings(value: Any) -> TypeGuard[Tensor]:
    # Another library may have modules of this name.
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def _warn_of_no_settings(owner: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Warn of weights of an owner that are read into a module without settings, or without sites."""
    weights = [
        key
        for key, value in wanted.items()
        if key.startswith(owner) and key in saved and isinstance(value, Tensor) and value.is_floating_point()
    ]
    where = owner.rstrip(".") or "(root)"
    if any(key.startswith(f"{owner}attn_res.") for key in weights):
        _logger.warning(
            "this checkpoint has the settings of the Attention Residuals in module %r, and what it is loaded into has "
            "queries but no settings (as the modules of an unflattened ExportedProgram): whether they are the same "
            "cannot be checked",
            where,
        )
    elif weights:
        _logger.warning(
            "this checkpoint was trained with Attention Residuals in module %r, and what it is loaded into has none: "
            "its layers would run with plain residuals, for which %r was not trained. Rewrite the model with the same "
            "blocks before it is loaded",
            where,
            weights[0],
        )


def require_fitting_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Compare the settings of a whole ``state_dict`` with those of ``model``.

    Args:
        model: The model, perhaps wrapped.
        state_dict: The weights by the names that they have in the model without its wrappers.

    Raises:
        CheckpointError: They were trained with other Attention Residuals than the model has.
    """
    known = set()
    for name, module in model.named_modules():
        if isinstance(module, AttnResSites | SavedSettings):
            for key in _compat.unwrapped_names(model, f"{name}.{EXTRA_STATE}"):
                known.add(key)
                if _is_settings(state := state_dict.get(key)):
                    module.set_extra_state(state)
    for key in state_dict:
        if (found := _SETTINGS.match(key)) and key not in known:
            _warn_of_no_settings(found["owner"], dict(model.named_parameters()), state_dict)
