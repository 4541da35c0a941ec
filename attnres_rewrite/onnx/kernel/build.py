"""Compiles the kernels: into a file of the user's choice, or once for all into a folder of caches."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from attnres_rewrite._version import __version__
from attnres_rewrite.errors import OnnxKernelError

_logger = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_MAIN = _FOLDER / "block_attn_res.cc"
SOURCES = (_MAIN, *sorted(_FOLDER.glob("*.h")), _FOLDER / "third_party" / "onnxruntime_c_api.h")
_COMPILERS = ("c++", "g++", "clang++")
# Nothing of the processor at hand: rows.h chooses among instruction sets where the library runs. Values that are not
# finite keep their meaning; what goes is errno, traps, and the rounding between a product and the sum that takes it.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)
# On Linux: no other library is needed than C's, and what ONNX Runtime holds pointers to stays when it closes this one.
_LINUX_FLAGS = ("-static-libstdc++", "-static-libgcc", "-Wl,-z,nodelete")
_TIMEOUT_S = 600


def build_kernel(out: str | os.PathLike[str] | None = None, *, compiler: str | None = None) -> Path:
    """Compile the kernels for ONNX Runtime, or find what was compiled before.

    It takes some 15 seconds, GCC 9 or Clang 10 or newer, and Linux or macOS. The library runs on every processor of the
    architecture, with AVX-512 or AVX2 where there is one, and with ONNX Runtime 1.21 and newer.

    Args:
        out: The file to write. Default: one in the user's folder of caches (``$XDG_CACHE_HOME``, ``~/.cache`` or
            ``~/Library/Caches``), which is found again as long as version and sources of this package are the same.
        compiler: The C++ compiler. Default: ``$CXX``, else the first of ``c++``, ``g++`` and ``clang++``.

    Returns:
        The library.

    Raises:
        OnnxKernelError: There is no compiler, the compiler fails, or the file cannot be written.
    """
    target = _cached() if out is None else Path(out)
    if out is None and target.is_file():
        return target
    command = [*_compiler(compiler), *_flags(), str(_MAIN)]
    try:
        if out is None:
            target.parent.mkdir(parents=True, exist_ok=True)
        # Whoever builds at the same time has a folder of its own, and the last one gives its file the name.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attnres-kernel-") as folder:
            built = Path(folder) / target.name
            _run([*command, "-o", str(built)])
            os.replace(built, target)
    except OSError as error:
        raise OnnxKernelError(
            f"cannot write {target}: {error.strerror or error}; build the kernel into another file: "
            "attnres build-onnx-kernel --out FILE"
        ) from error
    _logger.info("Built %s", target)
    return target


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_LINUX_FLAGS) if sys.platform == "linux" else _FLAGS


def _cached() -> Path:
    """The file of these sources, this version and this kind of machine."""
    caches = os.environ.get("XDG_CACHE_HOME")
    folder = Path(caches) if caches else Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return folder / "attnres_rewrite" / f"onnx_kernel-{__version__}-{_digest(SOURCES)[:16]}.{suffix}"


@functools.cache
def _digest(sources: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(" ".join([*_flags(), sys.platform, platform.machine()]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compiler(asked: str | None) -> list[str]:
    # CXX may have arguments, as in "ccache g++".
    named = (asked or os.environ.get("CXX", "")).split()
    if named:
        if shutil.which(named[0]) is None:
            origin = "" if asked else ", which $CXX names"
            raise OnnxKernelError(f"there is no C++ compiler {named[0]!r}{origin}; name another one")
        return named
    if sys.platform not in ("linux", "darwin"):
        raise OnnxKernelError(
            f"the kernel is built by GCC or Clang on Linux or macOS, and this is {sys.platform}; without it, sites run "
            "as the functions in the file"
        )
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise OnnxKernelError(
            f"there is no C++ compiler ({', '.join(_COMPILERS)}): install one (apt-get install g++, dnf install "
            "gcc-c++, xcode-select --install), name it in $CXX, or bring a library that was built elsewhere for this "
            "kind of machine: attnres build-onnx-kernel --out FILE, then register(..., library=FILE). Without it, "
            "sites run as the functions in the file"
        )
    return [found]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OnnxKernelError(f"the compiler did not end in {_TIMEOUT_S} s: {' '.join(command)}") from error
    if done.returncode:
        told = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise OnnxKernelError(f"the compiler failed with status {done.returncode}: {' '.join(command)}\n{told}")
