"""A GGUF file written from beginning to end: fields, then tensors that come some rows at a time and are never held.

The layout that `gguf_header` reads, version 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.checkpoint.gguf_header import MAGIC, MAX_HEADER_BYTES, TYPES, BlockType
from halve.errors import OutputError

ALIGNMENT = 32
_VERSION = 3
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9
_IDS = {block.name: number for number, block in TYPES.items()}
_DTYPES = {_I32: "<i4", _F32: "<f4", _BOOL: "u1"}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its shape, slowest dimension first, its type, and its bytes, in any runs."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.size * self.type.bytes


def _text(value: str) -> bytes:
    raw = value.encode(errors="replace")  # names of folders and templates may hold halves of characters
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A number, a text, true or false, or a tuple of one of them (an empty one: of texts), with its type before it."""
    if isinstance(value, tuple):
        first = value[0] if value else ""
        if isinstance(first, str):
            return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_text, value))
        kind = _BOOL if isinstance(first, bool) else _F32 if isinstance(first, float) else _I32
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + np.asarray(value, _DTYPES[kind]).tobytes()
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    return struct.pack("<If", _F32, value) if isinstance(value, float) else struct.pack("<II", _U32, value)


def header_bytes(fields: dict[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """All of a file before its tensors. Raises OutputError for more than readers take."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(fields))]
    parts += [_text(key) + _value(value) for key, value in fields.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        described = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _IDS[tensor.type.name], offset)
        parts.append(_text(tensor.name) + described)
        offset += _aligned(tensor.nbytes)
    header = b"".join(parts)
    if len(header) > MAX_HEADER_BYTES:
        raise OutputError(
            f"the vocabulary and the fields take {len(header):,} bytes, more than the {MAX_HEADER_BYTES:,} that a GGUF file's "
            "header may have here: use a model with a smaller vocabulary"
        )
    return header + b"\0" * (_aligned(len(header)) - len(header))


def file_bytes(header: bytes, tensors: Sequence[NewTensor]) -> int:
    return len(header) + sum(_aligned(tensor.nbytes) for tensor in tensors)


def write_file(path: Path, header: bytes, tensors: Iterable[NewTensor]) -> None:
    """The new file `path`; raises OSError, and whatever reading a tensor raises."""
    with path.open("xb") as file:
        file.write(header)
        for tensor in tensors:
            written = 0
            for part in tensor.parts():
                written += file.write(part.data)
            assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
            file.write(b"\0" * (_aligned(written) - written))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
