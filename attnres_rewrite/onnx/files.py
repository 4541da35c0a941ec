"""The files of an export: written beside their target, and given its name when they are right."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_rewrite.errors import OnnxExportError

if TYPE_CHECKING:
    from onnxscript import ir

_logger = logging.getLogger(__name__)
# A protobuf message holds at most 2 GiB; what is not weights takes a part of it.
_LARGEST_FILE = 1_900_000_000
_PREFIX = ".attnres-onnx-"
# No export takes a day without a change to its folder.
_ABANDONED_AFTER_S = 86_400.0


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder on the file system of ``target``, so that a file moves from it to there in one step."""
    if not target.parent.is_dir():
        raise OnnxExportError(f"cannot write {target.name}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise OnnxExportError(f"cannot write {target}: it is a folder; name a file in it, such as model.onnx")
    _remove_abandoned(target.parent)
    try:
        holder = tempfile.TemporaryDirectory(dir=target.parent, prefix=_PREFIX)
    except OSError as error:
        raise OnnxExportError(f"cannot write {target.name} in {target.parent}: {error.strerror}") from error
    with holder as folder:
        yield Path(folder)


def _remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of exports that were killed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
            if folder.is_dir() and time.time() - newest > _ABANDONED_AFTER_S:
                shutil.rmtree(folder)
                _logger.info("Removed %s, which an export left behind that did not end", folder)


def save(model: ir.Model, path: Path, external_data_above: int | None = None) -> None:
    """Write ``model`` to ``path``, its weights to a file beside it where they are too large for one.

    Args:
        model: The model.
        path: The file.
        external_data_above: The bytes that weights take at most within it, if that is less than ONNX allows.
    """
    from onnxscript import ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    most = _LARGEST_FILE if external_data_above is None else min(external_data_above, _LARGEST_FILE)
    ir.save(model, path, external_data=_weights_of(path).name if size > most else None)


def publish(temporary: Path, target: Path) -> None:
    """Give the checked file, and the weights beside it if there are any, their names."""
    weights, beside = _weights_of(temporary), _weights_of(target)
    stale = not weights.exists() and beside.exists() and _refers_to(target, beside.name)
    try:
        # First the weights: without the file that refers to them they do nothing.
        if weights.exists():
            os.replace(weights, beside)
        os.replace(temporary, target)
        if stale:
            beside.unlink()
    except OSError as error:
        raise OnnxExportError(f"cannot write {target}: {error.strerror}") from error


def _refers_to(file: Path, name: str) -> bool:
    """Whether the weights of the model in ``file`` are in a file ``name`` beside it."""
    import onnx

    try:
        tensors = onnx.load(file, load_external_data=False).graph.initializer
    except Exception:
        # What is there is no ONNX model, and so nothing that was exported.
        return False
    return any(entry.key == "location" and entry.value == name for tensor in tensors for entry in tensor.external_data)


def _weights_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")
