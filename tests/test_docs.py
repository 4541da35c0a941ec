"""The documentation: its code runs and prints what it says, it names everything public, and what it names exists."""

import ast
import contextlib
import doctest
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from models import Tower, embeddings, llama, mostly_slow, token_ids
from torch import nn

import attnres_rewrite
from attnres_rewrite import _compat

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python\n" in path.read_text())
# The others take more than a few seconds.
QUICK = set(PAGES) - {"conversion.md", "onnx.md", "quickstart.md", "quantization.md", "training.md"}
CELL = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def tiny_llama() -> dict[str, object]:
    return {"model": llama(2), "ids": token_ids()}


def plain_and_other() -> dict[str, object]:
    return {**tiny_llama(), "plain": llama(2)}


def two_models() -> dict[str, object]:
    own = attnres_rewrite.rewrite(Tower(4), blocks=2, example_inputs=embeddings(), backend="eager")
    return {**tiny_llama(), "own": own, "MyModel": lambda: Tower(4), "x": embeddings()}


def rewritten_llama() -> dict[str, object]:
    model = attnres_rewrite.rewrite(llama(2), blocks=2, backend="eager")
    return {"model": model, "example": {"input_ids": token_ids()}, "export_onnx": attnres_rewrite.export_onnx}


# What the first block of a page may take for granted.
SETUPS = {
    "faq.md": tiny_llama,
    "onnx.md": lambda: {**rewritten_llama(), "plain": llama(2)},
    "quantization.md": rewritten_llama,
    "saving.md": two_models,
    "training.md": plain_and_other,
    "writing_a_pass.md": tiny_llama,
}


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, object]:
    """Where the blocks of a page run: in a module and a folder of their own, with Inductor left out."""
    monkeypatch.chdir(tmp_path)
    # It takes a minute for a model, and what it generates has tests of its own. Everything before it is as for users.
    monkeypatch.setattr(_compat, "inductor_compile", lambda module, *_: module.forward)
    module = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return module.__dict__


@pytest.mark.parametrize("page", mostly_slow(PAGES, *QUICK))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, names, tmp_path) -> None:
    names.update(torch=torch, nn=nn, **SETUPS.get(page, dict)())
    text = (DOCS / page).read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    for number, (block, promised) in enumerate(blocks):
        # In a file, because error messages quote the line.
        file = tmp_path / f"block_{number}.py"
        file.write_text(block)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, str(file), "exec"), names)
        if promised:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(promised, printed.getvalue(), flags), printed.getvalue()


def test_every_public_name_has_one_place_in_the_reference(monkeypatch) -> None:
    pytest.importorskip("docutils", reason="the extra docs is not installed")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    import public_names

    grouped = [name for names in public_names.GROUPS.values() for name in names]
    assert public_names.ungrouped() == [], "give these a section in docs/_ext/public_names.py"
    assert sorted(grouped) == sorted(attnres_rewrite.__all__)
    text = public_names.sections()
    assert all(text.count(f":: attnres_rewrite.{name}\n") == 1 for name in attnres_rewrite.__all__)
    in_modules = [name for names in public_names.IN_MODULES.values() for name in names]
    kernel = set(attnres_rewrite.onnx.__all__) - set(attnres_rewrite.__all__)
    shared = {f"distributed.{name}" for name in attnres_rewrite.distributed._HOMES}
    assert set(in_modules) == {f"onnx.{name}" for name in kernel} | shared
    assert all(text.count(f":: attnres_rewrite.{name}\n") == 1 for name in in_modules)
    # A name that nobody put into a group is on the page all the same.
    monkeypatch.delitem(public_names.GROUPS, "Save and load it")
    assert {"from_pretrained", "save_pretrained"} <= set(public_names.ungrouped())
    assert ":: attnres_rewrite.from_pretrained\n" in public_names.sections().partition("## Others")[2]


def functions_in(path: Path) -> set[str]:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_test_error_and_script_that_a_page_names_exists(page) -> None:
    text = (DOCS / page).read_text()
    for file, name in CELL.findall(text):
        assert name in functions_in(ROOT / "tests" / file), f"{file}::{name}"
    for file in re.findall(r"`(?:tests/)?(test_\w+\.py)", text):
        assert (ROOT / "tests" / file).exists(), file
    for name in re.findall(r"`(\w+Error)`", text):
        assert name in attnres_rewrite.__all__ or name in ("PostconditionError", "AttributeError"), name
    for script in re.findall(r"`(?:python )?((?:benchmarks|examples)/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_every_cell_of_the_composition_is_a_test_a_refusal_or_a_gap() -> None:
    rows = [line for line in (DOCS / "composition.md").read_text().splitlines() if line.startswith("| ")]
    cells = [cell for row in rows if "---" not in row for cell in re.split(r" \| ", row.strip("| "))[1:]]
    cells = [cell for cell in cells if cell not in ("live", "`ExportedProgram`", "`GraphModule`")]
    assert len(cells) % 3 == 0
    for cell in cells:
        is_gap = cell == "–" or cell.startswith("not tested")
        assert is_gap != bool(CELL.search(cell)), cell
        assert not cell.startswith("refused") or re.search(r"`\w+Error`", cell), cell
    assert sum(bool(CELL.search(cell)) for cell in cells) > 60


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path) -> None:
    """Sphinx warns of a link that leads nowhere, of a page in no table of contents, of a docstring that is no reST."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="the extra docs is not installed")
    pytest.importorskip("myst_parser")
    arguments = ["-b", "html", "-q", "-W", "--keep-going", "-d", str(tmp_path / "trees"), str(DOCS)]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert sphinx.build_main([*arguments, str(tmp_path / "html")]) == 0, said.getvalue()
    reference = (tmp_path / "html" / "reference.html").read_text()
    assert all(f'id="attnres_rewrite.{name}"' in reference for name in attnres_rewrite.__all__)
    assert 'href="_modules/attnres_rewrite/api.html#rewrite"' in reference
