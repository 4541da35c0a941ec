"""Key-value caches of Hugging Face models: the example that a graph is traced with, and calls to compare it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnres_rewrite import _compat
from attnres_rewrite.capture.inputs import Call
from attnres_rewrite.errors import OnnxExportError


def with_cache(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model`` that goes on for two tokens after ``inputs``, with their cache.

    Two, because a size of one would be a constant in the graph.

    Raises:
        OnnxExportError: The model does not generate in one part.
    """
    from transformers.exporters.utils import decompose_for_generation

    try:
        stages = decompose_for_generation(model, dict(inputs), multi_token_decode=True)
    except Exception as error:
        raise OnnxExportError(
            f"{type(model).__name__} cannot be exported with a cache: {error}\nPass example inputs that "
            "model.generate() takes, or use_cache=False"
        ) from error
    if set(stages) != {"prefill", "decode"}:
        raise OnnxExportError(
            f"{type(model).__name__} generates in {len(stages)} parts ({', '.join(stages)}), and export_onnx writes "
            "one file: export its language model, or use_cache=False"
        )
    arguments = dict(stages["decode"][1])
    mask = inputs.get("attention_mask")
    if mask is not None and arguments.get("attention_mask") is None:
        # generate() leaves a mask out that hides nothing; the exported model shall take one nevertheless.
        arguments["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 2)], dim=1)
    elif mask is None and isinstance(arguments.get("attention_mask"), torch.Tensor):
        # generate() makes one where the example happens to have the token that pads; the caller gave none.
        del arguments["attention_mask"]
    _whole(arguments.get("past_key_values"))
    return {name: value for name, value in arguments.items() if value is not None}


def with_positions(call: Call) -> Call:
    """``call`` with positions that follow the cache, and a mask that covers it and hides something."""
    arguments = dict(call.kwargs)
    cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
    _settle(cache)
    if ids is None:
        return call
    start = 0 if cache is None else cache.get_seq_length()
    for name, value in call.kwargs.items():
        if name == "position_ids" and cache is not None and value.dim() == 2:
            following = torch.arange(start, start + ids.shape[1], device=value.device)
            arguments[name] = following.expand(ids.shape).clone()
        if name == "attention_mask" and value.dim() == 2:
            mask = value.new_ones(ids.shape[0], start + ids.shape[1])
            if mask.shape[1] > 1:
                # Some padding, on the side where no token is left with nothing to attend to.
                mask[1:, 0 if start > 0 else -1] = 0
            arguments[name] = mask
    return Call((), arguments)


def _whole(cache: Any) -> None:
    """Give every layer of the example's ``cache`` one length, and no tensor beside keys and values.

    A layer with a sliding window keeps what its window needs. In the graph it keeps all tokens, as the others do, and
    the mask hides those that the window has left.
    """
    sliding = list(filter(_is_sliding, getattr(cache, "layers", [])))
    length = max((layer.cumulative_length for layer in sliding), default=0)
    for layer in sliding:
        _compat.forget_window_size(layer)
        if 0 < (kept := layer.keys.shape[-2]) < length:
            # What it holds does not matter to the trace.
            times = (1, 1, -(-length // kept), 1)
            layer.keys, layer.values = (t.repeat(times)[..., :length, :] for t in (layer.keys, layer.values))


def _settle(cache: Any) -> None:
    """Tell the layers of ``cache`` with a sliding window how long they are: they count, and its tensors are new."""
    for layer in filter(_is_sliding, getattr(cache, "layers", [])):
        layer.cumulative_length = layer.keys.shape[-2]
        if hasattr(layer, "activate_past_recording"):
            # It then reads its window alone, as ever, and returns all tokens, as the graph does.
            layer.activate_past_recording()


def _is_sliding(layer: Any) -> bool:
    is_sliding = getattr(layer, "is_sliding", False) and hasattr(layer, "cumulative_length")
    return is_sliding and isinstance(getattr(layer, "keys", None), torch.Tensor)
