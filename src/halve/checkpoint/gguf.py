"""A GGUF file -> a Hugging Face folder: config, tokenizer, and dense weights read a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.checkpoint.gguf_config import architecture_of, hf_config, tensor_names
from halve.checkpoint.gguf_header import GgufHeader, StoredTensor, read_header
from halve.checkpoint.gguf_tokenizer import write_tokenizer
from halve.checkpoint.naming import split_merged
from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.checkpoint.tensors import INDEX, all_finite, cast
from halve.checkpoint.writer import stream_shard
from halve.errors import CheckpointError, HalveError, reading
from halve.files import write_json
from halve.files.work import WorkFolder
from halve.model import families
from halve.model.wrappers import own_config
from halve.progress import track

_CHUNK_VALUES = 2**22  # numbers dequantized at once: 16 MiB as float32
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufTensors:
    """The tensors of a GGUF file under the names of `config`, a Hugging Face one, as `dtype`; CheckpointError for others."""

    def __init__(self, header: GgufHeader, config: dict[str, Any], dtype: torch.dtype) -> None:
        _, self._architecture = architecture_of(header)
        self.header, self._dtype, self._head_dim = header, dtype, config["head_dim"]
        self.names = tensor_names(header, config["num_hidden_layers"])
        self.shapes = {name: header.tensors[stored].shape for name, stored in self.names.items()}
        self.dtypes = dict.fromkeys(self.names, dtype)

    def get(self, name: str) -> Tensor:
        return torch.cat(list(self.parts(name)))

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor in runs of rows. Raises CheckpointError for NaN, infinity, or what `dtype` cannot hold."""
        stored = self.names[name]
        paired = self._head_dim if self._architecture.in_pairs(stored) else None
        for values in read_rows(self.header, stored, multiple=paired or 1):
            if paired:
                # pairs (0, 1), (2, 3), ... of a head's channels -> first half, second half
                values = values.view(-1, paired // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
            if offset := self._architecture.offset(stored):
                values = values - offset
            yield cast(f"{self.header.path}: {stored}", values, self._dtype)


def read_rows(header: GgufHeader, name: str, multiple: int = 1) -> Iterator[Tensor]:
    """A tensor of the file as float32, some rows at a time, always a `multiple` of rows. Raises CheckpointError."""
    tensor = header.tensors[name]
    *outer, width = tensor.shape  # a vector is one row
    rows, step = math.prod(outer), max(1, _CHUNK_VALUES // (width * multiple)) * multiple
    with reading(header.path, CheckpointError), header.path.open("rb") as file:
        file.seek(tensor.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = bytearray(count * tensor.row_bytes)
            if file.readinto(raw) != len(raw):
                raise CheckpointError(f"{header.path}: ended while {name!r} was read: leave the file alone meanwhile")
            values = _values(raw, tensor)
            if not all_finite(values):
                raise CheckpointError(
                    f"{header.path}: {name} holds NaN or infinite values: nothing can be computed with it, get an intact copy"
                )
            yield values.reshape(-1, width) if outer else values


def _values(raw: bytearray, tensor: StoredTensor) -> Tensor:
    """Bytes of the file as float32, in one row."""
    if tensor.type.name in _PLAIN:
        return torch.frombuffer(raw, dtype=_PLAIN[tensor.type.name]).float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # what is not finite is told by our own check
        values = dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType[tensor.type.name])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _require_package(header: GgufHeader) -> None:
    quantized = next((n for n, tensor in header.tensors.items() if tensor.type.name not in _PLAIN), None)
    if quantized is None:
        return
    try:
        import gguf.quants  # noqa: F401
    except ImportError as error:
        raise HalveError(
            f"{header.path}: {quantized!r} is stored in {header.tensors[quantized].type.name}, which takes a package more to "
            "read: pip install 'halve[gguf]'"
        ) from error


def open_gguf(file: Path, dtype: torch.dtype) -> tuple[Checkpoint, GgufTensors, dict[str, Any]]:
    """The model of a GGUF file, checked against its config; its tensors in `dtype`; that config as it is to be written.

    Reads the header only. Raises CheckpointError for a file that is damaged, UnsupportedModelError for a model that is not
    converted, HalveError where the package that reads its types is missing.
    """
    header = read_header(file)
    raw = hf_config(header, lambda name: torch.cat(list(read_rows(header, name))))
    raw |= {"dtype": str(dtype).removeprefix("torch.")}
    config = own_config(raw, str(file))
    family, model = families.parse_config(config, str(file))
    tensors = GgufTensors(header, raw, dtype)
    checkpoint = Checkpoint(file, config, family, model, split_merged(tensors, family, model), {})
    checkpoint.check()
    _require_package(header)
    return checkpoint, tensors, raw


def convert_gguf(file: Path, out: str | Path, dtype: torch.dtype, *, overwrite: bool = False) -> Path:
    """Write the model of a GGUF file as the new Hugging Face folder `out`, its weights dense, in `dtype`.

    A shard per block; of a tensor a few rows are in memory. All but the values is checked before anything is written.
    Raises what `open_gguf` does, and CheckpointError for values that nothing can be computed with.
    """
    checkpoint, tensors, raw = open_gguf(file, dtype)
    total = sum(math.prod(shape) for shape in tensors.shapes.values()) * dtype.itemsize
    work = WorkFolder(out, keep={"the GGUF file": file}, overwrite=overwrite, needs_bytes=total)
    with work.claim({"convert": str(file.resolve())}, resume=False) as scratch:
        made = scratch / "model"
        made.mkdir()
        try:
            write_tokenizer(tensors.header, raw["vocab_size"], made)
            _write(tensors, checkpoint.family.names["block"], len(checkpoint.config.layers), made)
            write_json(made / "config.json", raw)
            open_checkpoint(made)
        except HalveError:
            work.empty()
            raise
        work.publish(made)
    return work.out


def _write(tensors: GgufTensors, block: str, layers: int, made: Path) -> None:
    prefixes = [f"{block.format(index)}." for index in range(layers)]
    shards: dict[str, list[str]] = {prefix: [] for prefix in (*prefixes, "")}
    stem = block.format("")
    for name in sorted(tensors.names):
        inside = name.startswith(stem)
        shards[f"{stem}{name.removeprefix(stem).split('.')[0]}." if inside else ""].append(name)
    weight_map, total = {}, 0
    for number, names in enumerate(track(list(shards.values()), description="convert"), 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: tensors.shapes[name] for name in names}
        total += stream_shard(made / shard, shapes, tensors.dtypes[names[0]], tensors.parts)
        weight_map |= dict.fromkeys(names, shard)
    write_json(made / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
