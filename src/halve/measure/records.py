"""Records: one JSON file per run, saying on what, with what and how a figure was obtained.

Every record has the keys of `Circumstances`; evaluations and benchmarks add their figures, whose names carry their units.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from halve._version import __version__
from halve.errors import DataError, reading
from halve.files import check_output_path, parse_json, write_text
from halve.files.contents import is_record
from halve.measure.machine import describe_machine
from halve.texts import files_below

Record = dict[str, Any]  # of any kind, while it is made
AnyRecord = Mapping[str, Any]  # of any kind, to read


class Circumstances(TypedDict):
    """On what, with what and how a figure was obtained: the keys of every record."""

    kind: str
    model: str
    command: str
    recipe: list[Any]
    date: str
    halve_version: str
    torch_version: str
    versions: dict[str, str]
    commit: str | None
    machine: dict[str, Any]


class EvaluationRecord(Circumstances):
    """One task asked of one model; docs/evaluation.md explains the figures. What a task does not measure is None."""

    device: str
    dtype: str
    bos_ids: NotRequired[list[int]]
    weight_bytes: NotRequired[int]
    disk_bytes: NotRequired[int]
    task: str
    protocol: str
    data: str
    data_sha256: str
    limit: int | None
    not_measured: dict[str, str]
    # questions
    template: NotRequired[str | None]
    accuracy: float | None
    accuracy_ci95: list[float] | None
    questions: int | None
    articles: NotRequired[int]
    answered: int | None
    correct: NotRequired[int]
    chance: NotRequired[float]
    overflow: NotRequired[int]
    cut: NotRequired[int]  # articles, or documents
    log_likelihood: NotRequired[dict[str, Any]]
    sampling: NotRequired[dict[str, Any]]
    by_kind: NotRequired[dict[str, Any]]
    answers: NotRequired[dict[str, str]]
    # text
    perplexity: float | None
    nll_nats_per_token: float | None
    bits_per_byte: NotRequired[float | None]
    tokens: int | None
    window: NotRequired[int]
    windows: NotRequired[int]
    documents: NotRequired[int]


class BenchmarkRecord(Circumstances):
    """Speed and memory of one model; docs/benchmark.md explains the figures."""

    device: str
    device_name: str
    dtype: str
    backend: str
    kernels: dict[str, int]
    decode_kernel: str
    random_weights: bool
    batch: int
    seed: int
    runs: int
    prompt_tokens: int
    new_tokens: int
    long_prompt_tokens: int
    ttft_ms: float
    ttft_ms_p10: float
    ttft_ms_p90: float
    prefill_tokens_per_s: float
    decode_ms_median: float
    decode_ms_p10: float
    decode_ms_p90: float
    decode_tokens_per_s: float
    floor_ms: float
    floor_share: float
    bandwidth_gb_per_s: float
    bandwidth_kind: str
    long_prompt: dict[str, Any] | None
    weight_bytes: int
    step_weight_bytes: int
    peak_memory_bytes: int | None
    peak_memory_loading_bytes: NotRequired[int]
    peak_memory_running_bytes: NotRequired[int]
    peak_memory_reserved_bytes: NotRequired[int]
    peak_memory_above_baseline_bytes: NotRequired[int]
    loaded_memory_bytes: NotRequired[int]
    baseline_memory_bytes: NotRequired[int]
    side_by_side: NotRequired[dict[str, Any]]
    profile: NotRequired[dict[str, Any]]
    notes: list[str]
    not_measured: dict[str, str]


REQUIRED: dict[str, type] = {
    "kind": str,
    "halve_version": str,
    "torch_version": str,
    "machine": dict,
    "command": str,
    "model": str,
    "recipe": list,
}
_PACKAGES = ("transformers", "safetensors", "triton", "compressed-tensors")


def new_record(
    kind: str,
    model: str | os.PathLike[str],
    *,
    command: str | Sequence[str] | None = None,
    recipe: list[Any] | None = None,
    **figures: Any,
) -> Record:
    """A record of `kind` ("benchmark", "evaluation", ...) about `model`, its circumstances filled in.

    `command` defaults to this process's own, `recipe` to the one in the model folder's halve.json ([] without one);
    `figures` are added as they are.
    """
    if command is None:
        program = Path(sys.argv[0]).name
        command = ["halve" if program == "__main__.py" else program, *sys.argv[1:]]
    return {
        "kind": kind,
        "model": os.fspath(model),
        "command": command if isinstance(command, str) else shlex.join(command),
        "recipe": checkpoint_recipe(model) if recipe is None else recipe,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "halve_version": __version__,
        "torch_version": str(torch.__version__),
        "versions": {"python": platform.python_version(), **_installed(_PACKAGES)},
        "commit": source_commit(),
        "machine": describe_machine(),
        **figures,
    }


def source_commit() -> str | None:
    """The git commit this package runs from, with "-dirty" when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if _git(folder, "ls-files", "--error-unmatch", "errors.py") is None:
        return None  # installed inside somebody else's repository
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def checkpoint_recipe(model: str | os.PathLike[str]) -> list[Any]:
    """The steps a model folder was made with, from its halve.json; [] for a folder or hub id without one."""
    path = Path(model) / "halve.json"
    if not path.is_file():
        return []
    manifest = _parse(path)
    recipe = manifest.get("recipe", []) if isinstance(manifest, dict) else None
    if not isinstance(recipe, list) or not all(isinstance(step, dict) for step in recipe):
        raise DataError(f'{path} is malformed, its "recipe" is not a list of steps: compress the model again')
    return recipe


def check_record_path(path: str | os.PathLike[str]) -> Path:
    """Find out before any work whether a record can be written at `path`, where a record alone is replaced."""
    return check_output_path(path, "a record", is_record)


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write one record as JSON, complete or not at all.

    JSON has no infinity: a figure that is not finite becomes null, and its value is kept under "not_finite".
    Raises OutputError when the place cannot be written, DataError when the record lacks a required key.
    """
    path = check_record_path(path)
    check_record(record, str(path))
    lost: dict[str, str] = {}
    finite = _finite(dict(record), "", lost)
    if lost:
        finite["not_finite"] = lost
    text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)
    return path


def _finite(value: Any, where: str, lost: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        lost[where] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v, f"{where}.{k}" if where else str(k), lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{where}.{i}", lost) for i, v in enumerate(value)]
    return value


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read one record; raises DataError when the file is missing, is not JSON, or is no record."""
    record = _parse(Path(path))
    if not isinstance(record, dict):
        raise DataError(f"{path} is no record of halve, it holds a JSON {type(record).__name__}: name a record file")
    check_record(record, str(path))
    return record


def read_records(paths: Iterable[str | os.PathLike[str]]) -> list[Record]:
    """All records in files and folders, in the order given; inside a folder, by path.

    Other JSON files in a folder (a model's config, say) are passed over; a file named itself has to be a record.
    Raises DataError for one that is malformed, or when there is none at all.
    """
    records, places = [], [Path(p) for p in paths]
    for place in places:
        if not place.is_dir():
            records.append(read_record(place))
            continue
        for path in files_below(place, ".json"):
            parsed = _parse(path)
            if isinstance(parsed, dict) and "halve_version" in parsed and "kind" in parsed:
                check_record(parsed, str(path))
                records.append(parsed)
    if not records:
        named = ", ".join(map(str, places)) or "nothing"
        raise DataError(f"no record found in {named}: make one with halve evaluate or halve benchmark and --json FILE")
    return records


def check_record(record: Mapping[str, Any], source: str) -> None:
    """Raise DataError unless `record` has every required key with its type."""
    for key, kind in REQUIRED.items():
        if key not in record:
            raise DataError(f'{source} is no record of halve, it lacks "{key}": write it again with --json')
        if not isinstance(record[key], kind):
            actual = type(record[key]).__name__
            raise DataError(
                f'{source} is malformed, "{key}" is a {actual}, expected {kind.__name__}: write it again with --json'
            )


def _parse(path: Path) -> Any:
    with reading(path, DataError):
        if not path.exists():
            raise DataError(f"{path} does not exist: name a record file or a folder with records")
        try:
            return parse_json(path)
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}): write it again") from error
