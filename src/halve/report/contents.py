"""What a folder holds that a page can show: records, studies, manifests and measured layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve.errors import DataError, reading
from halve.files import parse_json
from halve.files.work import is_scratch_name
from halve.measure.records import Record, check_record
from halve.texts import files_below

# files of a model folder that are large and hold nothing of interest
_PASSED_OVER = (
    "tokenizer",
    "config.json",
    "generation_config",
    "model.safetensors.index",
    "vocab",
    "special_tokens",
    "tekken",
)


@dataclass
class Contents:
    """Everything found below a folder, in the order of the paths; paths are relative to it."""

    records: dict[Path, Record] = field(default_factory=dict)  # of evaluations and benchmarks
    searches: dict[Path, Record] = field(default_factory=dict)
    reproductions: dict[Path, Record] = field(default_factory=dict)
    analyses: dict[Path, dict[str, Any]] = field(default_factory=dict)  # of halve layers
    manifests: dict[Path, dict[str, Any]] = field(default_factory=dict)  # by model folder

    @property
    def everything(self) -> dict[Path, Record]:
        return self.records | self.searches | self.reproductions

    def shown(self) -> dict[Path, Record]:
        """The records that no search counts among its trials, except the winner's and the dense model's."""
        hidden: set[Path] = set()
        for path, search in self.searches.items():
            best = [row for row in (search.get("winner"), search.get("dense")) if row]
            hidden |= _named(path, search["trials"]) - _named(path, best)
        return {path: record for path, record in self.records.items() if path not in hidden}


def _named(search: Path, trials: Sequence[dict[str, Any]]) -> set[Path]:
    """The record files that trials of a search name."""
    return {search.parent / name for trial in trials for name in trial.get("records", [])}


def read_contents(folder: Path) -> Contents:
    """Read every JSON file below `folder` that halve wrote. Raises DataError when there is none, or one is malformed."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: name one with records, models, or a study")
    contents = Contents()
    for path in files_below(folder, ".json"):
        place = path.relative_to(folder)
        unfinished = any(is_scratch_name(part) or part.startswith(".") for part in place.parts[:-1])
        if unfinished or path.name.startswith(_PASSED_OVER):
            continue
        _sort_in(contents, place, _read(path), path)
    if not (contents.everything or contents.analyses or contents.manifests):
        raise DataError(
            f"{folder}: holds no record, no model of halve and no study: make records with --json, or name another folder"
        )
    return contents


def _read(path: Path) -> Any:
    with reading(path, DataError):
        try:
            return parse_json(path)
        except ValueError as error:
            raise DataError(f"{path}: not readable as JSON ({error}): write it again or move it elsewhere") from error


def _sort_in(contents: Contents, place: Path, value: Any, path: Path) -> None:
    if not isinstance(value, dict):
        return
    if path.name == "halve.json" and isinstance(value.get("steps"), list):
        if not _is_manifest(value):
            raise DataError(f"{path}: is malformed, its steps do not say what they did: compress the model again")
        contents.manifests[place.parent] = value
    elif path.name == "layers.json" and "best_first_layer" in value:
        contents.analyses[place] = value
    elif "kind" in value and "halve_version" in value:
        check_record(value, str(path))
        kinds = {"search": contents.searches, "reproduction": contents.reproductions}
        kinds.get(value["kind"], contents.records)[place] = value


def _is_manifest(value: dict[str, Any]) -> bool:
    """Whether a halve.json says of each step what the page tells."""
    sizes = ("linear_bytes_before", "linear_bytes_after")
    return isinstance(value.get("calibration"), dict | None) and all(
        isinstance(step, dict)
        and isinstance(step.get("step"), str)
        and isinstance(step.get("resolved", {}), dict)
        and all(isinstance(step.get(size), int) for size in sizes)
        and isinstance(step.get("linears"), list)
        and all(isinstance(line, dict) and {"name", "action"} <= line.keys() for line in step["linears"])
        for step in value["steps"]
    )
