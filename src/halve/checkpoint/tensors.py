"""Where weights come from: safetensors folders read lazily, or random numbers of the right shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halve.errors import CheckpointError, reading, shown
from halve.files import parse_json
from halve.files.contents import leads_outside

SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def get(self, name: str) -> Tensor: ...


def expect(tensors: TensorSource, name: str, shape: tuple[int, ...], origin: str) -> None:
    """CheckpointError, which names `origin`, unless the tensor is there in this shape."""
    if name not in tensors.shapes:
        raise CheckpointError(
            f"{origin}: tensor {name!r} is missing; there are {len(tensors.shapes)}, such as "
            f"{min(tensors.shapes, default='none')!r}: download the model again, or correct config.json"
        )
    if tensors.shapes[name] != shape:
        raise CheckpointError(
            f"{origin}: {name!r} has shape {list(tensors.shapes[name])}, the config asks for {list(shape)}: "
            "not the same model"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; many times faster than asking value by value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # aminmax hands NaN on


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file, from the index of a folder's shards. Raises CheckpointError for a malformed index or a file
    that is not in the folder."""
    try:
        with reading(index, CheckpointError):
            content = parse_json(index)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{index}: not a readable index ({error}): download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: not an index (no weight_map of names to files): download it again")
    for file in set(weight_map.values()):
        if leads_outside(file, index.parent):
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
        listing = self._listing() if shards is None else dict.fromkeys(shards)
        for path, expected in listing.items():
            names = self._open(path)
            missing = (expected or set()) - names
            if missing:
                raise CheckpointError(
                    f"{path}: the index promises {min(missing)!r} and the file does not hold it: download it again"
                )

    def _listing(self) -> dict[Path, set[str] | None]:
        with reading(self.folder, CheckpointError):
            return self._listed()

    def _listed(self) -> dict[Path, set[str] | None]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            files: dict[Path, set[str] | None] = {}
            for name, file in read_weight_map(index).items():
                names = files.setdefault(self.folder / file, set())
                assert names is not None
                names.add(name)
            return files
        single = self.folder / "model.safetensors"
        if single.exists():
            return {single: None}
        if any(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder}: weights are in .bin files, which are not read directly: "
                f"run `halve convert {self.folder} OUT` once and use OUT"
            )
        raise CheckpointError(f"{self.folder}: no model.safetensors and no index of shards: is it a model folder?")

    def _open(self, path: Path) -> set[str]:
        with reading(path, CheckpointError):
            if not path.exists():
                raise CheckpointError(f"{path}: the shard is missing: download it again")
            path.open("rb").close()  # the library calls a file that it may not open corrupt
        with self._opened(path) as handle:
            names = set(handle.keys())
            for name in names:
                part = handle.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} has dtype {part.get_dtype()}, which is not handled")
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), dtype
                self._paths[name] = path
        return names

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        with reading(path, CheckpointError):
            try:
                with safe_open(path, framework="pt") as handle:
                    yield handle
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: truncated or corrupt safetensors file ({error}): download it again"
                ) from error

    def get(self, name: str) -> Tensor:
        """The tensor, as stored. Raises CheckpointError when it holds NaN or infinity."""
        # a mapping of its own for each tensor: what was read leaves memory with it
        with self._opened(self._paths[name]) as handle:
            tensor = handle.get_tensor(name)
        if name not in self._finite and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{self.folder}: {name} holds {bad} NaN or infinite values of {tensor.numel()}: "
                "nothing can be computed with it, get an intact copy"
            )
        self._finite.add(name)
        return tensor


class RenamedTensors:
    """Tensors under other names than they are `stored` by (other name -> stored name)."""

    def __init__(self, tensors: TensorSource, stored: dict[str, str]) -> None:
        self._tensors = tensors
        self._stored = stored
        self.shapes = {name: tensors.shapes[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: tensors.dtypes[stored] for name, stored in self._stored.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors.get(self._stored[name])


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


class RandomTensors:
    """Random weights for published shapes, seeded by name: speed and memory do not depend on values."""

    def __init__(self, headers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.shapes = {name: shape for name, (shape, _) in headers.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in headers.items()}

    def get(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name], self.dtypes[name]
        if "norm" in name:
            return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype)
