"""What Hugging Face models need of the live form, without importing transformers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_INSTALLED = "_output_capturing_hooks_installed"
# What transformers and peft put on the embeddings, so that the input of a checkpointed layer requires gradients.
_REQUIRING = ("make_inputs_require_grads", "make_inputs_require_grad")
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


def make_hooks_traceable(model: nn.Module) -> None:
    """Put a hook that Dynamo can trace in the place of the one that makes embeddings require gradients.

    That hook is for checkpointed layers run eagerly, which get no gradient where their input requires none. A compiled
    graph has the layers in it, and gradients for whatever requires some.

    Args:
        model: The model that is called. Adapters come after the rewrite as a rule, so this is asked at every call.
    """
    find = getattr(model, "get_input_embeddings", None)
    if find is None:
        return
    with contextlib.suppress(NotImplementedError, AttributeError):
        hooks = getattr(find(), "_forward_hooks", {})
        for key, hook in list(hooks.items()):
            if getattr(hook, "__name__", "") in _REQUIRING:
                hooks[key] = RequiresGradientsEagerly(hook)


class RequiresGradientsEagerly:
    """The hook ``hook``, but nothing where Dynamo traces."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Call the hook, unless the module is traced."""
        return None if torch.compiler.is_dynamo_compiling() else self.hook(module, arguments, output)


class OwnCompiledCall:
    """``get_compiled_call`` of a rewritten model: what ``generate()`` runs for a static cache on a GPU.

    Transformers would compile the call with a backend that knows no Attention Residuals; it is compiled already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, compile_config: object = None) -> Callable[..., Any]:
        """The call of the model itself."""
        return self.model.__call__
