"""Adapters of peft keep the sites that were trained with them, or say that they do not.

peft freezes what a model has and saves what it added. Sites that train beside an adapter are neither, unless
``modules_to_save=["attn_res"]`` makes them a part of it. Nothing of a rewritten model is called when an adapter is
saved or loaded, so the two methods of ``PeftModel`` are wrapped; of a model without sites they are the same.
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
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        lost = [key for key in getattr(result, "unexpected_keys", ()) if ".attn_res." in key]
        if lost:
            raise CheckpointError(
                f"this adapter was trained with Attention Residuals ({lost[0]}), and the model that it is loaded into "
                "has none: rewrite the base model with the same blocks before the adapter is loaded"
            )
        return result

    return load_adapter


def _is_saved(config: Any) -> bool:
    # peft takes the ends of names.
    return any(name.rpartition(".")[2] == "attn_res" for name in config.modules_to_save or ())


def _configs(model: Any) -> list[Any]:
    return [c for c in model.peft_config.values() if hasattr(c, "modules_to_save")]
