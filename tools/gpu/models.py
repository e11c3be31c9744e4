"""Models of published shapes made in a GPU's memory: random weights, quantized or pruned there, no files.

Speed and memory do not depend on what the weights say, and writing and reading 16 GB for every row would take longer than
measuring it. A row's linears get the forms that `halve compress` gives them: packed weights, kept inputs, narrower MLPs,
fewer layers. What loading from disk would add to the peak memory is therefore not measured.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.checkpoint.tensors import TensorSource
from halve.compression.edits import keep_inputs
from halve.decode.generate import Decoder
from halve.decode.gpu_step import GpuStep
from halve.decode.sampling import Sampling
from halve.measure.records import Record
from halve.measure.speed.benchmark import measure_in_turns
from halve.measure.speed.timed_model import BenchmarkOptions, Placement, TimedModel
from halve.measure.speed.timing import random_prompt
from halve.model.decoder import Block, Model
from halve.model.linear import Linear
from halve.model.merge import merge_siblings
from halve.quantization import QuantSpec, quantize

SHAPES = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"


@dataclass(frozen=True)
class Row:
    """One model of a table: a shape and what is done to it, in this order.

    `dropped` layers and `mlp_share` of the MLP width are left out of the shape; `kept_inputs` is the share of input
    channels that the linears of the blocks keep, each its own, as `l1-inputs` leaves them; then weights are quantized.
    The head stays as it is unless `head_bits` says otherwise; `head_kept` prunes its inputs.
    """

    name: str
    shape: str
    bits: int | None = None
    group_size: int = -1
    head_bits: int | None = None
    dropped: int = 0
    mlp_share: float = 1.0
    kept_inputs: float = 1.0
    head_kept: float = 1.0
    baseline: str | None = None  # the row it is smaller than

    def steps(self) -> list[dict[str, object]]:
        """For the record: what was done, by the names of the steps that do it to a folder."""
        steps: list[dict[str, object]] = []
        if self.dropped:
            steps.append({"step": "drop-layers", "count": self.dropped})
        if self.mlp_share < 1:
            steps.append({"step": "prune-mlp", "fraction": round(1 - self.mlp_share, 3)})
        if self.kept_inputs < 1:
            steps.append({"step": "l1-inputs", "fraction": round(1 - self.kept_inputs, 3)})
        if self.head_kept < 1:
            steps.append({"step": "l1-inputs", "fraction": round(1 - self.head_kept, 3), "targets": "lm_head"})
        if self.bits:
            steps.append({"step": "rtn", "bits": self.bits, "group_size": self.group_size})
        if self.head_bits:
            steps.append({"step": "rtn", "bits": self.head_bits, "group_size": -1, "targets": "lm_head", "untie": True})
        return steps


class DeviceTensors:
    """Random weights drawn on the device, seeded by name."""

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self.shapes, self.dtypes, self._device = source.shapes, source.dtypes, device

    def get(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name], self.dtypes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=dtype, device=self._device).normal_(0.0, 0.02, generator=generator)


def open_row(row: Row, device: str, dtype: torch.dtype) -> Checkpoint:
    """The shape of a row as a checkpoint of random tensors."""
    checkpoint = open_checkpoint(SHAPES / row.shape, random_weights=True, dtype=dtype)
    config, layers = checkpoint.config, list(checkpoint.config.layers)
    layers = layers[: max(1, len(layers) - row.dropped)]
    width = _multiple(layers[0].intermediate_size, row.mlp_share)
    checkpoint.config = replace(config, layers=tuple(replace(layer, intermediate_size=width) for layer in layers))
    shapes = checkpoint.tensors.shapes
    for linear in checkpoint.linear_shapes():
        if f"{linear.name}.weight" in shapes:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
    checkpoint.tensors = DeviceTensors(checkpoint.tensors, torch.device(device))
    return checkpoint


def make_model(row: Row, checkpoint: Checkpoint, device: str, dtype: torch.dtype, backend: str) -> Model:
    """The model of a row, block by block: never more than one block in its first form."""
    config = checkpoint.config
    table = checkpoint.table(dtype, device)
    blocks: list[Block] = []
    for index in range(len(config.layers)):
        block = checkpoint.block(index, dtype, device)
        for role, linear in list(block.linears.items()):
            assert isinstance(linear, Linear)
            block.linears[role] = _changed(linear, row.kept_inputs, row.bits, row.group_size)
        merge_siblings(block)
        for linear in block.linears.values():
            assert isinstance(linear, Linear)
            linear.select_backend(backend, dtype)
        blocks.append(block)
    head = checkpoint.head(dtype, device, table)
    head = _changed(head, row.head_kept, row.head_bits, -1)
    head.select_backend(backend, dtype)
    return Model(config, dtype, table, blocks, checkpoint.final_norm(dtype, device), head)


def _changed(linear: Linear, kept: float, bits: int | None, group_size: int) -> Linear:
    if kept < 1:
        count = _multiple(linear.in_features, kept)
        chosen = torch.randperm(linear.in_features, device=linear.weight.device)[:count].sort().values
        linear = keep_inputs(linear, chosen)
    if bits is None:
        return linear
    assert isinstance(linear.weight, Tensor)
    weight = quantize(linear.weight, QuantSpec(bits, group_size))
    return Linear(weight, linear.bias, linear.input_index, linear.output_index, linear.in_features, linear.out_features)


def _multiple(width: int, share: float, of: int = 128) -> int:
    """A share of a width, in whole groups of 128."""
    return width if share == 1 else max(of, round(width * share / of) * of)


@dataclass
class TimedMadeModel(TimedModel):
    """A model under measurement that is made and not loaded."""

    row: Row = field(kw_only=True)

    def load(self, settings: BenchmarkOptions, placement: Placement) -> None:
        if placement.device.startswith("cuda"):
            super().load(settings, placement)
            # made in memory, never loaded: what making it took says nothing about loading
            self.memory["peak_loading"] = self.memory["loaded"]
        else:
            self._load(placement)
            self.not_measured["peak_memory_bytes"] = "the model is made in memory, not in a process of its own"

    def _load(self, placement: Placement) -> None:
        assert placement.dtype is not None
        self._model = make_model(self.row, self.checkpoint, placement.device, placement.dtype, placement.backend)


def measure_row(row: Row, settings: BenchmarkOptions, placement: Placement, command: str) -> Record:
    """One record, as `halve benchmark` makes it of a folder."""
    assert placement.dtype is not None
    opened = TimedModel.open(SHAPES / row.shape, settings, placement)
    checkpoint = open_row(row, placement.device, placement.dtype)
    timed = TimedMadeModel(row.name, checkpoint, opened.not_measured, passes=opened.passes, row=row)
    (measured,) = measure_in_turns([timed], settings, placement, command)
    measured["notes"].append("the model was made in memory: peak memory is that of running it, loading is not in it")
    return {**measured, "model": row.name, "recipe": row.steps(), "shape": row.shape, "baseline": row.baseline}


def step_error(row: Row, placement: Placement, steps: int = 3) -> tuple[float, str]:
    """How far the logits of fused decode steps are from those of the whole forward by torch's own products, relative, and
    how the steps ran; 0 where they are not fused, infinite where a second run differs in a bit (sums have an order, so that
    would be a race). Both models are drawn from the same seeds; the context is long enough for attention to be split."""
    assert placement.dtype is not None
    models = []
    for backend in ("reference", placement.backend):
        torch.manual_seed(0)
        checkpoint = open_row(row, placement.device, placement.dtype)
        models.append(make_model(row, checkpoint, placement.device, placement.dtype, backend))
    prompt = random_prompt(models[0], 200, seed=0)
    worst, logits, kernel = 0.0, [], ""
    for turn in range(2):
        decoder = Decoder(models[1], [prompt], 256, Sampling())
        engine, tokens = decoder.engine, list(prompt)
        chosen = decoder.prefill()
        for _ in range(steps):
            if not isinstance(engine, GpuStep):
                break
            tokens += chosen[0].tolist()
            chosen = decoder.step(chosen)
            logits.append(engine.captured.logits[0].float())
            if turn == 0:
                wanted = models[0](torch.tensor([tokens], device=placement.device))[0, -1].float()
                worst = max(worst, float((logits[-1] - wanted).norm() / wanted.norm()))
        kernel = decoder.kernel
        del decoder, engine
    same = all(torch.equal(a, b) for a, b in zip(logits, logits[len(logits) // 2 :], strict=False))
    return worst if same else float("inf"), kernel
