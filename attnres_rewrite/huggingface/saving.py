"""``save_pretrained`` of a rewritten model: the folder says what it holds, and is no plain model for anyone.

``config.json`` gets the record of the rewrite as a ``quantization_config``, the one place of which transformers asks a
registered class before it loads weights. Where that class is not registered, transformers warns and goes on. So the
fields that every model needs to be built, the attention implementation and the activation, are replaced by a sentence
that names this package: whoever does not know the record cannot build the model, and prints the sentence.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from attnres_rewrite import _compat
from attnres_rewrite._version import __version__
from attnres_rewrite.errors import CheckpointError
from attnres_rewrite.forms.live import live_forwards
from attnres_rewrite.forms.recorded import Recorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "attnres_rewrite"
MARK = "this model has Attention Residuals: pip install attnres-rewrite, and import attnres_rewrite before it is loaded"
_ATTENTION, _METHOD = "attn_implementation", "save_pretrained"
_HEADER = """---
library_name: transformers
tags:
- attention-residuals
- attnres-rewrite
---

"""
_SECTION = "This model has Block Attention Residuals"
_CARD = """This model has Block Attention Residuals (arXiv:2603.15031). It is a {kind}, rewritten by `attnres_rewrite`
{version}.

    pip install attnres-rewrite

    import attnres_rewrite
    from transformers import {auto}
    model = {auto}.from_pretrained("path or name of this model")

Without the import it cannot be loaded: it is no plain {kind}.
"""


class SavesRecord:
    """The ``save_pretrained`` of a rewritten model, which writes the record of the rewrite into its configuration."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class; raises :class:`CheckpointError` for a model that is quantised."""
        model: Any = self.model
        if not any(live_forwards(model)):
            # ``undo`` of the owner by itself does not reach what is around it.
            return type(model).save_pretrained(model, save_directory, *args, **kwargs)
        writes, folder = kwargs.get("is_main_process", True), Path(save_directory)
        with recorded_in(model.config, model), _removed_on_failure(folder) if writes else contextlib.nullcontext():
            result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
            # With an upload there is one: ``UploadsCard`` comes before.
            if writes and folder.is_dir() and not (card := folder / "README.md").exists():
                card.write_text(_HEADER + _card(model))
            return result


class UploadsCard:
    """What uploads a folder for ``push_to_hub``, which has put a card of its own into it: ours joins that one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class."""
        card = Path(working_dir) / "README.md"
        text = card.read_text() if card.is_file() else _HEADER
        if _SECTION not in text and any(live_forwards(self.model)):
            card.write_text(f"{text.rstrip()}\n\n{_card(self.model)}")
        return getattr(type(self.model), _compat.UPLOAD)(self.model, working_dir, *args, **kwargs)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Within the context a ``folder`` that was not there before stays only if nothing is raised."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _card(model: Any) -> str:
    auto = "AutoModelForCausalLM" if model.can_generate() else "AutoModel"
    return _CARD.format(kind=type(model).__name__, version=__version__, auto=auto)


def install_saving(model: nn.Module) -> None:
    """Let every model of transformers in the rewritten ``model`` that holds sites save the record with its weights."""
    for module in _of_transformers(model):
        module.__dict__[_METHOD] = SavesRecord(module)
        module.__dict__[_compat.UPLOAD] = UploadsCard(module)


def uninstall_saving(model: nn.Module) -> None:
    """Give every model of transformers in ``model`` its own ``save_pretrained`` back."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_METHOD), SavesRecord):
            del module.__dict__[_METHOD]
            module.__dict__.pop(_compat.UPLOAD, None)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers, which is not imported for the answer: then it is none."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _of_transformers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_of_transformers(module) and any(live_forwards(module))]


@contextlib.contextmanager
def recorded_in(config: Any, model: Any) -> Iterator[None]:
    """Within the context ``config`` has the record of ``model``, and is unfit for those that do not know it."""
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"save_pretrained: this {type(model).__name__} is quantised as well as rewritten, and a folder can say "
            "only one of the two. Save its state_dict, or save it before it is quantised"
        )
    replaced = {
        f"{path}{name}": getattr(one, name) for path, one in _named_configs(config) for name in _activations(one)
    }
    try:
        _set(config, dict.fromkeys(replaced, MARK))
        config.__dict__[_ATTENTION] = MARK
        config.__dict__["quantization_config"] = {
            "quant_method": METHOD,
            "version": __version__,
            "record": Recorded.of(model).to_dict(),
            "of_base_model": model.base_model is model,
            "replaced": replaced,
        }
        yield
    finally:
        _set(config, replaced)
        for name in (_ATTENTION, "quantization_config"):
            config.__dict__.pop(name, None)


def read_record(folder: Path) -> Recorded | None:
    """The record in the ``config.json`` of ``folder``, or ``None`` if that is of a plain model."""
    file = folder / "config.json"
    noted = json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
    return Recorded.from_dict(noted["record"]) if noted and noted.get("quant_method") == METHOD else None


def plain_config(folder: Path) -> Any:
    """The configuration in ``folder`` as it was before the rewrite, for a model that is built from it alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if read_record(folder) is not None:
        restore(config, config.quantization_config["replaced"])
        del config.quantization_config
    return config


def restore(config: Any, replaced: dict[str, Any]) -> None:
    """Put back into ``config``, as it was read, what :func:`recorded_in` replaced."""
    _set(config, replaced)
    for _, one in _named_configs(config):
        _compat.forget_attention(one, MARK)


def _set(config: Any, values: dict[str, Any]) -> None:
    """Set the fields of ``config``, and of the configurations in it, that ``values`` has by their path."""
    by_path = dict(_named_configs(config))
    for name, value in values.items():
        path, stop, field = name.rpartition(".")
        setattr(by_path[f"{path}{stop}"], field, value)


def _named_configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``config`` and the configurations in it, with the path to each, which ends in a full stop."""
    yield path, config
    for name in type(config).sub_configs:
        if (inner := getattr(config, name, None)) is not None and hasattr(inner, "to_dict"):
            yield from _named_configs(inner, f"{path}{name}.")


def _activations(config: Any) -> list[str]:
    """The fields of ``config`` that name an activation."""
    from transformers.activations import ACT2FN

    fields = vars(config).items()
    return [name for name, value in fields if "act" in name and isinstance(value, str) and value in ACT2FN]
