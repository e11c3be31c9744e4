"""The page without a browser: what it holds, that it loads nothing, that nothing from a file becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from halve.errors import DataError, OutputError
from halve.measure.records import new_record, write_record
from halve.report.blocks import PlotsBlock, TableBlock
from halve.report.contents import read_contents
from halve.report.models import results, step_text
from halve.report.page import write_page
from halve.report.plots import Mark, draw, scatter

from .conftest import GPTQ, HOSTILE, RTN, evaluation, speed

VOID = {"meta", "link", "br", "wbr", "use", "path"}


class Outline(HTMLParser):
    """Tags balanced, ids once, text and attributes collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(study, tmp_path_factory.mktemp("page") / "page.html", title=f"A {HOSTILE} title").read_text()


def test_every_part_is_there_and_the_markup_is_whole(page: str) -> None:
    outline = Outline(page)
    assert outline.open == [] and len(outline.ids) == len(set(outline.ids))
    sections = [attrs["id"] for tag, attrs in outline.tags if tag == "section"]
    assert sections == ["search", "results", "layers", "errors", "recipes", "machine", "records"]
    links = [attrs["href"] for tag, attrs in outline.tags if tag == "a"]
    assert links == [f"#{key}" for key in sections]
    pictures = [attrs["aria-label"] or "" for tag, attrs in outline.tags if tag == "svg"]
    assert [p for p in pictures if "against size" in p] and [p for p in pictures if "against speed" in p]
    assert any("angular distance" in p for p in pictures) and any("error of the weight" in p for p in pictures)
    words = "".join(outline.texts)
    for expected in (
        "63.0 %",
        "[59.0, 67.0]",
        "2.1 MB",
        "51.5 % [47.0, 56.0], confirmed",
        "rtn:bits=8",
        "All 3 trials",
    ):
        assert expected in words, expected


def test_nothing_is_loaded_and_nothing_can_run(page: str) -> None:
    outline = Outline(page)
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in outline.tags}
    for tag, attrs in outline.tags:
        assert not any(key.startswith("on") for key in attrs), tag
        for key in ("src", "href", "xlink:href"):
            assert (attrs.get(key) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"@import|url\((?!#)|https?://", page)
    policy = next(a["content"] for t, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_names_from_files_are_text(page: str) -> None:
    assert "<script" not in page
    words = "".join(Outline(page).texts)
    assert words.count(HOSTILE) >= 4  # title, row, recipe, note of the search, label in a plot


def test_the_dense_model_is_the_first_row_and_trials_are_no_rows(study: Path) -> None:
    contents = read_contents(study)
    names = {record["model"] for record in contents.shown().values()}
    assert names == {"tiny", "tiny-int8", HOSTILE, "tiny 0.3"}  # of the trials the winner alone
    text = write_page(study, study.parent / "rows.html").read_text()
    results = text[text.index('id="results"') : text.index('id="layers"')]
    first = re.search(r'<td data-label="model" class="name">(.*?)</td>', results)
    assert first is not None and first[1] == "tiny"


def test_a_folder_of_records_alone(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", evaluation("a", [], 0.5))
    sections = [a["id"] for t, a in Outline(write_page(tmp_path).read_text()).tags if t == "section"]
    assert sections == ["results", "machine", "records"]
    assert (tmp_path / "report.html").is_file()


def test_the_divergence_from_the_dense_model_has_columns_and_a_picture(tmp_path: Path) -> None:
    base = {"model": "dense", "fingerprint": "0123456789ab", "dtype": "bfloat16", "recipe": [], "kept": None}
    models = [("dense", [], 0.0), ("int8", [RTN], 0.001), ("int4", [GPTQ], 0.03), ("broken", ["rtn"], 20.0)]
    for model, recipe, kl in models:
        # of few documents the interval's lower end may lie below 0, which has no place on the axis
        figures = {"base": base, "kl_nats_per_token": kl, "kl_nats_per_token_interval": [kl - 0.002, kl + 0.002]}
        record = evaluation(model, recipe, 0.5, **figures, same_top_share=0.9)
        write_record(tmp_path / f"{model}.json", record)
        write_record(tmp_path / f"{model}-speed.json", speed(model, recipe, len(model) * 1_000_000, 100.0))
    section = results(read_contents(tmp_path))
    (table,) = (block for block in section.blocks if isinstance(block, TableBlock))
    assert {"KL", "same top"} <= set(table.head)
    (plots,) = (block for block in section.blocks if isinstance(block, PlotsBlock))
    (picture,) = (plot for plot in plots.plots if plot.caption.startswith("KL against size"))
    assert not any(plot.caption.startswith(("KL against speed", "same top")) for plot in plots.plots)
    texts = Outline(picture.svg).texts
    # by factors: 0, the dense model's from itself, is no point of it
    assert {"KL (nats/token)", "0.001", "0.1", "10", "int8", "int4", "broken"} <= set(texts) and "dense" not in texts


def test_folders_with_nothing_to_show_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_page(tmp_path / "none")
    with pytest.raises(DataError, match="holds no record"):
        write_page(tmp_path)
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises(DataError, match=r"broken\.json.*JSON"):
        write_page(tmp_path)
    (tmp_path / "broken.json").unlink()
    write_record(tmp_path / "a.json", evaluation("a", [], 0.5))
    with pytest.raises(OutputError, match="is a folder"):
        write_page(tmp_path, tmp_path)


def test_a_page_replaces_a_page_alone(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", evaluation("a", [], 0.5))
    write_page(tmp_path)
    write_page(tmp_path)
    for name in ("config.json", "report.html"):
        (tmp_path / name).write_text("{}" if name == "config.json" else "<!doctype html>mine")
        with pytest.raises(OutputError, match="is not a page that halve wrote"):
            write_page(tmp_path, tmp_path / name)
        assert (tmp_path / name).read_text() in ("{}", "<!doctype html>mine")


def test_unfinished_models_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "model.partial" / "step-1").mkdir(parents=True)
    (tmp_path / "model.partial" / "step-1" / "halve.json").write_text('{"steps": [')
    write_record(tmp_path / "a.json", evaluation("a", [], 0.5))
    assert not read_contents(tmp_path).manifests


def test_a_reproduction_is_shown_with_both_tables(tmp_path: Path) -> None:
    row = {"latency_ms": 5.0, "tokens_per_s": 300.0, "peak_memory_bytes": 2e8, "weight_bytes": 4e6}
    exam = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "answered": 99, "questions": 100}
    found = {"largest": 0.1, "tried": [{"fraction": f, "accuracy": a} for f, a in ((0.0, 0.7), (0.1, 0.6), (0.2, 0.4))]}
    record = new_record(
        "reproduction",
        "tiny",
        recipe=[],
        random_weights=False,
        floor=0.5,
        models=[{"bits": 4, "pruned": 0.1, "published": {"latency_ms": 25.93, "accuracy": 0.533}}
                | dict.fromkeys(("own", "right"), row | exam)],
        fractions=[{"bits": 4, "side": "inputs", "largest": 0.1, "own": found, "right": found}],
        published={"model": "M", "machine": "X", "questions": "Q"},
        exams={},
        device_name="Chip",
        notes=[],
    )  # fmt: skip
    write_record(tmp_path / "reproduce.json", record)
    words = "".join(Outline(write_page(tmp_path).read_text()).texts)
    assert "4 bit, pruned 10 %" in words and "53.3 %" in words and "10 %: 60.0 %; 20 %: 40.0 %" in words


def test_steps_read_as_they_are_written() -> None:
    assert step_text({"step": "rtn", "bits": 8, "group_size": -1, "symmetric": True}) == "rtn:bits=8,group_size=-1"
    step = {"step": "l1-inputs", "fraction": 0.1, "shared": True, "targets": ["a", "b"], "ignore": []}
    assert step_text(step) == "l1-inputs:fraction=0.1,shared=true,targets=a|b"
    assert step_text({"step": "of-another-version", "x": 1}) == "of-another-version"


def test_figures_keep_their_intervals_apart() -> None:
    assert TableBlock.parts("91.8 % [89.4, 94.2]") == ("91.8 %", "[89.4, 94.2]")
    assert TableBlock.parts("-0.4 (p = 0.158)") == ("-0.4", "(p = 0.158)")
    assert TableBlock.parts("undefined") == ("undefined", "")


def test_labels_keep_clear_of_each_other() -> None:
    crowd = [Mark(f"model-{n}", 1.0 + n / 1000, 50.0) for n in range(30)]
    text = draw(scatter(crowd, x="x", y="y"), "a crowd")
    shown = re.findall(r">(model-\d+)<", text)
    assert 1 <= len(shown) < 30  # where names would cover each other some are left out
    assert draw(scatter(crowd[:1], x="$5_x$", y="y"), "one").count("$5_x$") == 1  # text, not mathematics


def test_plots_follow_the_page(page: str) -> None:
    pictures = page[page.index("<svg") : page.rindex("</svg>")]
    assert "currentColor" in pictures and "#0102" not in pictures
    assert "font-family" not in json.dumps(re.findall(r'<text [^>]*style="([^"]*)"', pictures))
