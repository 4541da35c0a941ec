"""How large a model is, as far as a plan needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attnres_rewrite.errors import MissingPackageError, NoResidualStreamError
from attnres_rewrite.forms.anchor import AnchorSpec
from attnres_rewrite.forms.live import live_forwards


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by how they can be shared.

    Attributes:
        matrices: In tensors of two dimensions or more, which tensor parallel shares.
        vectors: In vectors, such as gains of norms.
        experts: In the matrices of routed experts, which expert parallel shares too.
    """

    matrices: float = 0
    vectors: float = 0
    experts: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matrices + self.vectors + self.experts


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        layers: Number of layers.
        width: D, the width of the stream.
        layer: Parameters of a layer, on average.
        outside: Parameters outside the layers, without those of sites.
        sublayers: Branch outputs of a layer: 2, or 1 where attention and feed-forward are parallel.
        blocks: Number of layers in every block, of a model that was rewritten.
        name: What it is called in messages.
    """

    layers: int
    width: int
    layer: Parameters = Parameters()
    outside: Parameters = Parameters()
    sublayers: int = 2
    blocks: tuple[int, ...] | None = None
    name: str = "model"

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        """The size of a module, of a configuration of transformers, or of itself.

        Raises:
            NoResidualStreamError: The module has no list of layers.
            TypeError: ``model`` is none of these.
        """
        if isinstance(model, cls):
            return model
        if isinstance(model, nn.Module):
            return _of_module(model)
        if hasattr(model, "to_dict") and hasattr(model, "model_type"):
            return _of_config(model)
        raise TypeError(
            f"plan takes an nn.Module, a configuration of transformers or a ModelSize, not a {type(model).__name__}"
        )


def _of_config(config: Any) -> ModelSize:
    try:
        from transformers import AutoModel, AutoModelForCausalLM
    except ImportError as error:
        raise MissingPackageError("plan", "transformers", "hf") from error
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:
            # A configuration that no language model has.
            model = AutoModel.from_config(config)
    return _of_module(model)


def _of_module(model: nn.Module) -> ModelSize:
    layers = _layers_of(model)
    inside = {id(p) for p in layers.parameters()}
    outside = [(n, p) for n, p in model.named_parameters() if id(p) not in inside and "attn_res." not in n]
    total = _count(layers.named_parameters())
    each = Parameters(*(value / len(layers) for value in dataclasses.astuple(total)))
    size = ModelSize(len(layers), _width_of(model), each, _count(outside), name=type(model).__name__)
    return _with_recorded_blocks(size, model)


def _layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers: of all lists that are in no other the one with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise NoResidualStreamError(
            f"this {type(model).__name__} has no nn.ModuleList of layers: give a ModelSize(layers=..., width=...)"
        )
    return max(outer, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _width_of(model: nn.Module) -> int:
    """D: of the sites, as the configuration says, or of the first embedding."""
    for name, parameter in model.named_parameters():
        if "attn_res." in name:
            return parameter.numel()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return int(config.get_text_config().hidden_size)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise NoResidualStreamError(
        f"how wide the stream of this {type(model).__name__} is cannot be seen: give a ModelSize(layers=..., width=...)"
    )


def _with_recorded_blocks(size: ModelSize, model: nn.Module) -> ModelSize:
    """The size with the blocks of a model that was rewritten in place, where they are whole layers of one stream."""
    live = [AnchorSpec.from_json(forward.spec) for _, forward in live_forwards(model)]
    if len(live) != 1 or len(live[0].blocks) != 1:
        return size
    (sizes,) = live[0].blocks
    sublayers = sum(sizes) // size.layers
    if sublayers == 0 or any(one % sublayers for one in sizes):
        return size
    return dataclasses.replace(size, sublayers=sublayers, blocks=tuple(one // sublayers for one in sizes))


def _count(parameters: Iterable[tuple[str, nn.Parameter]]) -> Parameters:
    found = {"matrices": 0, "vectors": 0, "experts": 0}
    for name, parameter in parameters:
        routed = ".experts." in name and "shared" not in name
        found["experts" if routed else "matrices" if parameter.dim() > 1 else "vectors"] += parameter.numel()
    return Parameters(**found)
