"""A model folder written one part at a time: each shard under a temporary name until whole, the index last."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from halve.checkpoint.tensors import SAFETENSORS_DTYPES
from halve.errors import OutputError
from halve.files import write_json, write_text
from halve.files.contents import copy_companions

_ROWS = "rows"  # report rows of finished parts, kept beside the shards until the folder is complete


class CheckpointWriter:
    """Writes `parts` shards into `folder` in any order, then config, manifest and index. Resumable: finished parts stay."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.folder, self.parts = folder, parts
        (folder / _ROWS).mkdir(parents=True, exist_ok=True)

    def shard(self, part: int) -> Path:
        return self.folder / f"model-{part + 1:05d}-of-{self.parts:05d}.safetensors"

    def _rows_path(self, part: int) -> Path:
        return self.folder / _ROWS / f"{part:05d}.json"

    def done(self, part: int) -> bool:
        """Whether a part is complete on disk."""
        return self._rows_path(part).exists()

    def rows(self, part: int) -> list[dict[str, Any]]:
        return json.loads(self._rows_path(part).read_text())

    def write(self, part: int, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """One shard and its report rows. Raises OutputError when the disk is full; finished parts are kept."""
        shard = self.shard(part)
        temporary = shard.with_suffix(".tmp")
        try:
            save_shard(tensors, temporary)
            os.replace(temporary, shard)
            write_text(self._rows_path(part), json.dumps(rows))
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                size = sum(t.nbytes for t in tensors.values())
                raise OutputError(
                    f"{self.folder.parent}: the disk is full ({size:,} bytes were to be written): free some space and "
                    "run the same command again, finished blocks are kept there"
                ) from error
            raise OutputError(f"{shard}: could not be written ({error})") from error

    def finish(self, config: dict[str, Any], manifest: dict[str, Any], source: Path) -> None:
        """Complete the folder: what goes with the weights of `source`, config, manifest, and the index last."""
        from safetensors import safe_open

        copy_companions(source, self.folder)
        weight_map, total = {}, 0
        for part in range(self.parts):
            with safe_open(self.shard(part), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    weight_map[name] = self.shard(part).name
                    total += handle.get_tensor(name).nbytes
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "halve.json", manifest)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        shutil.rmtree(self.folder / _ROWS)
        write_json(self.folder / "model.safetensors.index.json", index)


def save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, readable as far as the user's umask allows (the library makes it private)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def stream_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    parts: Callable[[str], Iterable[Tensor]],
) -> int:
    """One safetensors file of tensors that come as runs of rows and are never held; returns their bytes.

    Raises OutputError when it cannot be written.
    """
    name_of = {value: name for name, value in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8, as the library writes them
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in shapes:
                for part in parts(name):
                    file.write(part.contiguous().view(torch.uint8).numpy().data)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else f"could not be written ({error})"
        raise OutputError(f"{path}: {reason}: free some space or choose another place for OUT") from error
    return end
