"""What Hugging Face models need of the live form, without importing transformers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

_INSTALLED = "_output_capturing_hooks_installed"
_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")


def install_output_hooks(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Do what transformers does at the first call that asks for hidden states, behind a lock that Dynamo cannot trace.

    Args:
        model: The model that is called.
        arguments: The keyword arguments of the call.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    config = getattr(model, "config", None)
    asked = any(value for name, value in arguments.items() if name.startswith("output_"))
    if capturing is None or not (asked or any(getattr(config, flag, False) for flag in _FLAGS)):
        return
    from transformers import PreTrainedModel

    for module in model.modules():
        # Transformers does not look whether a model within a model has its hooks already, and would install them twice.
        if isinstance(module, PreTrainedModel) and not any(getattr(m, _INSTALLED, False) for m in module.modules()):
            capturing.maybe_install_capturing_hooks(module)
