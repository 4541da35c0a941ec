"""The files of an export: written beside their target, and given its name when they are right."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_rewrite.errors import OnnxExportError

if TYPE_CHECKING:
    from onnxscript import ir

# A protobuf message holds at most 2 GiB; what is not weights takes a part of it.
_LARGEST_FILE = 1_900_000_000


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder on the file system of ``target``, so that a file moves from it to there in one step."""
    if not target.parent.is_dir():
        raise OnnxExportError(f"cannot write {target.name}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise OnnxExportError(f"cannot write {target}: it is a folder; name a file in it, such as model.onnx")
    try:
        holder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".attnres-")
    except OSError as error:
        raise OnnxExportError(f"cannot write {target.name} in {target.parent}: {error.strerror}") from error
    with holder as folder:
        yield Path(folder)


def save(model: ir.Model, path: Path) -> None:
    """Write ``model`` to ``path``, its weights to a file beside it where they are too large for one."""
    from onnxscript import ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=_weights_of(path).name if size > _LARGEST_FILE else None)


def publish(temporary: Path, target: Path) -> None:
    """Give the checked file, and the weights beside it if there are any, their names."""
    weights, beside = _weights_of(temporary), _weights_of(target)
    try:
        # First the weights: without the file that refers to them they do nothing.
        if weights.exists():
            os.replace(weights, beside)
        os.replace(temporary, target)
    except OSError as error:
        raise OnnxExportError(f"cannot write {target}: {error.strerror}") from error


def _weights_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")
