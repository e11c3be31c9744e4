"""What a folder holds that a page can show: records, studies, manifests and measured layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve.checkpoint.manifest import Manifest
from halve.errors import DataError
from halve.files.typed import check_type, read_value
from halve.files.work import is_scratch_name
from halve.measure.records import Record, check_record, looks_like_record
from halve.studies.layers import check_analysis, is_analysis
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
    manifests: dict[Path, Manifest] = field(default_factory=dict)  # by model folder
    left_out: dict[Path, str] = field(default_factory=dict)  # malformed files, with what is wrong

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
    """Read every JSON file below `folder` that halve wrote; one that is malformed is left out, with what is wrong.

    Raises DataError when nothing can be shown.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: name one with records, models, or a study")
    contents = Contents()
    for path in files_below(folder, ".json"):
        place = path.relative_to(folder)
        unfinished = any(is_scratch_name(part) or part.startswith(".") for part in place.parts[:-1])
        if unfinished or path.name.startswith(_PASSED_OVER):
            continue
        try:
            _sort_in(contents, place, path)
        except DataError as error:
            contents.left_out[place] = str(error).removeprefix(f"{path} ")
    if not (contents.everything or contents.analyses or contents.manifests):
        why = "".join(f"; {place} {wrong}" for place, wrong in list(contents.left_out.items())[:1])
        raise DataError(
            f"{folder}: holds no record, no model of halve and no study{why}: make records with --json, or name another folder"
        )
    return contents


def _sort_in(contents: Contents, place: Path, path: Path) -> None:
    value = read_value(path)
    if path.name == "halve.json":
        check_type(value, Manifest, path)
        contents.manifests[place.parent] = value
    elif path.name == "layers.json" and is_analysis(value):
        check_analysis(value, path)
        contents.analyses[place] = value
    elif looks_like_record(value):
        check_record(value, path)
        kinds = {"search": contents.searches, "reproduction": contents.reproductions}
        kinds.get(value["kind"], contents.records)[place] = value
