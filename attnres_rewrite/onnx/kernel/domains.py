"""The domains that an ONNX file names, read without the rest of it.

Protobuf is a sequence of fields, each with its number, and its length where that is not plain. So the graph, with all
weights, is skipped in one step.
"""

from __future__ import annotations

import io
import os
from typing import BinaryIO

# onnx.proto: ModelProto.opset_import and OperatorSetIdProto.domain.
_OPSET_IMPORT = 8
_DOMAIN = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def imported_domains(model: str | os.PathLike[str] | bytes) -> list[str]:
    """The domains of the operators that ``model`` imports.

    Args:
        model: A file, or what is in it.

    Raises:
        ValueError: It is no protobuf message.
        OSError: The file cannot be read.
    """
    if isinstance(model, bytes):
        return _domains(io.BytesIO(model))
    with open(model, "rb") as file:
        return _domains(file)


def _domains(file: BinaryIO) -> list[str]:
    imports = [value for number, value in _fields(file, {_OPSET_IMPORT})]
    found = [domain for entry in imports for _, domain in _fields(io.BytesIO(entry), {_DOMAIN})]
    return [domain.decode() for domain in found]


def _fields(file: BinaryIO, wanted: set[int]) -> list[tuple[int, bytes]]:
    """The wanted fields of a message that are bytes."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    found = []
    while file.tell() < end:
        number, kind = divmod(_varint(file), 8)
        if kind == _VARINT:
            _varint(file)
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"field {number} has the unknown wire type {kind}")
        size = _varint(file) if kind == _BYTES else 8 if kind == _FIXED64 else 4
        if file.tell() + size > end:
            raise ValueError(f"field {number} of {size} bytes ends behind the end")
        if kind == _BYTES and number in wanted:
            found.append((number, file.read(size)))
        else:
            file.seek(size, io.SEEK_CUR)
    return found


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number has no end")
