"""The header of a GGUF file: what the model is, and where its tensors lie. Every number is held against the file's length.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, little-endian, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.errors import CheckpointError, reading, shown

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 2**26  # several times that of the largest vocabulary
MAX_ALIGNMENT = 2**16
_SHORTEST_FIELD, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class BlockType:
    """How numbers are stored: so many `bytes` for each block of `size` neighbours in a row."""

    name: str
    size: int
    bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),  # what llama.cpp takes for rows that the types from Q2_K to Q4_K do not fit
}
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
_OTHER_TYPES |= dict(enumerate("IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64".split(), 16))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shape, slowest dimension first, its type, and the bytes of the file that it takes."""

    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.size * self.type.bytes


@dataclass(frozen=True)
class GgufHeader:
    """The fields of a GGUF file (numbers, texts, and tuples of one of them) and its tensors in the order of their bytes."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises CheckpointError for a file that is none, or contradicts itself or its length."""
    with reading(path, CheckpointError), path.open("rb") as file:
        length = file.seek(0, 2)
        if length < 24:
            raise CheckpointError(
                f"{path}: is no GGUF file (it has {length} bytes): give a model's folder or a GGUF file"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(path, content, length).header()


class _Cursor:
    """The place that is read at, and the end that nothing may pass."""

    def __init__(self, path: Path, content: mmap.mmap, length: int) -> None:
        self.path, self.content, self.length, self.at = path, content, length, 0
        self.end = min(length, MAX_HEADER_BYTES)

    def fail(self, what: str, remedy: str = "download it again") -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}: {remedy}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.at:
            limit = "the file" if self.end == self.length else f"the {MAX_HEADER_BYTES:,} bytes that a header may have"
            raise self.fail(
                f"{what} at byte {self.at} takes {count:,} bytes and {limit} ends {self.end - self.at:,} later"
            )
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        return value

    def count(self, what: str, least: int) -> int:
        """A count of what takes at least `least` bytes each."""
        count = self.number("Q", f"the count of {what}")
        if count > (self.end - self.at) // least:
            raise self.fail(f"says that it holds {count:,} {what}, more than its bytes can")
        return count

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {self.at - len(raw)} is no UTF-8 text") from error

    def value(self, key: str) -> Any:
        kind = self.number("I", f"the type of {shown(key)}")
        if kind == _STRING:
            return self.text(f"the text of {shown(key)}")
        if kind != _ARRAY:
            return self.numbers(key, kind, 1)[0]
        kind = self.number("I", f"the type of {shown(key)}")
        if kind == _STRING:
            return tuple(self.text(f"a text of {shown(key)}") for _ in range(self.count(f"texts in {shown(key)}", 8)))
        return self.numbers(key, kind, self.count(f"values in {shown(key)}", 1))

    def numbers(self, key: str, kind: int, count: int) -> tuple[Any, ...]:
        if kind not in _SCALARS:
            raise self.fail(
                f"field {shown(key)} is of type {kind}, which is not read (arrays in arrays are not either)"
            )
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize, f"field {shown(key)}"), dtype)
        if kind == _BOOL:
            if values.max(initial=0) > 1:
                raise self.fail(f"field {shown(key)} holds {values.max()} for true or false")
            values = values.astype(bool)
        return tuple(values.tolist())

    def header(self) -> GgufHeader:
        if self.take(4, "the magic") != MAGIC:
            raise self.fail("is no GGUF file (it does not begin with GGUF)", "give a model's folder or a GGUF file")
        version = self.number("I", "the version")
        if version not in (2, 3):
            big = version & 0xFFFF == 0 and version
            raise self.fail(
                f"is {'big-endian' if big else f'of GGUF version {version}'}, and little-endian versions 2 and 3 are read",
                "convert the original model again",
            )
        tensors = self.count("tensors", _SHORTEST_TENSOR)
        fields: dict[str, Any] = {}
        for _ in range(self.count("fields", _SHORTEST_FIELD)):
            key = self.text("a field's name")
            if not key:
                raise self.fail("holds a field without a name")
            if key in fields:
                raise self.fail(f"holds field {shown(key)} twice")
            fields[key] = self.value(key)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"general.alignment={shown(alignment)} must be a power of two of at most {MAX_ALIGNMENT}")
        placed: dict[str, StoredTensor] = {}
        for _ in range(tensors):
            name = self.text("a tensor's name")
            if name in placed:
                raise self.fail(f"holds tensor {shown(name)} twice")
            placed[name] = self.tensor(name, alignment)
        start = -(-self.at // alignment) * alignment
        return GgufHeader(self.path, fields, self.checked(placed, start))

    def tensor(self, name: str, alignment: int) -> StoredTensor:
        """A tensor as the header says it; its offset is still from the end of the header."""
        dims = self.number("I", f"the dimensions of {shown(name)}")
        if not 1 <= dims <= 4:
            raise self.fail(f"tensor {shown(name)} has {dims} dimensions, a tensor has 1 to 4")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims, f"the shape of {shown(name)}"))[::-1]
        kind, offset = self.number("I", f"the type of {shown(name)}"), self.number("Q", f"the offset of {shown(name)}")
        if kind not in TYPES:
            known = ", ".join(one.name for one in TYPES.values())
            raise self.fail(
                f"tensor {shown(name)} is of type {_OTHER_TYPES.get(kind, kind)}, and those read are {known}",
                "take the model in one of them",
            )
        block = TYPES[kind]
        if 0 in shape or shape[-1] % block.size:
            raise self.fail(
                f"tensor {shown(name)} has shape {list(shape)}, and rows of {block.name} are multiples of {block.size}"
            )
        if offset % alignment:
            raise self.fail(
                f"tensor {shown(name)} begins at byte {offset} of the data, not at a multiple of {alignment}"
            )
        return StoredTensor(shape, block, offset, math.prod(shape) // block.size * block.bytes)

    def checked(self, placed: dict[str, StoredTensor], start: int) -> dict[str, StoredTensor]:
        """The tensors by their place in the file, where each has bytes of its own."""
        at: dict[str, StoredTensor] = {}
        before, end = "the header", start
        for name, tensor in sorted(placed.items(), key=lambda item: item[1].offset):
            first = start + tensor.offset
            if first + tensor.nbytes > self.length:
                raise self.fail(
                    f"tensor {shown(name)} of shape {list(tensor.shape)} in {tensor.type.name} ends at byte "
                    f"{first + tensor.nbytes:,} and the file at {self.length:,}"
                )
            if first < end:
                raise self.fail(f"tensors {before} and {shown(name)} lie over each other")
            before, end = shown(name), first + tensor.nbytes
            at[name] = StoredTensor(tensor.shape, tensor.type, first, tensor.nbytes)
        return at
