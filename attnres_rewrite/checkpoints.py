"""Folders of rewritten models: ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_rewrite._version import __version__
from attnres_rewrite.errors import CheckpointError, MissingPackageError
from attnres_rewrite.forms.live import require_live, set_backend, uninstall
from attnres_rewrite.forms.recorded import Recorded
from attnres_rewrite.huggingface.saving import is_of_transformers, read_record

# What a folder of a model that is none of transformers holds.
WEIGHTS, RECORD = "model.safetensors", "attnres.json"


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Save a rewritten model, its weights with the record of the rewrite, to a folder.

    A model of transformers saves itself, by ``model.save_pretrained``, which since the rewrite does all of this. Of any
    other the folder gets ``model.safetensors`` and ``attnres.json``; how to make the module is known to the caller of
    :func:`from_pretrained`.

    Args:
        model: A model that was rewritten in place.
        directory: The folder, which is made if it does not exist.
        **options: For transformers, such as ``max_shard_size``.

    Raises:
        AttnResError: ``model`` was not rewritten in place.
        MissingPackageError: safetensors is missing (extra ``hf``).
        TypeError: Options for a model that is none of transformers.
    """
    require_live(model, "save_pretrained")
    if is_of_transformers(model):
        model.save_pretrained(directory, **options)  # type: ignore[operator]
        return
    if options:
        raise TypeError(
            f"save_pretrained: {sorted(options)} are for models of transformers, not {type(model).__name__}"
        )
    safetensors = _safetensors("save_pretrained")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"version": __version__, "model": type(model).__name__, "record": Recorded.of(model).to_dict()}
    # Both files are whole before either gets its name.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".attnres-") as temporary:
        safetensors.save_model(model, str(Path(temporary) / WEIGHTS))
        (Path(temporary) / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for name in (WEIGHTS, RECORD):
            os.replace(Path(temporary) / name, folder / name)


def from_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    backend: str | Callable[..., Any] = "inductor",
    **options: Any,
) -> nn.Module:
    """Load a model that was saved by :func:`save_pretrained`, or by ``save_pretrained`` of a rewritten one.

    Nothing is traced: the rewrite is done again as it was recorded, and compared with the settings in the weights.

    Args:
        directory: The folder.
        model: For a model that is none of transformers: the plain module, or what makes it. It is rewritten in place.
        backend: What compiles the rewritten graph, as for :func:`attnres_rewrite.rewrite`.
        **options: For ``from_pretrained`` of transformers, such as ``dtype`` and ``device_map``; for another model
            those of ``torch.compile``, as for :func:`attnres_rewrite.rewrite`.

    Returns:
        The rewritten model; one of transformers in eval mode, as it loads its models.

    Raises:
        CheckpointError: The folder holds no rewritten model, or one of other modules than ``model``.
        MissingPackageError: transformers or safetensors is missing (extra ``hf``).
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {str(folder)!r}: a name on the Hub is for from_pretrained of a class of transformers, "
            "which loads rewritten models too"
        )
    if (folder / RECORD).is_file():
        return _load_own(folder, model, backend, options)
    if model is not None:
        raise CheckpointError(f"{folder} has no {RECORD}, which save_pretrained writes for models like yours")
    loaded = _load_of_transformers(folder, options)
    set_backend(loaded, backend)
    return loaded


def _load_own(
    folder: Path, model: nn.Module | Callable[[], nn.Module] | None, backend: str | Callable[..., Any], options: Any
) -> nn.Module:
    saved = json.loads((folder / RECORD).read_text())
    if model is None:
        raise CheckpointError(
            f"{folder} holds the weights of a {saved['model']}: give it, or what makes it, as in "
            f'from_pretrained("{folder}", {saved["model"]})'
        )
    safetensors = _safetensors("from_pretrained")
    made = model if isinstance(model, nn.Module) else model()
    # What is made here is lost with an error; a module of the user's gets its weights back.
    own = [(t, t.detach().clone()) for t in (*made.parameters(), *made.buffers())] if made is model else []
    Recorded.from_dict(saved["record"]).install(made, backend, **options)
    try:
        _load_weights(safetensors, made, folder / WEIGHTS)
    except BaseException:
        uninstall(made)
        with torch.no_grad():
            for tensor, value in own:
                tensor.copy_(value)
        raise
    return made


def _load_weights(safetensors: Any, made: nn.Module, file: Path) -> None:
    try:
        safetensors.load_model(made, str(file))
    except CheckpointError:
        raise
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {file} do not fit this {type(made).__name__}: make it as it was when it was saved. {error}"
        ) from error


def _load_of_transformers(folder: Path, options: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError("from_pretrained", "transformers", "hf") from error
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has neither {RECORD} nor config.json: it is no folder of a saved model")
    config = json.loads(file.read_text())
    if read_record(folder) is None:
        raise CheckpointError(
            f"{folder} holds a plain {' or '.join(config.get('architectures') or ['model'])}: load it with "
            "transformers, then rewrite(model, blocks=8)"
        )
    kind = next((k for name in config["architectures"] if (k := getattr(transformers, name, None))), None)
    loaded: nn.Module = (kind or transformers.AutoModel).from_pretrained(folder, **options)
    return loaded


def _safetensors(verb: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError(verb, "safetensors", "hf") from error
    return safetensors.torch
