"""Weights of models that were built with Attention Residuals elsewhere, to and from the names of this package.

Keys are renamed and shapes adapted: no model is needed, and no value is changed. The sites of a rewritten model compute
what the reads of those models do, so a converted checkpoint is the same function.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attnres_rewrite.config import AttnResConfig, partition_layers
from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.settings import EXTRA_STATE, Settings

Convention = Literal["fla", "kimi"]
_SUBLAYERS = 2


@dataclasses.dataclass(frozen=True)
class _Names:
    """What another project calls the reads of a model, and the settings of its configuration.

    Every read has a pseudo-query ``<read>_proj.weight`` ``[1, D]`` and a key gain ``<read>_norm.weight`` ``[D]``.

    Attributes:
        attention: The read before the attention of a layer.
        mlp: The read before its MLP.
        last: The read before the last norm, of the owner.
        block_size: The field with the size of a block.
        eps: The field with the epsilon of the norms.
        unit: How many branch outputs one of what ``block_size`` counts has.
    """

    attention: str
    mlp: str
    last: str
    block_size: str
    eps: str
    unit: int

    def reads(self, owner: str, layers: int) -> list[str]:
        """Where the reads of the stream of ``owner`` are, by depth; the first has one source, and no site here."""
        inside = [f"{owner}layers.{i}.{read}" for i in range(layers) for read in (self.attention, self.mlp)]
        return [*inside, f"{owner}{self.last}"]


# Read in flash-linear-attention 0.6.0, and in copies of the modeling file of Kimi K3.
_CONVENTIONS = {
    "fla": _Names("attn_res", "mlp_res", "res", "attnres_block_size", "norm_eps", 1),
    "kimi": _Names(
        "self_attention_res", "mlp_res", "output_attn_res", "attn_res_block_size", "rms_norm_eps", _SUBLAYERS
    ),
}


def import_state_dict(
    state_dict: Mapping[str, Tensor], convention: Convention, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], AttnResConfig]:
    """The weights of a model with Attention Residuals of its own, for the plain model of the same modules, rewritten.

    Args:
        state_dict: The weights, all of them. They stay as they are; the result shares their memory.
        convention: Whose names they have: ``"fla"`` (flash-linear-attention; its blocks are counted in sublayers) or
            ``"kimi"`` (released block AttnRes models such as Kimi K3; its blocks are counted in layers).
        config: The configuration of the model, of which ``attnres_block_size`` and ``norm_eps`` (fla) or
            ``attn_res_block_size`` and ``rms_norm_eps`` (kimi) are read, and ``num_hidden_layers`` if it is there.

    Returns:
        The weights under the names of this package, with their settings, and the configuration to rewrite with. Other
        keys keep their names. The vectors of the very first read are dropped: a read of one source gives that source.

    Raises:
        CheckpointError: A key is missing, of another shape, or looks like one of a read and is none; or the
            configuration is not that of the weights.
        TypeError: ``config`` is no mapping.
    """
    names = _names(convention)
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise TypeError(f"config is a mapping, such as that of config.json or config.to_dict(), not {kind}")
    read = "|".join((names.attention, names.mlp))
    owner = _owner(
        state_dict, rf"(.*\.)?layers\.\d+\.(?:{read})_(?:proj|norm)\.weight", f"reads named as by {convention}"
    )
    layers, size, eps = _layers(state_dict, owner), _block_size(names, config), _eps(names, config)
    if config.get("num_hidden_layers", layers) != layers:
        raise CheckpointError(
            f"the weights have {layers} layers in {owner or '(root)'!r}, but the configuration says num_hidden_layers="
            f"{config['num_hidden_layers']}: give all layers of the model, without those that predict further tokens"
        )
    rest = dict(state_dict)
    vectors = _take_reads(rest, names.reads(owner, layers))
    _refuse_left_over(rest, owner)
    for i, (query, gain) in enumerate(vectors[1:]):
        rest[f"{owner}attn_res.{i}.query"], rest[f"{owner}attn_res.{i}.gain"] = query.reshape(-1), gain
    sublayers = _SUBLAYERS * layers
    sizes = partition_layers(sublayers, layers_per_block=min(size * names.unit, sublayers))
    rest[f"{owner}attn_res.{EXTRA_STATE}"] = Settings((tuple(sizes),), "mean", eps, 1.0, True).to_tensor()
    counted = "sublayers_per_block" if names.unit == 1 else "layers_per_block"
    chosen: dict[str, Any] = {counted: min(size, sublayers // names.unit)}
    return rest, AttnResConfig(eps=eps, streams=(owner.removesuffix("."),) if owner else None, **chosen)


def export_state_dict(
    state_dict: Mapping[str, Tensor], convention: Convention
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """The weights of a rewritten model, for a model of the same modules that has Attention Residuals of its own.

    Args:
        state_dict: The weights, all of them. They stay as they are; the result shares their memory.
        convention: Whose names they get, as for :func:`import_state_dict`.

    Returns:
        The weights under the other names, and the fields that the configuration of the other model must have. One is
        the epsilon of the reads and of all norms there, so the norms of the plain model must have the same. The very
        first read, which this package has no vectors for, gets those that training starts with: zeros and ones.

    Raises:
        CheckpointError: The other project has no such Attention Residuals: with this aggregation, scale or grouping, or
            without gains; or a key is missing, of another shape, or unknown.
    """
    names = _names(convention)
    owner = _owner(state_dict, rf"(.*\.)?attn_res\.{EXTRA_STATE}", "Attention Residuals with their settings")
    container, layers = f"{owner}attn_res.", _layers(state_dict, owner)
    rest = dict(state_dict)
    settings = Settings.from_tensor(rest.pop(container + EXTRA_STATE))
    size = _exported_block_size(settings, layers, convention, names)
    pairs = [(f"{container}{i}.query", f"{container}{i}.gain") for i in range(_SUBLAYERS * layers)]
    width = _width(rest, pairs[0][0])
    vectors = [(_take(rest, query, (width,)), _take(rest, gain, (width,))) for query, gain in pairs]
    _refuse_left_over(rest, owner)
    first = (torch.zeros_like(vectors[0][0]), torch.ones_like(vectors[0][1]))
    for read, (query, gain) in zip(names.reads(owner, layers), [first, *vectors], strict=True):
        rest[f"{read}_proj.weight"], rest[f"{read}_norm.weight"] = query.reshape(1, -1), gain
    return rest, {names.block_size: size, names.eps: settings.eps}


def _names(convention: str) -> _Names:
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention must be one of {tuple(_CONVENTIONS)}, not {convention!r}")
    return _CONVENTIONS[convention]


def _owner(state: Mapping[str, Tensor], pattern: str, what: str) -> str:
    """The way to the one module whose keys match ``pattern``, with a full stop unless that is the root."""
    owners = sorted({match[1] or "" for key in state if (match := re.fullmatch(pattern, key))})
    if len(owners) == 1:
        return owners[0]
    if owners:
        raise CheckpointError(f"these weights have {what} in several modules, {owners}: convert them one at a time")
    some = ", ".join(list(state)[:4]) or "none"
    raise CheckpointError(f"these weights have no {what}: no key is {pattern}. Some of their keys: {some}")


def _layers(state: Mapping[str, Tensor], owner: str) -> int:
    """The number of layers that the weights have in ``owner``."""
    layer = re.compile(rf"{re.escape(owner)}layers\.(\d+)\.")
    numbers = {int(match[1]) for key in state if (match := layer.match(key))}
    if not numbers:
        raise CheckpointError(
            f"these weights have no {owner}layers.0: rename the layers first, for a model that calls them so"
        )
    return max(numbers) + 1


def _block_size(names: _Names, config: Mapping[str, Any]) -> int:
    size = config.get(names.block_size)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise CheckpointError(f"the configuration says {names.block_size}={size!r}, which is no size of a block")
    return size


def _eps(names: _Names, config: Mapping[str, Any]) -> float:
    eps = config.get(names.eps)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise CheckpointError(f"the configuration says {names.eps}={eps!r}, which is no epsilon of the norms")
    return float(eps)


def _exported_block_size(settings: Settings, layers: int, convention: str, names: _Names) -> int:
    """The size of a block as the other project counts it; raises where it has no such Attention Residuals."""
    fixed = {"aggregation": "mean", "scale": 1.0, "key_gain": True, "gate": False, "value_norm": False}
    for field, wanted in fixed.items():
        if (found := getattr(settings, field)) != wanted:
            raise CheckpointError(f"these weights have {field}={found!r}, and {convention} knows {wanted!r} only")
    if len(settings.blocks) != 1 or sum(settings.blocks[0]) != _SUBLAYERS * layers:
        raise CheckpointError(
            f"these weights have {[sum(sizes) for sizes in settings.blocks]} branch outputs in {layers} layers, and "
            f"{convention} has one stream with two in every layer, of attention and MLP"
        )
    (sizes,) = settings.blocks
    size, odd = divmod(sizes[0], names.unit)
    if odd or list(sizes) != partition_layers(sum(sizes), layers_per_block=sizes[0]):
        raise CheckpointError(
            f"these weights have blocks of {list(sizes)} branch outputs, and {convention} has blocks of one size, a "
            f"multiple of {names.unit}, the last of which takes what remains"
        )
    return size


def _take_reads(rest: dict[str, Tensor], reads: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Query ``[1, D]`` and gain ``[D]`` of every read, taken out of ``rest``."""
    width = _width(rest, f"{reads[0]}_proj.weight")
    return [
        (_take(rest, f"{read}_proj.weight", (1, width)), _take(rest, f"{read}_norm.weight", (width,))) for read in reads
    ]


def _width(state: Mapping[str, Tensor], key: str) -> int:
    """D, the size of the last dimension of what is under ``key``, if that is there."""
    return state[key].shape[-1] if key in state and state[key].dim() else 0


def _take(rest: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in rest:
        raise CheckpointError(
            f"these weights lack {key!r}: give all weights of the model, under the names of one project"
        )
    vector = rest.pop(key)
    if tuple(vector.shape) != shape:
        raise CheckpointError(f"{key!r} has the shape {list(vector.shape)}, not {list(shape)}")
    return vector


def _refuse_left_over(rest: Mapping[str, Tensor], owner: str) -> None:
    """Raise if a key looks like a part of Attention Residuals, but is none that is converted."""
    pattern = re.compile(rf"{re.escape(owner)}(layers\.\d+\.)?(attn_res|(\w+_)?res_(proj|norm))\..*")
    if unknown := [key for key in rest if pattern.fullmatch(key)]:
        raise CheckpointError(
            f"{unknown[0]!r} looks like a part of Attention Residuals and is none that this version converts "
            f"({len(unknown)} of such)"
        )
