"""A Llama with manifold-constrained hyper-connections (arXiv:2512.24880) in place of its residuals.

They are those of the package ``hyper-connections``, which is a dependency of this benchmark only.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class HyperLayer(nn.Module):
    """A layer of a Llama whose two sublayers read a mixture of the streams, and write to all of them."""

    def __init__(self, layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.layer, self.attention, self.mlp = layer, attention, mlp

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        """Streams ``[B * S, T, D]`` after both sublayers."""
        layer: Any = self.layer
        read, write = self.attention(hidden_states)
        hidden_states = write(layer.self_attn(hidden_states=layer.input_layernorm(read), **rest)[0])
        read, write = self.mlp(hidden_states)
        added: Tensor = write(layer.mlp(layer.post_attention_layernorm(read)))
        return added


def use_hyper_connections(model: LlamaForCausalLM, streams: int) -> None:
    """Give ``model`` ``streams`` streams, expanded before the first layer and summed before the last norm."""
    width = model.config.hidden_size
    connect, expand, reduce = mc_get_init_and_expand_reduce_stream_functions(streams, dim=width)
    layers = model.model.layers
    for i, layer in enumerate(layers):
        # Without a number each one would begin with a stream drawn at random.
        layers[i] = HyperLayer(layer, connect(layer_index=2 * i), connect(layer_index=2 * i + 1))
    layers[0].register_forward_pre_hook(lambda module, inputs: (expand(inputs[0]),))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (reduce(inputs[0]),))


def compile_layers(model: LlamaForCausalLM, backend: str) -> None:
    """Compile a layer, for all to use: to compile all of them in one graph takes more than seven minutes."""
    forward = torch.compile(HyperLayer.forward, backend=backend, dynamic=False)
    for layer in model.model.layers:
        layer.forward = types.MethodType(forward, layer)
