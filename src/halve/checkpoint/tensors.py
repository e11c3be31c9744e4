"""Where weights come from: safetensors folders read lazily, or random numbers of the right shapes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.errors import CheckpointError, first_line, reading, shown
from halve.files.contents import leads_outside
from halve.files.typed import parsed

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = (torch.float32, torch.bfloat16, torch.float16)  # what is computed with; float64 is read as float32


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def get(self, name: str) -> Tensor: ...


def read_part(tensors: TensorSource, name: str, rows: range, columns: range | None) -> tuple[Tensor, int]:
    """Some rows, and of a matrix some columns, of a tensor in memory of their own, and the bytes that were read for them:
    no others where the source can read parts."""
    part = getattr(tensors, "part", None)
    if part is not None:
        found = part(name, rows, columns)
        return found, found.nbytes
    whole = tensors.get(name)
    return _cut(whole, rows, columns).clone(memory_format=torch.contiguous_format), whole.nbytes


def _cut(tensor: Any, rows: range, columns: range | None) -> Any:
    """Of a tensor, or of one that a file holds."""
    row = slice(rows.start, rows.stop)
    return tensor[row] if columns is None else tensor[row, columns.start : columns.stop]


def expect(tensors: TensorSource, name: str, shape: tuple[int, ...], origin: str) -> None:
    """CheckpointError, which names `origin`, unless the tensor is there in this shape."""
    if name not in tensors.shapes:
        raise CheckpointError(
            f"{origin}: tensor {name!r} is missing; there are {len(tensors.shapes)}, such as "
            f"{shown(min(tensors.shapes, default='none'))}: download the model again, or correct config.json"
        )
    if tensors.shapes[name] != shape:
        raise CheckpointError(
            f"{origin}: {name!r} has shape {list(tensors.shapes[name])}, the config asks for {list(shape)}: "
            "not the same model"
        )


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in `dtype`; CheckpointError, which names it, when a value is too large for that."""
    if tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not all_finite(made):
        raise CheckpointError(
            f"{name} holds {float(tensor.abs().max()):.6g} and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.6g}: use a dtype of wider range, bf16 or fp32"
        )
    return made


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; many times faster than asking value by value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # aminmax hands NaN on


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing, cannot be read, or is malformed."""
    missing = f"{path.parent}: no {path.name}: is it a model folder?"
    value = parsed(path, CheckpointError, missing, "get an intact copy")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not an object: get an intact copy")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file, from the index of a folder's shards. Raises CheckpointError for a malformed index or a file
    that is not in the folder."""
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        raise CheckpointError(f"{index}: not an index (no weight_map of names to files): download it again")
    for file in set(weight_map.values()):
        if len(file) > 255 or leads_outside(file, index.parent):  # no file has a longer name
            raise CheckpointError(
                f"{index}: names {shown(file)}, which is not in the model's folder: download the model again"
            )
    return weight_map


class SafetensorsFolder:
    """The tensors of a Hugging Face folder; opening it reads only the headers.

    Raises CheckpointError when a file is missing, truncated, corrupt, or disagrees with the index.
    """

    def __init__(self, folder: Path, shards: list[Path] | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._paths: dict[str, Path] = {}
        self._finite: set[str] = set()  # a large tensor is looked through once, however often it is read
        with reading(folder, CheckpointError):
            index = self._index() if shards is None else {}
            paths = dict.fromkeys(index.values()) if index else shards or self._single()
        for path in paths:
            self._open(path, index)
        for name, path in index.items():
            if name not in self._paths:
                raise CheckpointError(
                    f"{path}: the index promises {shown(name)} and the file does not hold it: download it again"
                )

    def _index(self) -> dict[str, Path]:
        """The file of each tensor. Empty without an index, and beside a single file, which other programs read first."""
        path = self.folder / INDEX
        if not path.exists() or (self.folder / SINGLE).exists():
            return {}
        return {name: self.folder / file for name, file in read_weight_map(path).items()}

    def _single(self) -> list[Path]:
        single = self.folder / SINGLE
        if single.exists():
            return [single]
        if any(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder}: weights are in .bin files, which are not read directly: "
                f"run `halve convert {self.folder} OUT` once and use OUT"
            )
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        found = (
            f"but {', '.join(others)}: if that is all of the model, call it {SINGLE}"
            if others
            else "is it a model folder?"
        )
        raise CheckpointError(f"{self.folder}: no {SINGLE} and no index of shards{', ' if others else ': '}{found}")

    def _open(self, path: Path, index: dict[str, Path]) -> None:
        """Take the tensors of a file; of a name in several files, that in the one which the index names."""
        with reading(path, CheckpointError):
            if not path.exists():
                raise CheckpointError(f"{path}: the shard is missing: download it again")
            path.open("rb").close()  # the library calls a file that it may not open corrupt
        with self._opened(path) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if index.get(name, path) != path:
                    continue
                if name in self._paths:
                    raise CheckpointError(
                        f"{shown(name)} is in {self._paths[name]} and in {path}, the index names neither"
                    )
                part = handle.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {shown(name)} has dtype {part.get_dtype()}, which is not handled")
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = torch.float32 if dtype == torch.float64 else dtype
                self._paths[name] = path

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files, from their headers."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        with reading(path, CheckpointError):
            try:
                with safe_open(path, framework="pt") as handle:
                    yield handle
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: truncated or corrupt safetensors file ({first_line(error)}): download it again"
                ) from error

    def get(self, name: str) -> Tensor:
        """The tensor, as stored, float64 as float32. Raises CheckpointError when it holds NaN or infinity."""
        # a mapping of its own for each tensor: what was read leaves memory with it
        with self._opened(self._paths[name]) as handle:
            tensor = handle.get_tensor(name)
        tensor = self._checked(name, tensor, name not in self._finite)
        self._finite.add(name)
        return tensor

    def part(self, name: str, rows: range, columns: range | None) -> Tensor:
        """Some rows and columns of the tensor, of which alone the file is read; otherwise as `get`."""
        with self._opened(self._paths[name]) as handle:
            tensor = _cut(handle.get_slice(name), rows, columns).clone(memory_format=torch.contiguous_format)
        return self._checked(name, tensor, True)

    def _checked(self, name: str, tensor: Tensor, unseen: bool) -> Tensor:
        if unseen and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{self.folder}: {name} holds {bad} NaN or infinite values of {tensor.numel()}: "
                "nothing can be computed with it, get an intact copy"
            )
        return cast(f"{self.folder}: {name}", tensor, torch.float32) if tensor.dtype == torch.float64 else tensor


class RenamedTensors:
    """Tensors under other names than they are `stored` by (other name -> stored name)."""

    def __init__(self, tensors: TensorSource, stored: dict[str, str]) -> None:
        self._tensors = tensors
        self._stored = stored
        self.shapes = {name: tensors.shapes[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: tensors.dtypes[stored] for name, stored in self._stored.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors.get(self._stored[name])

    def part(self, name: str, rows: range, columns: range | None) -> Tensor:
        return read_part(self._tensors, self._stored[name], rows, columns)[0]


class TensorsOfRows:
    """Tensors of which some are `rows` of stored ones (name -> stored name, first row, end), and those are not there."""

    def __init__(self, tensors: TensorSource, rows: dict[str, tuple[str, int, int]]) -> None:
        self._tensors, self._rows = tensors, rows
        gone = {stored for stored, _, _ in rows.values()}
        self.shapes = {name: shape for name, shape in tensors.shapes.items() if name not in gone}
        self.shapes |= {n: (end - first, *tensors.shapes[stored][1:]) for n, (stored, first, end) in rows.items()}
        self.dtypes = {name: tensors.dtypes[rows[name][0] if name in rows else name] for name in self.shapes}

    def get(self, name: str) -> Tensor:
        if name not in self._rows:
            return self._tensors.get(name)
        stored, first, end = self._rows[name]
        return self._tensors.get(stored)[first:end].clone()  # the other rows leave memory

    def part(self, name: str, rows: range, columns: range | None) -> Tensor:
        stored, first, _ = self._rows.get(name, (name, 0, 0))
        return read_part(self._tensors, stored, range(rows.start + first, rows.stop + first), columns)[0]


class RandomTensors:
    """Random weights for published shapes, seeded by name: speed and memory do not depend on values."""

    def __init__(self, headers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.shapes = {name: shape for name, (shape, _) in headers.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in headers.items()}

    def get(self, name: str) -> Tensor:
        return self._drawn(name, self.shapes[name])

    def part(self, name: str, rows: range, columns: range | None) -> Tensor:
        """As large as such a part, and drawn for itself: nobody has to hold the whole for it."""
        return self._drawn(name, (len(rows),) if columns is None else (len(rows), len(columns)))

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dtype = self.dtypes[name]
        if "norm" in name:
            return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype)
