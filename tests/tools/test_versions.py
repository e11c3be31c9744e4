"""The ends of the ranges: every dependency has a lowest version, PyTorch is the pinned one at both ends."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tools.versions import PROJECT, constraints


def test_both_ends_of_the_ranges() -> None:
    (torch,) = [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert constraints("newest") == [torch]
    first, *lowest = constraints("lowest")
    needed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert first == torch and {line.replace("==", ">=") for line in lowest} >= set(needed) - {"torch>=2.11"}


def test_a_dependency_without_a_lowest_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.0\n")
    about = '[project]\ndependencies = ["numpy"]\n[project.optional-dependencies]\ndata = []\n'
    (tmp_path / "pyproject.toml").write_text(about)
    with pytest.raises(ValueError, match="numpy: no lowest version"):
        constraints("lowest", tmp_path)


def test_the_tests_see_the_installed_package() -> None:
    options = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["pythonpath"] == ["."], "src here would hide what is installed, with its compiled kernels"
