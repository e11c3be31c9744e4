"""Records: one JSON file per run, saying on what, with what and how a figure was obtained.

Every record has the keys of `Circumstances`; evaluations and benchmarks add their figures, whose names carry their units.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from halve._version import __version__
from halve.checkpoint.manifest import read_manifest
from halve.errors import DataError
from halve.files import check_output_path, write_json
from halve.files.contents import is_record
from halve.files.typed import check_has, check_type, finite, read_value
from halve.measure.kinds import KINDS, LATER, QUALITIES, Circumstances
from halve.measure.machine import describe_machine
from halve.texts import files_below

Record = dict[str, Any]  # of any kind, while it is made
AnyRecord = Mapping[str, Any]  # of any kind, to read


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


@dataclass(frozen=True)
class Measurement:
    """What one record measured: where two are equal the same thing was measured again, where they differ it was not.

    `what`, by the record's keys: of an evaluation what was asked, of a benchmark how it was run. A value that a record
    does not have is None.
    """

    kind: str
    model: str
    random_weights: bool
    recipe: str  # a folder may have been made again
    dtype: str | None
    device: str | None
    what: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, record: AnyRecord) -> Measurement:
        """The measurement of an evaluation or a benchmark."""
        what = {key: record.get(key) for key in _MEASURED[record["kind"]]}
        if record["kind"] == "benchmark":
            what["threads"] = record["machine"].get("threads")
        return cls(
            record["kind"],
            os.path.normpath(record["model"]),
            bool(record.get("random_weights")),
            json.dumps(record["recipe"], sort_keys=True),
            record.get("dtype"),
            record.get("device"),
            tuple((key, json.dumps(value) if isinstance(value, dict) else value) for key, value in what.items()),
        )


_MEASURED = {
    "evaluation": ("task", "protocol", "template", "data", "data_sha256", "window", "limit", "sampling"),
    "benchmark": ("device_name", "backend", "prompt_tokens", "new_tokens", "batch"),
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
    return read_manifest(path).get("recipe", []) if path.is_file() else []


def check_record_path(path: str | os.PathLike[str]) -> Path:
    """Find out before any work whether a record can be written at `path`, where a record alone is replaced."""
    return check_output_path(path, "a record", is_record)


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write one record as JSON, complete or not at all.

    JSON has no infinity: a figure that is not finite becomes null, and its value is kept under "not_finite".
    Raises OutputError when the place cannot be written, DataError when the record lacks a key of every record.
    """
    path = check_record_path(path)
    check_type(record, Circumstances, path)
    lost: dict[str, str] = {}
    written = finite(record, lost)
    if lost:
        written["not_finite"] = lost
    write_json(path, written)
    return path


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read one record; raises DataError when the file is missing, is not JSON, or is not what its kind says."""
    record = read_value(Path(path))
    check_record(record, path)
    return record


@dataclass
class Found:
    """The records of some files and folders, and what was left out because of what is wrong with it, in words."""

    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def find_records(paths: Iterable[str | os.PathLike[str]]) -> Found:
    """All records in files and folders, in the order given; inside a folder, by path.

    In a folder JSON files that are no records (a model's config, say) are passed over, and what is malformed is left out; a
    file named itself has to be a record. Raises DataError for one that is not, or when there is none at all.
    """
    found, places = Found(), [Path(p) for p in paths]
    for place in places:
        if not place.is_dir():
            found.records.append(read_record(place))
            continue
        for path in files_below(place, ".json"):
            try:
                parsed = read_value(path)
                if looks_like_record(parsed):
                    check_record(parsed, path)
                    found.records.append(parsed)
            except DataError as error:
                found.left_out.append(str(error))
    if not found.records:
        named = ", ".join(map(str, places)) or "nothing"
        why = f" ({found.left_out[0]})" if found.left_out else ""
        raise DataError(
            f"no record found in {named}{why}: make one with halve evaluate or halve benchmark and --json FILE"
        )
    return found


def looks_like_record(value: Any) -> bool:
    """Whether a value out of JSON is meant to be a record, whatever may be wrong with it."""
    told = {"kind", "halve_version", "command", "machine", "commit"}
    return isinstance(value, dict) and len(told & value.keys()) > 1


def check_record(record: Any, source: str | os.PathLike[str]) -> None:
    """Raise DataError unless `record` is what its kind says, at every level; `source` is named then."""
    kind = str(record.get("kind")) if isinstance(record, dict) else ""
    if kind == "search":
        _check_judged(record, os.fspath(source))
    check_type(record, KINDS.get(kind, Circumstances), os.fspath(source), LATER.get(kind, frozenset()))


def _check_judged(search: Record, source: str) -> None:
    """Everything in a search has the figure of quality that it was about, which its floor or its objective names."""
    floor = search.get("floor")
    if not isinstance(floor, dict):
        return
    limited, objective = floor.get("figure", "accuracy"), search.get("objective")
    name = objective if limited == "bytes" else limited
    if not isinstance(name, str) or name not in QUALITIES:
        raise DataError(
            f'{source} is malformed, "floor.figure" is no figure of quality: make it again, or move it elsewhere'
        )
    key = QUALITIES[name]
    places = [("floor", floor, "bytes" if limited == "bytes" else key), ("dense", search.get("dense"), key)]
    winner = search.get("winner")
    places += [("winner", winner, key), ("winner", winner, f"held_out_{key}")]
    for rows in ("trials", "pareto"):
        listed = search.get(rows)
        places += [(f"{rows}.{i}", row, key) for i, row in enumerate(listed if isinstance(listed, list) else ())]
    for where, place, wanted in places:
        check_has(place, wanted, where, source)
