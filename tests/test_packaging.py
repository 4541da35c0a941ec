"""The wheel and the sdist; ``make dist-check`` installs them too."""

import email
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import attnres_rewrite

ROOT = Path(__file__).parents[1]
LEFT = (".*", "*.egg-info", "__pycache__", "build", "dist", "out", "attnres-demo", "_build")


def build(source: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, the wheel that is made from it, and in a folder the wheel that is made from the sources."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # Of the sources, because building writes beside them.
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT), symlinks=True)
    build(folder / "source", folder)
    build(folder / "source", folder / "directly", "--wheel")
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"attnres_rewrite-{attnres_rewrite.__version__}-py3-none-any.whl"
    files = contents(wheel)
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "attnres_rewrite").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    info = f"attnres_rewrite-{attnres_rewrite.__version__}.dist-info"
    assert {name for name in files if not name.startswith(info)} == package
    assert "attnres_rewrite/py.typed" in files
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    # What the kernel for ONNX Runtime is built from, and the licence of the header among that.
    kernel = "attnres_rewrite/onnx/kernel"
    assert {f"{kernel}/block_attn_res.cc", f"{kernel}/rows.h", f"{kernel}/third_party/onnxruntime_c_api.h"} <= set(
        files
    )
    assert b"Microsoft" in files[f"{info}/licenses/{kernel}/third_party/LICENSE.onnxruntime"]
    points = files[f"{info}/entry_points.txt"].decode()
    assert "attnres = attnres_rewrite.cli:main" in points
    assert "attnres = attnres_rewrite.forms.backend:attnres_backend" in points


@pytest.mark.slow
def test_the_metadata_are_those_of_the_project(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    text = contents(wheel)[f"attnres_rewrite-{attnres_rewrite.__version__}.dist-info/METADATA"].decode()
    metadata = email.message_from_string(text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == attnres_rewrite.__version__
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == project["optional-dependencies"].keys()
    without_extra = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert without_extra == project["dependencies"]


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel_and_has_what_a_packager_needs(dist: Path) -> None:
    (wheel,), (direct,) = dist.glob("*.whl"), (dist / "directly").glob("*.whl")
    assert contents(wheel) == contents(direct)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "docs/index.md"):
        assert name in names
    # Tests run from it: with their models, not test files alone.
    assert {"tests/models.py", "tests/conftest.py", "tests/zoo/conftest.py"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith((".venv", "docs/_build"))]


def test_the_version_has_one_source() -> None:
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    places = [
        path
        for path in (ROOT / "attnres_rewrite").rglob("*.py")
        if f'"{attnres_rewrite.__version__}"' in path.read_text()
    ]
    assert places == [ROOT / "attnres_rewrite" / "_version.py"]
