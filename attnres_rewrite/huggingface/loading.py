"""What transformers calls when it loads a folder of a rewritten model; this module is imported by it alone.

A registered quantizer is its public way to change a model after it is built and before its weights are loaded. Nothing
is quantised, and the loaded model does not know of it: it trains, moves and saves as any other.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.recorded import Recorded
from attnres_rewrite.huggingface.saving import METHOD, install_saving, restore


@register_quantization_config(METHOD)
class AttnResRecord(QuantizationConfigMixin):  # type: ignore[misc]
    """The record of a rewrite in a ``config.json``."""

    def __init__(
        self, record: dict[str, Any], of_base_model: bool, replaced: dict[str, Any], version: str, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.record, self.of_base_model, self.replaced, self.version = record, of_base_model, replaced, version


@register_quantizer(METHOD)
class AttnResLoader(HfQuantizer):  # type: ignore[misc]
    """Does a recorded rewrite again, in a model whose weights are about to be loaded."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Make ``config`` fit to build the model with."""
        restore(config, self.quantization_config.replaced)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same, for versions of transformers that ask this instead."""
        return self.update_attn_implementation(config)

    def preprocess_model(self, model: Any, **_: Any) -> None:
        """Put the sites into ``model``, which is built and has no weights."""
        recorded, prefix = Recorded.from_dict(self.quantization_config.record), f"{model.base_model_prefix}."
        if model.base_model is not model and self.quantization_config.of_base_model:
            recorded = recorded.renamed(lambda name: f"{prefix}{name}".rstrip("."))
        elif model.base_model is model and not self.quantization_config.of_base_model:
            recorded = recorded.renamed(lambda name: _within(name, prefix, type(model).__name__))
        install_saving(recorded.install(model))

    def postprocess_model(self, model: Any, **_: Any) -> Any:
        """Take away what would make ``model`` look quantised."""
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _within(name: str, prefix: str, kind: str) -> str:
    """``name`` in the base model that lies under ``prefix`` in the model that was saved."""
    if not f"{name}.".startswith(prefix):
        raise CheckpointError(
            f"these Attention Residuals are in module {name or '(root)'!r}, which {kind} does not have: load the whole "
            "model that was saved"
        )
    return name[len(prefix) :]
