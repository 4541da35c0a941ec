"""Where a measurement was taken, and how it is written down."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions and hardware that figures depend on; nothing that names the machine."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "sources": _sources(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write ``results`` as JSON, making the folder if need be; who reads the file finds it whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(path)


def unpack_wheels(folder: Path) -> None:
    """Unpack the wheels of ``folder`` and put them last on the path of this process and its children."""
    target = tempfile.mkdtemp(prefix="attnres-bench-")
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.append(target)
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), target]))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """The commit checked out; None outside a repository with a commit.

    Marked as changed if the package or a benchmark differs from it; results do not count, since these programs write
    them.
    """
    describe = ["git", "describe", "--always", "--abbrev=12", "--match="]
    compare = ["git", "diff", "--quiet", "HEAD", "--", ":/attnres_rewrite", ":/benchmarks"]
    compare.append(":(exclude,top)benchmarks/results")
    here = Path(__file__).parent
    try:
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if subprocess.run(compare, cwd=here).returncode == 0 else f"{commit}-dirty"


def _sources() -> str:
    """Digest of the package and the benchmarks: whether two measurements ran the same programs, committed or not."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *(here.parent / "attnres_rewrite").rglob("*.py")]
    lines = [f"{file.relative_to(here.parent)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
