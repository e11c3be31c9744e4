"""What every record tells of how it came about, and the ranges of figures in records."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

Share = Annotated[float, (0, 1)]
Amount = Annotated[float, (0, 1e18)]
Count = Annotated[int, (0, 2**63)]
Change = Annotated[float, (-1e18, 1e18)]
Interval = tuple[Share, Share]
Bounds = tuple[float | None, float | None]


class Machine(TypedDict, total=False):
    """Where it ran, as far as the system tells (`describe_machine`)."""

    cpu: str | None
    cores: int
    threads: int
    ram_bytes: Count | None
    system: str
    gpu: str | None


class Step(TypedDict):
    """A step of a recipe: its name, and its options beside it."""

    step: str


class Circumstances(TypedDict):
    """On what, with what and how a figure was obtained: the keys of every record."""

    kind: str
    model: str
    command: str
    recipe: list[Step | str]
    date: str
    halve_version: str
    torch_version: str
    versions: dict[str, str]
    commit: str | None
    machine: Machine
    not_finite: NotRequired[dict[str, str]]
