"""The page in headless Chromium: no network, no sideways scrolling on a phone, everything readable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from halve.report.page import write_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
WIDTH = 390  # pixels of a phone

# measures the page inside a frame as wide as a phone and writes what it finds into its own title
PROBE = """<!doctype html><title>waiting</title>
<iframe id="phone" src="page.html" style="width:%dpx;height:2000px;border:0"></iframe>
<script>
const frame = document.getElementById("phone");
frame.onload = () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const texts = [...inner.querySelectorAll("svg text")];
  const sizes = texts.map(t => t.getBoundingClientRect().height).filter(h => h > 0);
  const wide = [...inner.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > root.clientWidth + 1 && !e.closest(".scroll") && !e.closest("thead") && !e.closest("svg");
  });
  const heading = inner.querySelector(".cards thead"), value = inner.querySelector(".cards td:not(.name)");
  document.title = JSON.stringify({
    client: root.clientWidth, scroll: root.scrollWidth, body: inner.body.scrollWidth,
    wide: wide.map(e => e.tagName), smallest: Math.min(...sizes), plots: inner.querySelectorAll("svg").length,
    heading: heading.getBoundingClientRect().width, label: frame.contentWindow.getComputedStyle(value, "::before").content,
    resources: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
  });
};
</script>"""


def chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--hide-scrollbars")
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.fixture(scope="module")
def place(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_page(study, folder / "page.html")
    (folder / "probe.html").write_text(PROBE % WIDTH)
    return folder


def test_a_phone_shows_it_without_scrolling_sideways_and_asks_nobody(place: Path) -> None:
    shown = chromium("--window-size=800,2200", "--virtual-time-budget=8000", "--dump-dom", f"file://{place}/probe.html")
    title = re.search(r"<title>(\{.*?\})</title>", shown, re.DOTALL)
    assert title is not None, shown[:500]
    found = json.loads(title[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert found["client"] == WIDTH and found["scroll"] <= WIDTH and found["body"] <= WIDTH, found
    assert found["wide"] == [] and found["resources"] == []
    assert found["plots"] >= 6 and found["smallest"] >= 8.5  # pixels: text in plots is still text
    assert found["heading"] <= 1 and found["label"] != "none"  # rows are cards that carry their headings


def test_the_rendered_page_holds_the_figures(place: Path) -> None:
    shown = chromium("--dump-dom", f"file://{place}/page.html")
    assert "tiny-int8" in shown and "63.0 %" in shown and shown.count("<svg") >= 6 and "<script" not in shown


def test_it_prints(place: Path) -> None:
    target = place / "page.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={target}", f"file://{place}/page.html")
    assert target.read_bytes().startswith(b"%PDF") and target.stat().st_size > 20_000
