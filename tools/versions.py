"""Constraints for pip at an end of the ranges in pyproject.toml: `python -m tools.versions newest` or `lowest`.

PyTorch is the pinned build at both ends. Needs no package: it runs before any is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def constraints(end: str, project: Path = PROJECT) -> list[str]:
    """The lines of a constraints file. Raises ValueError for a dependency that has no lowest version."""
    pinned = [line for line in (project / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    if end == "newest":
        return pinned
    lowest = []
    with (project / "pyproject.toml").open("rb") as file:
        about = tomllib.load(file)["project"]
    extras = [needed for name, extra in about["optional-dependencies"].items() if name != "dev" for needed in extra]
    for dependency in [*about["dependencies"], *extras]:
        range_ = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", dependency)
        if range_ is None:
            raise ValueError(f"{dependency}: no lowest version: write NAME>=VERSION")
        if range_[1] != "torch":
            lowest.append(f"{range_[1]}=={range_[2]}")
    return pinned + lowest


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1])))
