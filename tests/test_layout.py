"""The folders of the package: imports go one way, down the layers, and no file is too long to read."""

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "attnres_rewrite"
# Every folder and file of the package, the users of the others first. A module imports from its own layer and below.
LAYERS = (
    ("cli", "demo", "bench", "named_models", "model_names"),
    ("__init__",),
    ("api", "checkpoints", "compile_ahead", "conversion", "optimizers"),
    ("onnx", "inspection", "huggingface", "distributed", "lightning"),
    ("forms",),
    ("capture",),
    ("report",),
    ("pipeline",),
    ("passes",),
    ("patterns",),
    ("ops", "graph", "streams"),
    ("config", "errors", "_compat", "_version"),
)
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join([*folders, *([] if name == "__init__" and folders else [name])])


@functools.cache
def imports_of(path: Path) -> tuple[tuple[str, bool], ...]:
    """The modules of the package that ``path`` imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        for inner in ast.walk(node)
    }
    return tuple(
        (name, node not in lazy)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
    )


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        parts = name.split(".")
        if parts[0] != "attnres_rewrite":
            continue
        # The longest part of it that is a module.
        depths = (parts[1:depth] for depth in range(len(parts), 1, -1))
        yield next((".".join(d) for d in depths if is_module(d)), "__init__")


def is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_module_has_a_layer() -> None:
    assert {name_of(path).split(".")[0] for path in MODULES} == set(LAYER_OF)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_the_layers(path: Path) -> None:
    own = LAYER_OF[name_of(path).split(".")[0]]
    upwards = [name for name, _ in imports_of(path) if LAYER_OF[name.split(".")[0]] < own]
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Whatever is imported inside a function, or for annotations alone, is left out."""
    edges = {name_of(path): {name for name, now in imports_of(path) if now} for path in MODULES}
    folders = {name: {inner for inner in edges[name] if inner.startswith(name + ".")} for name in edges}
    # An import from a folder's own __init__ by one of its files is no way back.
    reached = {name: set(targets) for name, targets in edges.items()}
    for middle, name in itertools.product(edges, edges):
        if middle in reached[name]:
            reached[name] |= reached[middle]
    assert [name for name in edges if name in reached[name] and not folders[name]] == []


def test_no_file_is_too_long() -> None:
    """But for the one that is read whole when there is a new PyTorch: every private name is in it."""
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert [name for name, lines in lengths.items() if lines > 350] == ["_compat"]
