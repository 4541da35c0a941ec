"""Adapters of peft keep the sites that were trained with them, or say that they do not.

peft freezes what a model has and saves what it added. Sites that train beside an adapter are neither, unless
``modules_to_save=["attn_res"]`` makes them a part of it. Nothing of a rewritten model is called when an adapter is
saved or loaded, so methods of ``PeftModel`` are wrapped; of a model without sites they are the same. An adapter that
does not fit is taken off again.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.live import live_forwards

_logger = logging.getLogger(__name__)


def watch_adapters(module: Any) -> None:
    """Let ``PeftModel`` of ``module``, which is ``peft.peft_model``, ask for the sites when it saves and loads."""
    kind = module.PeftModel
    kind.save_pretrained = _saving(kind.save_pretrained)
    kind.load_adapter = _loading(kind.load_adapter)
    kind.from_pretrained = classmethod(_making(kind.from_pretrained.__func__))


def watch_adapters_of_models(module: Any) -> None:
    """Let models of transformers that load an adapter themselves ask for the sites it carries.

    Args:
        module: ``transformers.integrations.peft``.
    """
    kind = module.PeftAdapterMixin
    method = kind.load_adapter

    @functools.wraps(method)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = set(getattr(self, "peft_config", ()))
        found = method(self, *args, **kwargs)
        try:
            _require_sites(found)
        except CheckpointError:
            if new := set(getattr(self, "peft_config", ())) - before:
                self.delete_adapter(list(new))
            raise
        return found

    kind.load_adapter = load_adapter


def _saving(method: Any) -> Any:
    @functools.wraps(method)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        sites = [live.sites for _, live in live_forwards(self)]
        trained = any(p.requires_grad for one in sites for p in one.parameters())
        if trained and not any(_is_saved(config) for config in _configs(self)):
            _logger.warning(
                "the pseudo-queries and key gains of this model are trained, and the adapter that is saved does not "
                'hold them: make it with modules_to_save=["attn_res"], or save them with '
                "attnres_rewrite.save_pretrained(model.get_base_model(), directory)"
            )
        return method(self, *args, **kwargs)

    return save_pretrained


def _loading(method: Any) -> Any:
    @functools.wraps(method)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        is_new = adapter_name not in self.peft_config
        try:
            result = method(self, model_id, adapter_name, *args, **kwargs)
            _require_sites(result)
        except CheckpointError:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        return result

    return load_adapter


def _making(method: Any) -> Any:
    @functools.wraps(method)
    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        children = [(parent, *named) for parent in model.modules() for named in parent.named_children()]
        required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        attributes = set(vars(model))
        try:
            return method(cls, model, *args, **kwargs)
        except CheckpointError:
            # ``unload`` of peft would leave its copies of the modules that an adapter carries.
            for parent, name, child in children:
                setattr(parent, name, child)
            for name in vars(model).keys() - attributes:
                delattr(model, name)
            for parameter, requires_grad in required:
                parameter.requires_grad_(requires_grad)
            raise

    return from_pretrained


def _require_sites(result: Any) -> None:
    lost = [key for key in getattr(result, "unexpected_keys", ()) if ".attn_res." in key]
    if lost:
        raise CheckpointError(
            f"this adapter was trained with Attention Residuals ({lost[0]}), and the model that it is loaded into "
            "has none: rewrite the base model with the same blocks before the adapter is loaded"
        )


def _is_saved(config: Any) -> bool:
    # peft takes the ends of names.
    return any(name.rpartition(".")[2] == "attn_res" for name in config.modules_to_save or ())


def _configs(model: Any) -> list[Any]:
    return [c for c in model.peft_config.values() if hasattr(c, "modules_to_save")]
