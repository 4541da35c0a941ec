"""``register``: a session whose sites run as kernels."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnres_rewrite.errors import OnnxKernelError
from attnres_rewrite.onnx.form import DOMAIN
from attnres_rewrite.onnx.kernel.build import build_kernel
from attnres_rewrite.onnx.kernel.domains import imported_domains

_logger = logging.getLogger(__name__)
# What form.py writes without double precision: sites by themselves, and the nodes of sites that share. A form that is
# not known here runs as its function.
_NARROW = "(float32|float16|bfloat16)"
_N = r"[1-9]\d*"
_KINDS = (
    rf"{_N}_sources",
    rf"{_N}_queries",
    rf"{_N}_reads(_of_{_N}_blocks)?(_{_N}_new)?(_\d+_partials)?(_first)?(_last|_{_N}_following)?",
    r"(no_)?partial(_narrow)?",
)
_KERNELS = re.compile(
    rf"{DOMAIN}\.({'|'.join(_KINDS)})(_rank_\d+)?(_{_NARROW})?(_{_NARROW}_parameters)?(_sum)?(_no_gain)?(_scaled)?"
)
# What block_attn_res.cc takes where nothing else is asked for.
_COMMON = tuple(f"{DOMAIN}.{sources}_sources" for sources in range(1, 18))
# Where the library looks, and what ONNX Runtime allows in one entry is 4096 characters.
_ENTRY = f"{DOMAIN}.domains.{{}}"
_LONGEST = 4000


@dataclasses.dataclass(frozen=True)
class RegisteredKernel:
    """The result of :func:`register`.

    Attributes:
        library: The library that was registered.
        domains: The domains whose nodes run as kernels.
        functions: The model's other domains of Attention Residuals, whose nodes run as the functions in the file. Empty
            where no model was given.
    """

    library: Path
    domains: tuple[str, ...]
    functions: tuple[str, ...]

    @property
    def sites(self) -> int:
        """How many sites run as kernels, in all sessions together that this process has open now."""
        return int(_load(self.library).attnres_kernels())


def register(
    session_options: Any,
    model: str | os.PathLike[str] | bytes | None = None,
    *,
    library: str | os.PathLike[str] | None = None,
) -> RegisteredKernel:
    """Let ONNX Runtime run the sites of an exported model as kernels, in sessions on the CPU.

    ONNX Runtime takes a registered operator before the function in the file, which stays as it is. There is a kernel
    for each kind of node that ``export_onnx`` writes, with ``sites="shared"`` and with ``sites="whole"``, in float32,
    float16 or bfloat16. Everything else runs as functions: float64, and reads that are added to the plain stream, gated
    or normalised; a warning is logged for these. With a log severity of 1, ONNX Runtime tells for each kernel that it
    makes the name of the node and the instruction set.

    Do not register it for sessions on a GPU: the kernel runs on the CPU, and tensors would go to and fro.

    Args:
        session_options: The ``onnxruntime.SessionOptions`` that the session is then opened with.
        model: The file that the session is opened with, or its content: kernels are registered for the nodes that it
            has. Default: for the usual form of ``sites="whole"``, which is up to 17 float32 sources ``[B, T, D]`` with
            key gains and ``aggregation="mean"``; whatever else a file has runs as functions, and nobody can tell
            before.
        library: What :func:`build_kernel` built. Default: it is built now, unless that was done before.

    Returns:
        What runs as kernels, and what as functions.

    Raises:
        OnnxKernelError: The model has no sites that are nodes, cannot be read, or has them of no form that a kernel
            takes; the library cannot be built or registered; or the options have it already.
    """
    domains, functions = (_COMMON, ()) if model is None else _found_in(model)
    path = build_kernel() if library is None else Path(library).absolute()
    _register(session_options, path, domains)
    if functions:
        _logger.warning("What is in %s runs as functions, not as kernels", ", ".join(functions))
    _logger.info("Nodes in %s run as kernels", ", ".join(domains))
    return RegisteredKernel(path, domains, functions)


def _found_in(model: str | os.PathLike[str] | bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The domains of ``model`` that kernels take, and those of Attention Residuals that it does not."""
    name = "the model" if isinstance(model, bytes) else str(model)
    try:
        found = [domain for domain in imported_domains(model) if domain.partition(".")[0] == DOMAIN]
    except (OSError, ValueError) as error:
        raise OnnxKernelError(f"{name} cannot be read as an ONNX file: {error}") from error
    domains = tuple(sorted(filter(_KERNELS.fullmatch, found)))
    functions = tuple(sorted(set(found) - set(domains)))
    if not domains:
        there = f"it has {', '.join(functions)}" if functions else "it has no functions of sites"
        raise OnnxKernelError(
            f"no site of {name} can run as a kernel: there are kernels for the functions that export_onnx writes in "
            f"float32, float16 and bfloat16, and {there}. Export the model anew, and not with functions=False"
        )
    return domains, functions


def _register(session_options: Any, path: Path, domains: Sequence[str]) -> None:
    if _has_entry(session_options, _ENTRY.format(0)):
        raise OnnxKernelError(
            "these session options have the kernel already, for the sites of one model; make new ones for every model"
        )
    # Before the options are changed, which cannot be undone.
    _load(path)
    for index, entry in enumerate(_entries(domains)):
        session_options.add_session_config_entry(_ENTRY.format(index), entry)
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:
        # ONNX Runtime has no type of its own for this.
        raise OnnxKernelError(f"ONNX Runtime cannot register the kernel in {path}: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.attnres_kernels.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise OnnxKernelError(
            f"{path} is no kernel that this process can load: {error}. Build it on a machine of this kind: "
            "attnres build-onnx-kernel --out FILE"
        ) from error
    return library


def _has_entry(session_options: Any, key: str) -> bool:
    try:
        session_options.get_session_config_entry(key)
    except Exception:
        # That is how it says no.
        return False
    return True


def _entries(domains: Sequence[str]) -> list[str]:
    """The names with commas between them, in texts that ONNX Runtime takes."""
    entries = [domains[0]]
    for domain in domains[1:]:
        longer = f"{entries[-1]},{domain}"
        if len(longer) > _LONGEST:
            entries.append(domain)
        else:
            entries[-1] = longer
    return entries
