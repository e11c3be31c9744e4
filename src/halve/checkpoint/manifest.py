"""halve.json: what was done to the model in a folder, with what data, and what it did to every linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from halve.files.typed import check_type, read_value


class StepOptions(TypedDict):
    """A step of a recipe: its name, and its options beside it."""

    step: str


class LinearReport(TypedDict):
    """What a step did to one linear; measures of the error beside it."""

    name: str
    action: str


class StepReport(StepOptions):
    """What a step did, with its options as asked for, and as chosen where the model decided."""

    resolved: NotRequired[StepOptions]
    linear_bytes_before: int
    linear_bytes_after: int
    linears: list[LinearReport]


class CalibrationOrigin(TypedDict, total=False):
    """The text that a model was calibrated on."""

    source: str
    windows: int
    window_tokens: int


class Provenance(TypedDict, total=False):
    """How a model was made: what a measurement of it repeats, and further steps add to."""

    base_model: str
    weight_bytes_before: int
    recipe: list[dict[str, Any]]
    steps: list[dict[str, Any]]


class Manifest(TypedDict):
    """All that halve.json says."""

    base_model: str
    weight_bytes_before: NotRequired[int]  # of the base model
    recipe: list[StepOptions]
    calibration: CalibrationOrigin | None
    steps: list[StepReport]


def read_manifest(path: Path) -> Provenance:
    """How the model beside the file was made. Raises DataError."""
    value = read_value(path)
    check_type(value, Provenance, path)
    return cast(Provenance, value)
