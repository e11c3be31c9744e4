"""One self-contained HTML page about everything halve left in a folder. START HERE: `write_page`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from halve._version import __version__
from halve.escapes import plain
from halve.files import check_output_path, write_text
from halve.report import models, studies
from halve.report.blocks import Section
from halve.report.contents import Contents, read_contents

FILE = "report.html"
_HERE = Path(__file__).parent
_SECTIONS = (
    studies.searches,
    studies.reproductions,
    models.results,
    models.distances,
    models.errors,
    models.recipes,
    models.machines,
    models.provenance,
)


def write_page(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    on_left_out: Callable[[str], None] | None = None,
) -> Path:
    """Write a page about the records, models and studies below `folder` to `out` (default: `folder`/report.html).

    Nothing is loaded from anywhere: style and plots (SVG) are inside. Returns the path. What is malformed is left out, and
    named on the page; `on_left_out` is called with a sentence about each. Raises DataError when the folder
    holds nothing to show, OutputError when the page cannot be written.
    """
    folder = Path(folder)
    contents = read_contents(folder)
    if on_left_out is not None:
        for place, wrong in contents.left_out.items():
            on_left_out(f"{folder / place} {wrong}")
    target = check_output_path(folder / FILE if out is None else out, "a page", _is_page)
    write_text(target, render(contents, title or folder.resolve().name))
    return target


def _is_page(file: Path) -> bool:
    return b'<meta name="generator" content="halve ' in file.read_bytes()[:1000]


def render(contents: Contents, title: str) -> str:
    """The page's HTML; everything that comes from a file is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    # lists of options are long words: they may break behind a comma
    environment.filters["breakable"] = lambda text: Markup(str(escape(plain(text))).replace(",", ",<wbr>"))
    sections = [section for section in (make(contents) for make in _SECTIONS) if section.blocks]
    return environment.get_template("report.html.j2").render(
        title=title,
        lead=_lead(contents, sections),
        sections=sections,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        version=__version__,
    )


def _lead(contents: Contents, sections: list[Section]) -> str:
    """How much the page is about, and when it was measured."""
    counts = {
        "record": len(contents.everything),
        "compressed model": len(contents.manifests),
        "search": len(contents.searches),
    }
    parts = [_count(count, noun) for noun, count in counts.items() if count]
    days = sorted(str(r["date"])[:10] for r in contents.everything.values() if r.get("date"))
    when = "" if not days else f", measured on {days[0]}" if days[0] == days[-1] else f", {days[0]} to {days[-1]}"
    return ", ".join(parts or ["measured layers"]) + when


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}es" if noun.endswith("ch") else f"{count} {noun}s"
