"""One step of a recipe: a pass over the blocks, from one folder to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.reader import Checkpoint, compute_dtype
from halve.checkpoint.stored import BIAS, SCALE, WEIGHT, StoredLinear, to_tensors
from halve.checkpoint.tensors import FLOATING, SafetensorsFolder, cast
from halve.checkpoint.writer import CheckpointWriter
from halve.compression.methods import Method, streams
from halve.compression.plan import HEAD, TABLE, Key, StepPlan, state_of
from halve.compression.walk import BlockView, Walk
from halve.compression.windows import Calibration, CalibrationOptions
from halve.model.inventory import block_linears, projection_linears, vector_shapes
from halve.progress import track


@dataclass(frozen=True)
class Request:
    """Everything that decides the bytes of the result."""

    model: str
    out: Path
    steps: list[Method]
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    device: str = "cpu"
    dtype: torch.dtype | None = None


def working_dtype(request: Request, source: Checkpoint) -> torch.dtype:
    """What a step computes in: as the model runs, but no narrower than what it may change, and never in float16."""
    dtype = compute_dtype(source, request.dtype, request.device)
    state = state_of(source, request.dtype)
    for linear in (state.table, *state.linears.values()):
        for stored in (linear.dtype if linear.spec is None else None, linear.bias_dtype):
            dtype = dtype if stored is None else torch.promote_types(dtype, stored)
    return torch.float32 if dtype == torch.float16 else dtype


def check_fits(request: Request, source: Checkpoint) -> None:
    """CheckpointError, before any work, when a weight is too large for the dtype asked for; reads all that could be."""
    if request.dtype is None:
        return
    ends = torch.finfo(request.dtype).max
    for name in source.tensors.shapes:
        dtype = source.tensors.dtypes[name]
        if dtype in FLOATING and torch.finfo(dtype).max > ends and not name.endswith(f".{SCALE}"):
            source.tensor(name, request.dtype)


def run_step(
    request: Request,
    source: Checkpoint,
    method: Method,
    plan: StepPlan,
    windows: Calibration | None,
    folder: Path,
    number: int,
) -> list[dict[str, Any]]:
    """One pass over the blocks that stay; every finished block is a shard in `folder`."""
    dtype = working_dtype(request, source)
    walk = Walk(source, windows, dtype, request.device)
    if streams(method) > 1:
        walk.aim_at(source, range(len(source.config.layers)), plan.kept_sublayers())
    layers = len(plan.sources)
    writer = CheckpointWriter(folder, layers + 1)
    rows: list[dict[str, Any]] = []
    for index in track(range(layers), total=layers, description=f"step {number}: {method.name}"):
        if writer.done(index):
            rows += writer.rows(index)
            if walk.calibrated:
                walk.advance(_finished(folder, request, source, plan, writer, index).block(index, dtype, walk.device))
            continue
        view = walk.block(plan.sources[index], plan.sublayers(index))
        with torch.inference_mode():
            edited = method.edit(view, plan)
        tensors = _block_tensors(request, source, view, plan, index)
        edited = _with_bytes(edited, view, plan, tensors)
        writer.write(index, tensors, edited)
        rows += edited
        if walk.calibrated and (index + 1 < layers or plan.touched & {HEAD, TABLE}):
            walk.advance(view.finished(plan, index))
    if writer.done(layers):
        return rows + writer.rows(layers)
    tensors, edited = _other_tensors(request, source), []
    if plan.touched & {HEAD, TABLE}:
        walk.finish_states()
    stored: dict[Key, tuple[StoredLinear, Callable[[], BlockView]]] = {TABLE: (plan.before.table, walk.table)}
    if HEAD in plan.touched or not source.config.tied:
        stored[HEAD] = plan.before.linears[HEAD], walk.head
    for key, (linear, viewed) in stored.items():
        if key not in plan.touched:
            tensors |= _unchanged(request, source, linear, linear.name)
            continue
        view = viewed()
        with torch.inference_mode():
            made = method.edit(view, plan)
        tensors |= _changed(view, plan, key[1])
        edited += _with_bytes(made, view, plan, tensors)
    writer.write(layers, tensors, edited)
    return rows + edited


def _finished(
    folder: Path, request: Request, source: Checkpoint, plan: StepPlan, writer: CheckpointWriter, index: int
) -> Checkpoint:
    """A view of the folder being written, good for reading one finished block."""
    tensors = SafetensorsFolder(folder, [writer.shard(index)])
    return Checkpoint(folder, source.raw, source.family, plan.after.config, tensors, plan.after.schemes)


def _changed(view: BlockView, plan: StepPlan, role: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear that the step touched, each in the dtype of what it replaces."""
    left = plan.left(view.key(role))
    assert left is not None
    headers = {f"{left.name}.{part}": dtype for part, (_, dtype) in left.parts(plan.after.dtype).items()}
    tensors = to_tensors(left.name, view.linears[role])
    return {name: cast(name, t, headers[name]) if t.is_floating_point() else t for name, t in tensors.items()}


def _unchanged(request: Request, source: Checkpoint, linear: StoredLinear, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear that the step left alone, as they are stored, under its new name."""
    tensors = {}
    for part in linear.parts(source.dtype):
        dtype = request.dtype if part in (WEIGHT, BIAS) else None
        tensors[f"{name}.{part}"] = source.tensor(f"{linear.name}.{part}", dtype).contiguous()
    return tensors


def _block_tensors(
    request: Request, source: Checkpoint, view: BlockView, plan: StepPlan, layer: int
) -> dict[str, torch.Tensor]:
    """Everything a finished block stores at its place `layer`: its linears, and its norms as they were."""
    family, config = source.family, plan.after.config
    tensors: dict[str, torch.Tensor] = {}
    for shape in block_linears(family, config, layer):
        key = view.key(shape.role)
        if key in plan.touched:
            tensors |= _changed(view, plan, shape.role)
        else:
            tensors |= _unchanged(request, source, plan.before.linears[key], shape.name)
    there, here = (family.names["block"].format(i) + "." for i in (plan.sources[layer], layer))
    for name in vector_shapes(family, config):
        if name.startswith(here):
            tensors[name] = source.tensor(there + name.removeprefix(here), request.dtype).contiguous()
    return tensors


def _with_bytes(
    edited: list[dict[str, Any]], view: BlockView, plan: StepPlan, tensors: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """The report rows of a block or head, one for each linear touched, with the bytes that are really stored."""
    rows = {row["name"]: row for row in edited}
    for role in view.touched(plan):
        left = plan.left(view.key(role))
        assert left is not None
        size = sum(t.nbytes for name, t in tensors.items() if name.rpartition(".")[0] == left.name)
        rows.setdefault(view.name(role), {"name": view.name(role)})["bytes_after"] = size
    return list(rows.values())


def _other_tensors(request: Request, source: Checkpoint) -> dict[str, torch.Tensor]:
    """Positions, final norm and projections, as they were."""
    block = source.family.names["block"].split("{")[0]
    names = [n for n in vector_shapes(source.family, source.config) if not n.startswith(block)]
    names += [f"{s.name}.weight" for s in projection_linears(source.family, source.config)]
    return {name: source.tensor(name, request.dtype).contiguous() for name in names}
