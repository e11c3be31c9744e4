"""What is installed: the package whole, with its data and typing marker, and nothing of the instruments and tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from halve import __version__

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from the tracked files alone."""
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    # the C library is optional and takes half a minute: continuous integration builds it
    environment = os.environ | {"CC": "false"}
    subprocess.run([*pip, "-c", "constraints.txt", "-w", str(target), "."], cwd=source, check=True, env=environment)
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file).namelist()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    package = PROJECT / "src/halve"
    modules = {f"halve/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    data = [path for folder in ("kernels/csrc", "demo/reader") for path in (package / folder).iterdir()]
    data += [*package.glob("report/report.*"), package / "py.typed"]
    assert len(data) > 15
    wanted = modules | {f"halve/{path.relative_to(package).as_posix()}" for path in data}
    installed = {name for name in wheel if not re.match(r"halve-[^/]*\.dist-info/|halve/kernels/_cpu\.", name)}
    assert installed == wanted


def test_the_changelog_has_a_section_for_the_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased" and __version__ in sections
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }
