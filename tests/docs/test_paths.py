"""Every file that a page names exists, so that a move cannot leave the pages behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (PROJECT / "docs").glob("*.md"))]
if (PROJECT / "CONTRIBUTING.md").is_file():
    PAGES.append("CONTRIBUTING.md")
FOLDERS = ("src", "tests", "benchmarks", "tools", "docs")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*\w")
MODULE = re.compile(r"(?<![\w./*-])(?:\w+/)*\w+\.(?:py|c|h|sh)\b")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
# what a command on the page writes
WRITTEN = {
    "benchmarks/results/gpu.tar.gz",
    "benchmarks/results/gpu/peers.json",
    "benchmarks/results/pruning",
}


def missing(page: str, text: str, root: Path = PROJECT) -> list[str]:
    """The paths, module files and links of a page that are not there."""
    paths = [path for path in PATH.findall(text) if path not in WRITTEN and not list(root.glob(path))]
    links = [link for link in LINK.findall(text) if not (root / page).parent.joinpath(link).exists()]
    files = {
        str(file.relative_to(root)) for folder in FOLDERS for file in (root / folder).glob("**/*") if file.is_file()
    }
    named = [name for name in MODULE.findall(text) if "NAME" not in name]  # a file that is to be made
    modules = [name for name in named if not any(file == name or file.endswith(f"/{name}") for file in files)]
    return sorted({*paths, *links, *modules})


# the log tells what was, under the names of its time
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/LOG.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    assert missing(page, (PROJECT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["see `src/halve/model.py`", "`step.py` does it", "(tests/test_step.py)", "[page](gone.md)", "`methods/none.py`"],
)
def test_a_file_that_is_gone_is_found(text: str) -> None:
    assert len(missing("docs/kernels.md", text)) == 1


def test_files_that_exist_are_not_found() -> None:
    text = (
        "`src/halve/model/`, `decoder.py`, (`kernels/csrc/step.c`), benchmarks/results/cpu/*.json and [x](gptq.md#top)."
    )
    assert missing("docs/kernels.md", text) == []
