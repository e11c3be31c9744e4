"""A model folder opened lazily: config, tokenizer files and, one at a time, the tensors of a block."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.config import with_dtype
from halve.checkpoint.foreign import gptq_file, quantization_of, refuse_by_names
from halve.checkpoint.gptq_format import GptqTensors
from halve.checkpoint.hub import fetch
from halve.checkpoint.manifest import Provenance, read_manifest
from halve.checkpoint.naming import check_parts, refuse_adapter, split_merged, under_own_names
from halve.checkpoint.schemes import read_schemes
from halve.checkpoint.stored import BIAS, PACKED, SCALE, WEIGHT, StoredLinear, tensor_names
from halve.checkpoint.tensors import (
    FLOATING,
    RandomTensors,
    RenamedTensors,
    SafetensorsFolder,
    TensorSource,
    cast,
    expect,
    read_json,
)
from halve.errors import CheckpointError, HalveError, reading, shown
from halve.files.contents import link_outside
from halve.model import families, inventory
from halve.model.config import ModelConfig
from halve.model.decoder import Block, Model, Norm
from halve.model.families import Family
from halve.model.inventory import LinearShape, NormShape
from halve.model.linear import Linear
from halve.model.merge import merge_siblings
from halve.model.wrappers import own_config, own_tensors
from halve.quantization import QuantSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_HARMLESS_TENSORS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def find_model(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `model`: a folder, a config.json, or a hub id (downloaded once into the hub's cache).

    Raises CheckpointError when there is none, or one of its files is a link to something outside it.
    """
    path = Path(os.path.expanduser(model))
    with reading(path, CheckpointError):
        if path.is_file() and path.suffix != ".json":
            raise CheckpointError(
                f"{path}: is a file: give the model's folder, or its config.json with random weights; a GGUF file becomes a "
                "folder by `halve convert`"
            )
        local = path.parent if path.is_file() else path if path.is_dir() else None
        found = local or fetch(str(model), weights=weights)
        link = link_outside(found)
        if link is not None:
            raise CheckpointError(
                f"{link}: is a link to {os.readlink(link)}, which is not in the model's folder: put the file itself there"
            )
        refuse_adapter(found)
    return found


@dataclass
class Checkpoint:
    """An opened model: everything is checked against the config, no weight is in memory yet."""

    folder: Path
    raw: dict[str, Any]
    family: Family
    config: ModelConfig
    tensors: TensorSource
    schemes: dict[str, QuantSpec]

    @property
    def dtype(self) -> torch.dtype:
        """What the model is meant to run in: as config.json says, which other programs go by; else that of the embedding."""
        named = str(self.raw.get("dtype") or self.raw.get("torch_dtype")).removeprefix("torch.")
        dtype = torch.float32 if named == "float64" else getattr(torch, named, None)
        if dtype in FLOATING:
            return dtype
        table = self.family.names[inventory.TABLE]
        return self.tensors.dtypes.get(f"{table}.{WEIGHT}") or self.tensors.dtypes[f"{table}.{SCALE}"]

    @property
    def manifest(self) -> Provenance:
        """halve.json, empty for a model this project did not write. Raises DataError."""
        path = self.folder / "halve.json"
        return read_manifest(path) if path.exists() else {}

    def linear_shapes(self) -> Iterator[LinearShape]:
        """Every linear: block by block, then the head. The embedding, of which rows are looked up, is `table_shape`."""
        for index in range(len(self.config.layers)):
            yield from inventory.block_linears(self.family, self.config, index)
        yield inventory.head_linear(self.family, self.config)

    @property
    def table_shape(self) -> LinearShape:
        """The embedding."""
        return inventory.table_linear(self.family, self.config)

    def stored(self, shape: LinearShape) -> StoredLinear:
        """How one linear, or the embedding, is stored, from the headers."""
        return StoredLinear.from_headers(self.tensors, shape, self.schemes.get(shape.name), str(self.folder))

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor; floating ones are cast to `dtype` when it is given. CheckpointError for a value too large for it."""
        value = self.tensors.get(name)
        if dtype is not None and value.is_floating_point():
            value = cast(f"{self.folder}: {name}", value, dtype)
        return value.to(device)

    def linear(self, shape: LinearShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Linear:
        """One linear in whatever form it is stored; dense weights and biases in `dtype`, scales as stored."""

        def get(part: str) -> Tensor:
            return self.tensor(f"{shape.name}.{part}", dtype if part in (WEIGHT, BIAS) else None)

        return self.stored(shape).to_linear(get, dtype, device)

    def table(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Linear:
        """The embedding, whose rows are looked up."""
        return self.linear(self.table_shape, dtype, device)

    def head(self, dtype: torch.dtype, device: torch.device | str, table: Linear | None = None) -> Linear:
        """The output head; when tied the very `table`."""
        if self.config.tied:
            return table or self.table(dtype, device)
        return self.linear(inventory.head_linear(self.family, self.config), dtype, device)

    def positions(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor | None:
        """The table of learned positions, or None."""
        if self.config.ropes:
            return None
        return self.tensor(f"{self.family.names['positions']}.weight", dtype, device)

    def projections(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Linear]:
        """OPT-350m's project_in and project_out, empty for others."""
        shapes = inventory.projection_linears(self.family, self.config)
        return {s.role: self.linear(s, dtype, device) for s in shapes}

    def norm(self, shape: NormShape, dtype: torch.dtype, device: torch.device | str) -> Norm:
        def part(name: str, dtype: torch.dtype) -> Tensor | None:
            full = f"{shape.name}.{name}"
            return self.tensor(full, dtype, device) if full in self.tensors.shapes else None

        offset = self.config.norm_offset
        own = torch.float32 if offset else dtype  # the sum would lose digits in bfloat16
        weight = part("weight", own)
        if weight is not None and offset:
            weight = weight + offset
        return Norm(weight, part("bias", own), self.config.norm_eps, shape.kind, shape.size)

    def final_norm(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Norm | None:
        shape = inventory.final_norm(self.family, self.config)
        return None if shape is None else self.norm(shape, dtype, device)

    def block(self, index: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Block:
        """One layer, its linears unmerged."""
        family, config = self.family, self.config
        linears = {s.role: self.linear(s, dtype, device) for s in inventory.block_linears(family, config, index)}
        norms = {s.role: self.norm(s, dtype, device) for s in inventory.block_norms(family, config, index)}
        return Block(config, config.layers[index], index, linears, norms)

    def check(self) -> None:
        """Every tensor present, none unexpected, all of the right shape; from the headers alone."""
        check_parts(self.tensors, self.family, self.config, self.raw, str(self.folder))
        vectors = inventory.vector_shapes(self.family, self.config)
        linears = [self.table_shape, *self.linear_shapes(), *inventory.projection_linears(self.family, self.config)]
        self._check_dtypes(linears, vectors)
        for name, shape in vectors.items():
            expect(self.tensors, name, shape, str(self.folder))
        known = set(vectors)
        for linear in linears:
            known |= tensor_names(linear)
            if linear.role == "head" and self.config.tied:
                self._check_tied(linear)
            else:
                self.stored(linear).check(self.tensors, str(self.folder))
        if not self.stored(self.table_shape).whole:
            raise CheckpointError(
                f"{self.folder}: {self.table_shape.name!r} lacks rows or columns: an embedding has all"
            )
        for name in self.tensors.shapes:
            if name not in known and not name.endswith(_HARMLESS_TENSORS):
                raise CheckpointError(
                    f"{self.folder}: unexpected tensor {shown(name)}: the config does not describe this model"
                )

    def _check_dtypes(self, linears: Iterable[LinearShape], vectors: Iterable[str]) -> None:
        """CheckpointError when a weight is in numbers that are not computed with."""
        names = [*vectors, *(f"{linear.name}.{WEIGHT}" for linear in linears)]
        for name in names:
            dtype = self.tensors.dtypes.get(name, torch.float32)
            if dtype not in FLOATING:
                raise CheckpointError(
                    f"{self.folder}: {name!r} is stored in {str(dtype).removeprefix('torch.')}, which is not read: take the "
                    "model in bf16, fp16 or fp32"
                )

    def _check_tied(self, linear: LinearShape) -> None:
        name, embed = f"{linear.name}.{WEIGHT}", f"{self.table_shape.name}.{WEIGHT}"
        if f"{linear.name}.{PACKED}" in self.tensors.shapes:
            raise CheckpointError(
                f"{self.folder}: a quantized head of its own needs tie_word_embeddings=false in config.json; a tied one is "
                f"the embedding, {self.table_shape.name!r}"
            )
        same = name not in self.tensors.shapes or embed in self.tensors.shapes
        if not same or (name in self.tensors.shapes and not torch.equal(self.tensor(name), self.tensor(embed))):
            raise CheckpointError(
                f"{self.folder}: tie_word_embeddings is true but {name!r} differs from the embedding: "
                "set tie_word_embeddings to false in config.json if the head is to be used"
            )


def open_checkpoint(model: str | Path, random_weights: bool = False, dtype: torch.dtype | None = None) -> Checkpoint:
    """Open and check a model folder or hub id; reads the headers only.

    With `random_weights` only config.json is read and tensors are made up (in `dtype`, default bfloat16).
    Raises CheckpointError or UnsupportedModelError.
    """
    folder = find_model(model, weights=not random_weights)
    whole = read_json(folder / "config.json")
    origin = str(folder / "config.json")
    raw = own_config(whole, origin)
    family, config = families.parse_config(raw, origin)
    if random_weights:
        return _random_checkpoint(
            Checkpoint(folder, raw, family, config, RandomTensors({}), {}), dtype or torch.bfloat16
        )
    quantization = quantization_of(folder, raw)
    gptq = quantization if quantization is not None and quantization["quant_method"] == "gptq" else None
    stored = SafetensorsFolder(folder, None if gptq is None else gptq_file(folder, gptq))
    tensors: TensorSource = RenamedTensors(stored, {name: name for name in own_tensors(whole, stored.shapes)})
    tensors = split_merged(under_own_names(tensors, family, str(folder)), family, config)
    checkpoint = Checkpoint(folder, raw, family, config, tensors, {})
    if quantization is None:
        refuse_by_names(tensors.shapes, str(folder))
    elif gptq is not None:
        checkpoint.tensors = converted = GptqTensors(tensors, gptq, list(checkpoint.linear_shapes()), origin)
        checkpoint.schemes = converted.schemes
    else:
        names = [shape.name for shape in checkpoint.linear_shapes()]
        checkpoint.schemes = read_schemes(quantization, names, origin, checkpoint.table_shape.name)
    checkpoint.check()
    _ = checkpoint.manifest  # it is added to when all is done: what is wrong with it is told before
    return checkpoint


def _random_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with random tensors of the shapes that its config asks for."""
    family, config = checkpoint.family, checkpoint.config
    headers = {name: (shape, dtype) for name, shape in inventory.vector_shapes(family, config).items()}
    shapes = (checkpoint.table_shape, *checkpoint.linear_shapes(), *inventory.projection_linears(family, config))
    for linear in shapes:
        if linear.role != "head" or not config.tied:
            parts = StoredLinear.dense(linear).parts(dtype)
            headers |= {f"{linear.name}.{part}": header for part, header in parts.items()}
    checkpoint.tensors = RandomTensors(headers)
    checkpoint.raw = with_dtype(checkpoint.raw, dtype)
    return checkpoint


def compute_dtype(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> torch.dtype:
    """`dtype`, or the checkpoint's own; for float16, whose range overflows, float32 on the CPU and bfloat16 elsewhere."""
    if dtype is not None or checkpoint.dtype != torch.float16:
        return dtype or checkpoint.dtype
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    random_weights: bool = False,
) -> Model:
    """Load a model for running: siblings merged, one kernel chosen per linear.

    `model`: folder, hub id, or config.json with `random_weights`; `dtype` float32 or bfloat16 (default: the
    checkpoint's). Raises HalveError subclasses for anything wrong with the folder.
    """
    check_device(device)
    checkpoint = open_checkpoint(model, random_weights, dtype)
    dtype = compute_dtype(checkpoint, dtype, device)
    # a weight gets its kernel's form as soon as it is read: at most one is in memory in both forms, the largest one first
    table = checkpoint.table(dtype, device)
    if checkpoint.config.tied or table.quantized:
        table.select_backend(backend, dtype)
    projections = checkpoint.projections(dtype, device)
    blocks = []
    for index in range(len(checkpoint.config.layers)):
        block = checkpoint.block(index, dtype, device)
        merge_siblings(block)
        for linear in block.linears.values():
            assert isinstance(linear, Linear)
            linear.select_backend(backend, dtype)
        blocks.append(block)
    head = checkpoint.head(dtype, device, table)
    if head is not table:
        head.select_backend(backend, dtype)
    return Model(
        checkpoint.config,
        dtype,
        table,
        blocks,
        checkpoint.final_norm(dtype, device),
        head,
        checkpoint.positions(dtype, device),
        projections.get("project_in"),
        projections.get("project_out"),
    )


def check_device(device: torch.device | str) -> str:
    """The device as records name it. Raises HalveError unless it is the CPU or a CUDA GPU that is there."""
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise HalveError(f"device {device!r} is not known: use cpu or cuda") from error
    if asked.type == "cpu":
        return "cpu"
    if asked.type != "cuda":
        raise HalveError(f"device '{asked}' is none that halve computes on: use cpu or cuda")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (asked.index or 0) >= there:
        names = ", ".join(["cpu", *(f"cuda:{index}" for index in range(there))])
        raise HalveError(f"device '{asked}' was asked for and PyTorch finds none such on this machine: use {names}")
    return str(asked)
