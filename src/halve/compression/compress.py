"""START HERE. A model folder and a recipe in, a smaller model folder out: plan, calibrate, transform, save, check.

Each step of the recipe is a pass over the blocks from one folder to the next, so memory stays at one block and the
calibration states, a crash loses one block, and each step calibrates on the model as compressed so far.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from halve._version import __version__
from halve.checkpoint.config import config_json
from halve.checkpoint.identity import model_identity, versions
from halve.checkpoint.reader import Checkpoint, check_device, compute_dtype, find_model, open_checkpoint
from halve.checkpoint.schemes import write_schemes
from halve.checkpoint.tokenizer import load_tokenizer
from halve.checkpoint.writer import CheckpointWriter
from halve.compression.estimate import Estimate, estimate
from halve.compression.methods import Method, Resolvable, streams
from halve.compression.plan import TABLE, StepPlan, state_of
from halve.compression.recipe import as_steps, make_step, step_json
from halve.compression.step_run import Request, check_fits, run_step, working_dtype
from halve.compression.walk import Walk
from halve.compression.windows import HELD_OUT_SHARE, Calibration, CalibrationOptions, make_windows, text_identity
from halve.errors import CheckpointError
from halve.files import write_json, write_text
from halve.files.contents import companions
from halve.files.work import WorkFolder
from halve.model.inventory import projection_linears
from halve.texts import read_documents


@dataclass(frozen=True)
class RecipePlan:
    """The plan of every step, with the sizes before and after."""

    checkpoint: Checkpoint
    bytes_before: int
    steps: list[StepPlan]
    window: int
    estimate: Estimate

    @property
    def bytes_after(self) -> int:
        return self.steps[-1].after.nbytes

    @property
    def disk_bytes(self) -> int:
        """The two largest folders that exist at once while the recipe runs."""
        sizes = [step.after.nbytes for step in self.steps]
        return max(a + b for a, b in zip([0, *sizes], sizes, strict=False))


@dataclass(frozen=True)
class Result:
    """What `compress` did: the folder, its manifest, and the plan it followed."""

    out: Path
    manifest: dict[str, Any]
    plan: RecipePlan
    notes: list[str] = field(default_factory=list)


def plan_recipe(request: Request) -> RecipePlan:
    """Check the model, the recipe and every shape; reads headers only, takes seconds."""
    check_device(request.device)
    checkpoint = open_checkpoint(request.model)
    states, plans = state_of(checkpoint, request.dtype), []
    for method in request.steps:
        plans.append(method.plan(states))
        states = plans[-1].after
    window = min(request.calibration.window, checkpoint.config.max_positions)
    passes = [(plan.before, streams(method)) for plan, method in zip(plans, request.steps, strict=True)]
    samples = request.calibration.samples
    tokens = (samples + max(1, samples // HELD_OUT_SHARE)) * window
    itemsize = working_dtype(request, checkpoint).itemsize
    table_weights = max(plan.before.table.parameters for plan in plans) if any(TABLE in p.touched for p in plans) else 0
    cost = estimate(passes, tokens, itemsize, request.device, table_weights)
    return RecipePlan(checkpoint, state_of(checkpoint, None).nbytes, plans, window, cost)


def compress(
    model: str | Path,
    out: str | Path,
    steps: Sequence[str | Method],
    *,
    calibration: str | Path = "c4",
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_plan: Callable[[RecipePlan], None] | None = None,
) -> Result:
    """Apply `steps` to `model` and write the result to the new folder `out`.

    `dtype` is that of computation and of the floating tensors written; None leaves each tensor in its own, and what a step
    makes in that of what it replaces. An interrupted run is
    continued by the same call. Raises HalveError before any work when the request cannot succeed.
    """
    options = CalibrationOptions(str(calibration), samples, window, seed)
    request = Request(str(model), Path(out), as_steps(steps), options, check_device(device), dtype)
    plan = plan_recipe(request)
    work = WorkFolder(
        out,
        keep={"the model's own folder": plan.checkpoint.folder, "the calibration text": calibration},
        overwrite=overwrite,
        needs_bytes=plan.disk_bytes,
    )
    companions(plan.checkpoint.folder)
    documents = read_documents(calibration) if any(method.calibrates for method in request.steps) else None
    windows = None if documents is None else _windows(request, plan, documents)
    if on_plan is not None:
        on_plan(plan)
    check_fits(request, plan.checkpoint)
    with work.claim(_identity(request, plan, documents)) as scratch:
        return _run(request, plan, windows, work, scratch)


def _run(request: Request, plan: RecipePlan, windows: Calibration | None, work: WorkFolder, scratch: Path) -> Result:
    """Every step, each from one folder to the next, and the last folder published; what is done already stays."""
    source, reports, seconds = plan.checkpoint, [], []
    manifest: dict[str, Any] = {}
    for number, asked in enumerate(request.steps, 1):
        started, folder = time.monotonic(), scratch / f"step-{number}"
        if not (folder / "model.safetensors.index.json").exists():
            method, step = _resolve(request, source, windows, scratch, number)
            rows = run_step(request, source, method, step, windows if method.calibrates else None, folder, number)
            reports.append(_report(asked, method, step, rows))
            timed = [row for row in rows if "seconds" in row]
            seconds += [{"linear": row["name"], "seconds": round(row["seconds"], 3)} for row in timed]
            manifest = _manifest(request, plan, reports, windows)
            _complete(folder, request, source, step, manifest)
        else:  # an interrupted run got this far
            manifest = json.loads((folder / "halve.json").read_text())
            reports = manifest["steps"][len(plan.checkpoint.manifest.get("steps", [])) :]
        seconds.append({"step": asked.name, "seconds": round(time.monotonic() - started, 3)})
        if number > 1:
            shutil.rmtree(scratch / f"step-{number - 1}")
        source = open_checkpoint(folder)
    _verify(source, request)
    write_text(source.folder / "halve-log.jsonl", "".join(json.dumps(s) + "\n" for s in seconds))
    work.publish(source.folder)
    return Result(work.out, manifest, plan, _notes(windows, reports))


def _windows(request: Request, plan: RecipePlan, documents: list[str]) -> Calibration:
    """What is calibrated on; too little text is found here, before any weight is read."""
    asked = replace(request.calibration, window=plan.window)
    return make_windows(documents, load_tokenizer(request.model), asked, plan.checkpoint.config.vocab_size)


def _notes(windows: Calibration | None, reports: list[dict[str, Any]]) -> list[str]:
    """What the user should know besides the result: choices made from data, and text that did not suffice."""
    notes = []
    for report in reports:
        changed = {k: v for k, v in report.get("resolved", {}).items() if v != report.get(k)}
        chosen = ", ".join(f"{k}={'|'.join(v)}" for k, v in changed.items() if isinstance(v, list))
        if chosen:
            notes.append(f"{report['step']}: chose {chosen}")
    if windows is not None and windows.origin["windows"] != windows.origin["windows_asked"]:
        origin = windows.origin
        notes.append(
            f"the calibration text gave {origin['windows']} of the {origin['windows_asked']} windows asked for"
        )
    return notes


def _identity(request: Request, plan: RecipePlan, documents: list[str] | None) -> dict[str, Any]:
    """What makes a request the very same, so that what an interrupted run of it left is gone on with."""
    asked = request.calibration
    return {
        "model": {"name": _model_name(request)} | model_identity(plan.checkpoint.folder),
        "calibration": {} if documents is None else text_identity(asked.source, documents),
        "steps": [step_json(m) for m in request.steps],
        "samples": asked.samples,
        "window": plan.window,
        "seed": asked.seed,
        "device": request.device,
        "dtype": str(request.dtype),
        "versions": versions(),
    }


def _model_name(request: Request) -> str:
    """A hub id, or what a folder is called."""
    if Path(os.path.expanduser(request.model)).exists():
        return find_model(request.model).resolve().name
    return request.model


def _resolve(
    request: Request, source: Checkpoint, windows: Calibration | None, work: Path, number: int
) -> tuple[Method, StepPlan]:
    """The method of a step with its choice made, and its plan for `source`; kept on disk so that a resumed run agrees.

    A choice that a later step cannot work on is found here, before the pass begins.
    """
    method = request.steps[number - 1]
    state = state_of(source, request.dtype)
    if not isinstance(method, Resolvable) or method.resolved:
        return method, method.plan(state)
    path = work / f"step-{number}.json"
    if path.exists():
        options = json.loads(path.read_text())
        chosen = make_step(options.pop("step"), options)
    else:
        needed = windows if method.calibrates else None
        chosen = method.resolve(Walk(source, needed, working_dtype(request, source), request.device))
        write_json(path, step_json(chosen))
    plan = chosen.plan(state)
    after = plan.after
    for later in request.steps[number:]:
        after = later.plan(after).after
    return chosen, plan


def _complete(folder: Path, request: Request, source: Checkpoint, step: StepPlan, manifest: dict[str, Any]) -> None:
    """Write config, manifest and index of a step's folder."""
    state = step.after
    # the projections too: a scheme for all linears must not be taken for theirs
    projections = projection_linears(source.family, state.config)
    names = [s.name for s in (*state.linears.values(), *projections)]
    schemes = write_schemes(state.schemes, names, state.table.name) if state.schemes else None
    config = config_json(source.raw, source.family, state.config, state.plain, schemes, request.dtype or source.dtype)
    CheckpointWriter(folder, len(step.sources) + 1).finish(config, manifest, source.folder)


def _report(asked: Method, method: Method, step: StepPlan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = {row["name"]: row for row in rows}
    linears = []
    for row in step.rows:
        line = {
            "name": row.name,
            "action": row.action,
            "bytes_before": row.bytes_before,
            "bytes_after": row.bytes_after,
            "parameters_before": row.parameters_before,
            "parameters_after": row.parameters_after,
        }
        if row.reason:
            line["reason"] = row.reason
        linears.append(line | {k: v for k, v in measured.get(row.name, {}).items() if k not in ("name", "seconds")})
    return {
        **step_json(asked),
        **({} if asked == method else {"resolved": step_json(method)}),
        "parameters_before": step.before.parameters,
        "parameters_after": step.after.parameters,
        "linear_bytes_before": sum(line["bytes_before"] for line in linears),
        "linear_bytes_after": sum(line["bytes_after"] for line in linears),
        "linears": linears,
    }


def _manifest(
    request: Request, plan: RecipePlan, reports: list[dict[str, Any]], windows: Calibration | None
) -> dict[str, Any]:
    """halve.json: what was done, with what. The same request gives the same bytes, so no times and no machine."""
    earlier = plan.checkpoint.manifest
    return {
        "halve_version": __version__,
        "torch_version": torch.__version__,
        "base_model": earlier.get("base_model", _model_name(request)),
        "weight_bytes_before": earlier.get("weight_bytes_before", plan.bytes_before),
        "recipe": earlier.get("recipe", []) + [step_json(m) for m in request.steps[: len(reports)]],
        "calibration": None if windows is None else windows.origin,
        "steps": earlier.get("steps", []) + reports,
    }


def _verify(checkpoint: Checkpoint, request: Request) -> None:
    """Run 16 tokens through the reloaded result, block by block: its logits must be finite."""
    tokens = torch.arange(16).remainder(checkpoint.config.vocab_size).unsqueeze(0)
    tokens = tokens[:, : checkpoint.config.max_positions]
    dtype = compute_dtype(checkpoint, request.dtype, request.device)
    walk = Walk(checkpoint, Calibration(tokens, tokens[:, :1], {}), dtype, request.device)
    for index in range(len(checkpoint.config.layers)):
        walk.advance(checkpoint.block(index, dtype, request.device))
    walk.finish_states()
    with torch.inference_mode():
        logits = checkpoint.head(dtype, request.device)(walk.states[0][0])
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{checkpoint.folder}: the compressed model gives NaN or infinite logits: not published")
