"""Names of models that the command line can load from here: to complete what is typed, and to correct it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

_MOST_NEAR = 3


def completions(incomplete: str) -> list[str]:
    """What ``incomplete`` can become: folders, and ``module:factory`` of the Python files in this folder.

    A folder that holds no model itself ends in a slash: the model may be further in.
    """
    if ":" in incomplete:
        return [name for name in factories(module_file(incomplete)) if name.startswith(incomplete)]
    folders = [str(path) if is_model_folder(path) else f"{path}/" for path in _folders(incomplete)]
    return folders + [name for name in local_factories() if name.startswith(incomplete)]


def near(name: str) -> list[str]:
    """Names of models that are much like ``name``, the nearest first."""
    folders = [str(path) for path in _folders(f"{Path(name).parent}/" if "/" in name else "") if is_model_folder(path)]
    known = list(dict.fromkeys([*folders, *local_factories(), *factories(module_file(name))]))
    found = difflib.get_close_matches(name, known, n=_MOST_NEAR)
    # A module or a factory by itself is near every name that it is a part of.
    parts = [(part, full) for full in known for part in (Path(full).name, *full.split(":"))]
    like = difflib.get_close_matches(name.rpartition(":")[2], dict(parts), n=_MOST_NEAR, cutoff=0.7)
    return (found or [full for one in like for part, full in dict.fromkeys(parts) if part == one])[:_MOST_NEAR]


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with the configuration of a Hugging Face model."""
    return (path / "config.json").is_file()


def module_file(name: str) -> Path:
    """The file of the module in ``module:factory``, as it is found from this folder."""
    return Path(*name.partition(":")[0].split(".")).with_suffix(".py")


def local_factories() -> list[str]:
    """Every ``module:factory`` of the Python files in this folder."""
    return [name for path in sorted(Path().glob("*.py")) for name in factories(path)]


def factories(path: Path) -> list[str]:
    """The functions in a Python file that may make a model: they need no arguments and return something.

    The file is read, not run.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    module = ".".join(path.with_suffix("").parts)
    return [f"{module}:{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef) and _makes(node)]


def _makes(function: ast.FunctionDef) -> bool:
    given = function.args
    needs = len(given.posonlyargs) + len(given.args) - len(given.defaults) + given.kw_defaults.count(None)
    returns = any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function))
    return not function.name.startswith(("_", "test_")) and not needs and returns


def _folders(beginning: str) -> Iterator[Path]:
    """The folders whose path begins so; hidden ones only if that is asked for."""
    parent = Path(beginning) if beginning.endswith("/") else Path(beginning).parent
    last = "" if beginning.endswith("/") else Path(beginning).name
    try:
        inside: Sequence[Path] = sorted(parent.iterdir())
    except OSError:
        return
    for path in inside:
        shown = path.name.startswith(".") == last.startswith(".") and path.name != "__pycache__"
        if shown and path.name.startswith(last) and path.is_dir():
            yield path
