"""What an optimizer has to be told of a rewritten model: groups for the sites, and state from before the rewrite."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnres_rewrite import _compat
from attnres_rewrite.api import attnres_parameters
from attnres_rewrite.errors import AttnResError, CheckpointError
from attnres_rewrite.forms.layer_guard import LayerGuard
from attnres_rewrite.forms.live import require_live


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, attnres_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: pseudo-queries and key gains ``[D]`` by themselves, without weight decay.

    A decayed query goes back to the uniform mean over depth, and a decayed gain to keys of zero. ``Trainer`` decays
    both if it makes its own groups; give it these with ``optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params":
    parameter_groups(model, weight_decay=0.1), "lr": 3e-4})``.

    Args:
        model: A rewritten model in any form that has parameters. Frozen parameters are left out.
        weight_decay: That of the other parameters with two or more dimensions; biases, gains of norms and other vectors
            get none.
        attnres_lr: Learning rate of the sites; if left out, that of the optimizer.

    Returns:
        At most three groups for any optimizer of ``torch.optim``: matrices, vectors, sites.

    Raises:
        AttnResError: ``model`` has no sites, or all of them are frozen.
        TypeError: ``model`` is no module.
    """
    sites = _sites(model)
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in sites]
    groups = [*_by_decay(others, weight_decay), {"params": list(sites.values()), "weight_decay": 0.0}]
    if attnres_lr is not None:
        groups[-1]["lr"] = attnres_lr
    return groups


def muon_groups(
    model: nn.Module, *, weight_decay: float = 0.0, attnres_lr: float | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameter groups for Muon, and for the optimizer beside it.

    Muon orthogonalises the update of a matrix that maps hidden states to hidden states. These are the matrices
    ``[out, in]`` in the rewritten layers, but for embeddings. Pseudo-queries and key gains ``[D]``, embeddings, the
    output head, norms and biases belong to an optimizer like AdamW.

    Args:
        model: An ``nn.Module`` that was rewritten in place.
        weight_decay: As for :func:`parameter_groups`, in both lists.
        attnres_lr: As for :func:`parameter_groups`.

    Returns:
        Groups for ``torch.optim.Muon``, and groups for the other optimizer; together every parameter once.

    Raises:
        AttnResError: ``model`` was not rewritten in place, or its sites are frozen.
        TypeError: ``model`` is no module.
    """
    require_live(model, "muon_groups")
    layers = [module for module in model.modules() if _compat.pre_hooks(module, LayerGuard)]
    inside = [module for layer in layers for module in layer.modules() if not isinstance(module, nn.Embedding)]
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        id(p): p
        for module in inside
        for p in module.parameters(recurse=False)
        if p.ndim == 2 and p.requires_grad and id(p) not in shared
    }
    groups = parameter_groups(model, weight_decay=weight_decay, attnres_lr=attnres_lr)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in matrices]
    muon = [{"params": list(matrices.values()), "weight_decay": weight_decay}]
    return muon, [group for group in groups if group["params"]]


def load_plain_optimizer_state(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], model: nn.Module
) -> None:
    """Carry the state of an optimizer over that trained the plain model before it was rewritten.

    Parameters keep their state (moments, steps) and groups their learning rate; the sites, which the plain model did
    not have, start with none. Without its sites ``optimizer`` must have the groups of the plain one, each with the same
    parameters in the same order, as when both were made by the same code.

    Args:
        optimizer: One of the rewritten model, changed in place.
        state_dict: ``optimizer.state_dict()`` of the plain model.
        model: The rewritten model.

    Raises:
        AttnResError: ``model`` has no sites.
        TypeError: ``model`` is no module.
        CheckpointError: The groups are others, or a state has another shape than its parameter. Nothing is loaded.
    """
    sites = _sites(model, frozen_too=True)
    merged = optimizer.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    numbers: dict[int, int] = {}
    saved_groups = iter(state_dict["param_groups"])
    for group, described in zip(optimizer.param_groups, merged["param_groups"], strict=True):
        kept = [(n, p) for n, p in zip(described["params"], group["params"], strict=True) if id(p) not in sites]
        if not kept:
            continue
        saved = next(saved_groups, None)
        _require_same_group(saved, kept, names)
        assert saved is not None
        own = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
        described.update(copy.deepcopy(own))
        for old, (new, parameter) in zip(saved["params"], kept, strict=True):
            _require_same_shape(state_dict["state"].get(old, {}), parameter, names.get(id(parameter), "?"))
            numbers[old] = new
    if next(saved_groups, None) is not None:
        raise CheckpointError("the plain optimizer has more parameter groups than this one: make both by the same code")
    if lost := state_dict["state"].keys() - numbers.keys():
        raise CheckpointError(f"the plain optimizer has state of parameters in none of its groups: {sorted(lost)}")
    merged["state"] = {numbers[old]: value for old, value in state_dict["state"].items()}
    optimizer.load_state_dict(merged)


def _require_same_group(
    saved: Mapping[str, Any] | None, kept: Sequence[tuple[int, Tensor]], names: Mapping[int, str]
) -> None:
    count = 0 if saved is None else len(saved["params"])
    if count != len(kept):
        first = names.get(id(kept[0][1]), "?")
        raise CheckpointError(
            f"the parameter group that begins with {first!r} has {len(kept)} parameters without the sites, and "
            f"{count} in the state of the plain optimizer: make the groups of both by the same code, the sites in one "
            "of their own"
        )


def _require_same_shape(state: Mapping[str, Any], parameter: Tensor, name: str) -> None:
    for key, value in state.items():
        # Steps are scalars, and factored moments have fewer dimensions.
        if isinstance(value, Tensor) and value.ndim == parameter.ndim and value.shape != parameter.shape:
            raise CheckpointError(
                f"{key} of the plain optimizer has shape {list(value.shape)} where {name!r} has "
                f"{list(parameter.shape)}: the parameters of the two optimizers are in another order"
            )


def _sites(model: nn.Module, *, frozen_too: bool = False) -> dict[int, Tensor]:
    """The queries and gains of ``model`` by their identity."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameters for an optimizer are those of a rewritten nn.Module, not {type(model).__name__}")
    found = [parameter for _, parameter in attnres_parameters(model)]
    if not found:
        raise AttnResError(
            f"this {type(model).__name__} has no pseudo-queries: call rewrite(model, blocks=8) before the optimizer is "
            "made"
        )
    wanted: dict[int, Tensor] = {id(p): p for p in found if p.requires_grad or frozen_too}
    if not wanted:
        raise AttnResError(
            "all pseudo-queries and key gains are frozen (peft freezes what it finds): call requires_grad_() on those "
            "of attnres_parameters(model), or rewrite the model after peft"
        )
    return wanted


def _by_decay(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
