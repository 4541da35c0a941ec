"""Where Hugging Face's libraries meet rewritten models: what was rewritten comes back rewritten, or not at all.

:mod:`saving` marks the folder that ``save_pretrained`` writes; transformers calls :mod:`loading` when it reads one.
:mod:`adapters` speaks for peft, :mod:`dynamo_backends` for accelerate.
"""

import importlib
from typing import Any

from attnres_rewrite import _compat


def tell_libraries() -> None:
    """Let the libraries know of rewritten models when they are imported; none of them is imported for it."""
    _compat.after_import("transformers.quantizers.auto", lambda _: _module("loading"))
    _compat.after_import("peft.peft_model", lambda peft: _module("adapters").watch_adapters(peft))
    _compat.after_import(
        "transformers.integrations.peft", lambda peft: _module("adapters").watch_adapters_of_models(peft)
    )
    _compat.after_import(
        "accelerate.utils.dataclasses",
        lambda accelerate: _module("dynamo_backends").explain_missing_backend(accelerate),
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"attnres_rewrite.huggingface.{name}")
