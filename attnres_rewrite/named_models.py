"""Loads a model that is named in text, and weights for it: for the command line and the benchmarks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_rewrite.model_names import is_model_folder, near

if TYPE_CHECKING:
    from torch import Tensor, nn

# For every module that a command needs, the extra that installs it.
EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "transformers": "hf",
    "safetensors": "hf",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
# What a message lists of the keys that do not fit.
_KEYS_SHOWN = 6
# How many tokens "random" is.
_RANDOM_TOKENS = 32
# How the key ends under which the settings of the sites are saved.
_SETTINGS = "attn_res._extra_state"


class CommandError(Exception):
    """A command cannot go on; the message is what the user is told."""


def require(*modules: str) -> None:
    """Check that ``modules`` can be imported.

    Raises:
        CommandError: Some cannot; it names them and the extras that install them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in missing))
        which = "the extra that brings it" if len(missing) == 1 else "the extras that bring them"
        raise CommandError(f"{', '.join(missing)} not installed; {which}: pip install 'attnres-rewrite[{extras}]'")


def is_config_folder(name: str) -> bool:
    """Whether ``name`` is a folder with the configuration of a Hugging Face model."""
    return is_model_folder(Path(name))


def load_model(name: str, device: str = "meta") -> tuple[nn.Module, Any]:
    """The model that a configuration folder or ``module:factory`` describes, and its example inputs or ``None``.

    A configuration makes a model on ``device``; on the meta device its size does not matter. A factory returns
    a model, or a model and example inputs for it.

    Raises:
        CommandError: There is no such model.
    """
    if is_config_folder(name):
        return _from_config(Path(name), device), None
    if ":" not in name:
        raise CommandError(_not_found(name))
    from torch import nn

    made = _call(name, _factory(name))
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} returned a {type(model).__name__}, not an nn.Module, or (nn.Module, inputs)")
    return model, inputs


def _call(name: str, factory: Callable[[], Any]) -> Any:
    """What a user's factory returns; an error of its own is told with the lines that lead to it."""
    from attnres_rewrite.errors import AttnResError

    try:
        return factory()
    except AttnResError:
        raise
    except Exception as error:
        inside = error.__traceback__.tb_next if error.__traceback__ is not None else None
        if inside is None:
            raise CommandError(f"{name}: a factory is called without arguments, and {error}") from error
        lines = "".join(traceback.format_tb(inside))
        raise CommandError(f"{name} raised {type(error).__name__}: {error}\n{lines.rstrip()}") from error


def _not_found(name: str) -> str:
    """Why ``name`` is no model, and what is near it."""
    told = f"{name!r} is neither a folder with a config.json nor module:factory, such as my_package.models:make_model"
    if Path(name).is_dir():
        told += f"; the folder {name} has no config.json, which save_pretrained() writes"
    elif name.endswith("config.json"):
        told += f"; give the folder, {Path(name).parent}"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        told += (
            f"; models are not downloaded: hf download {name} config.json --local-dir FOLDER gets what explain needs"
        )
    return told + _near(name)


def _near(name: str) -> str:
    found = near(name)
    return f". Did you mean {' or '.join(found)}?" if found else ""


def _factory(name: str) -> Callable[[], Any]:
    """The function that ``module:factory`` names, whose module is imported as from this folder."""
    module_name, _, factory = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), factory)
    except ModuleNotFoundError as error:
        # A module that this one imports is another matter.
        missing = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        raise CommandError(f"{name}: {error}{_near(name) if missing else ''}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"{name}: {error}{_near(name)}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise CommandError(f"{name} is a value of type {type(found).__name__}, not a function{_near(name)}")
    made: Callable[[], Any] = found
    return made


def _from_config(folder: Path, device: str) -> nn.Module:
    require("transformers")
    import torch
    import transformers

    from attnres_rewrite import from_pretrained
    from attnres_rewrite.huggingface.saving import plain_config, read_record

    if device != "meta" and read_record(folder) is not None:
        return from_pretrained(folder, backend="eager").to(device)
    try:
        config = plain_config(folder)
    except (OSError, ValueError, KeyError) as error:
        # What follows its first line is how to install another version.
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise CommandError(f"transformers cannot read {folder / 'config.json'}: {told}") from error
    if device == "meta":
        # An empty cache made on the meta device cannot be traced, and a report has no use for one.
        config.use_cache = False
    names: Sequence[str] = getattr(config, "architectures", None) or ()
    kinds = (getattr(transformers, name, None) for name in names)
    kind = next((kind for kind in kinds if kind is not None), None)
    with torch.device(device):
        made: nn.Module = kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    return made


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a state_dict of ``model``, or of ``model`` before it was rewritten, from a file.

    Args:
        model: A rewritten model.
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.

    Returns:
        What the weights are now, in words.

    Raises:
        CommandError: The file cannot be read, or it does not fit.
    """
    from torch.fx import GraphModule

    from attnres_rewrite import attnres_parameters, disabled

    given = _read_weights(path)
    # The settings in it are compared when it is loaded.
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.endswith(_SETTINGS)}
    attnres = {name for name, _ in attnres_parameters(model)}
    plain = not attnres & set(given)
    # Tied weights are one tensor under several names, and files often have only one of them.
    loaded = {id(state[key]) for key in given if key in state}
    missing = [key for key, value in state.items() if key not in given and id(value) not in loaded]
    missing = [key for key in missing if not (plain and key in attnres)]
    unexpected = [key for key in given if key not in state and not (key.endswith(_SETTINGS) and not plain)]
    shapes = [
        f"{key} {list(value.shape)} instead of {list(state[key].shape)}"
        for key, value in given.items()
        if key in state and value.shape != state[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in kinds.items() if keys]
    if faults:
        raise CommandError(
            f"--weights {path} does not fit the {type(model).__name__}: {'; '.join(faults)}; it takes a whole "
            "state_dict of the rewritten model or of the plain one"
        )
    with disabled(model) if plain and not isinstance(model, GraphModule) else contextlib.nullcontext():
        model.load_state_dict(given, strict=False)
    return f"{path}, of a plain model: pseudo-queries and gains stay as they were" if plain else str(path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    import torch

    if not path.is_file():
        raise CommandError(f"--weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            require("safetensors")
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(
            f"--weights {path} cannot be read ({type(error).__name__}): it takes what torch.save(model.state_dict(), "
            "...) writes, or a file whose name ends in .safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        held = f"a {type(found).__name__}" + (f" with {_listed(list(found))}" if isinstance(found, Mapping) else "")
        raise CommandError(f"--weights {path} holds {held}, not a state_dict: save model.state_dict() by itself")
    return dict(found)


def _listed(keys: Sequence[object]) -> str:
    return ", ".join(map(str, keys[:_KEYS_SHOWN])) + (", ..." if len(keys) > _KEYS_SHOWN else "")


def read_token_ids(model: nn.Module, source: str) -> tuple[Tensor, Any]:
    """Token ids ``[B, T]`` for ``model``, and the example inputs that they make.

    Args:
        model: A model that begins with an embedding of tokens.
        source: ``"random"``, or a text file of numbers, a sequence a line, with spaces or commas between them.

    Raises:
        CommandError: The model takes no tokens, or the file is not of this kind.
    """
    import torch
    from torch import nn

    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise CommandError(f"--tokens: this {type(model).__name__} has no embedding, so it takes no tokens")
    vocabulary = embedding.num_embeddings
    if source == "random":
        ids = torch.randint(vocabulary, (1, _RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
    else:
        ids = _ids_in(Path(source))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise CommandError(f"--tokens {source}: ids are from 0 to {vocabulary - 1} in this {type(model).__name__}")
    if getattr(model, "main_input_name", None) != "input_ids":
        return ids, ids
    config = getattr(model, "config", None)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return ids, {"input_ids": ids, **decoder}


def _ids_in(path: Path) -> Tensor:
    import torch

    if not path.is_file():
        raise CommandError(f'--tokens {path}: there is no such file; "random" takes random tokens')
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        ids = [[int(number) for number in line] for line in lines if line]
    except ValueError as error:
        raise CommandError(f"--tokens {path} holds something else than token ids: {error}") from error
    if len({len(line) for line in ids}) != 1:
        raise CommandError(f"--tokens {path}: its lines are sequences, and need one length: {sorted(map(len, ids))}")
    return torch.tensor(ids)
