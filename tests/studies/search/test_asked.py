"""A text in two parts that share nothing, and what is refused of one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.errors import DataError, HalveError
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.splits import RUN_WORDS
from halve.studies.search.asked import AskedParts, check_overlaps, exam_of, quality_of
from halve.studies.search.options import Floor, SearchOptions
from tests.common import write_word_tokenizer

WORDS = "the a cat dog sat ran on mat and then red blue bird sang to in house tree big small".split()
LIMIT = Floor(0.1, figure="kl")


def prose(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def model(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = Path(shutil.copytree(make_hf("llama"), tmp_path_factory.mktemp("asked") / "tiny"))
    write_word_tokenizer(folder, WORDS)
    return folder


def asked(
    model: Path, data: Path, protocol: str = "documents", calibration: list[str] | None = None, floor: Floor = LIMIT,
    limit: int | None = None, window: int | None = None, **options: Any,
) -> AskedParts:  # fmt: skip
    evaluation = EvaluationOptions("perplexity", data, protocol, limit=limit, window=window)
    parts = exam_of(
        evaluation,
        SearchOptions(**options),
        floor,
        lambda: calibration,
        open_checkpoint(str(model)).config,
        load_tokenizer(str(model)),
    )
    check_overlaps(parts, "calibration.txt", calibration)
    return parts


def documents(parts: AskedParts) -> tuple[list[str], list[str]]:
    return list(parts.search.articles.values()), list(parts.final.articles.values())


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
@pytest.mark.parametrize("protocol", ["documents", "windows", "joined"])
def test_documents_are_divided_whole_and_those_that_share_content_stay_together(
    model: Path, tmp_path: Path, suffix: str, protocol: str
) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        texts = [prose(draw, draw.randint(30, 60)) for _ in range(draw.randint(4, 16))]
        texts += [f"{prose(draw, 5)} {text} {prose(draw, 3)}" for text in draw.sample(texts, 2)]  # one within another
        draw.shuffle(texts)
        data = tmp_path / f"text{seed}.{suffix}"
        rows = "\n".join(json.dumps({"text": text}) for text in texts)
        data.write_text(rows if suffix == "jsonl" else "<|endoftext|>".join(texts))
        share = draw.uniform(0.2, 0.8)
        parts = asked(model, data, protocol, search_share=share)
        search, final = documents(parts)
        assert sorted(search + final) == sorted(texts) and search and final
        runs = [
            {tuple(words[i : i + RUN_WORDS]) for text in side for words in [text.split()] for i in range(len(words))}
            for side in (search, final)
        ]
        assert not {run for run in runs[0] & runs[1] if len(run) == RUN_WORDS}
        assert parts.search.sha256 != parts.final.sha256
        again = asked(model, data, protocol, search_share=share)
        assert documents(again) == (search, final) and again.search.sha256 == parts.search.sha256


@pytest.mark.parametrize("protocol", ["windows", "joined"])
def test_a_running_text_is_cut_once_between_words(model: Path, tmp_path: Path, protocol: str) -> None:
    draw = random.Random(1)
    for lines in (1, 40):
        data = tmp_path / f"{lines}.txt"
        text = "\n".join(prose(draw, 400 // lines) for _ in range(lines))
        data.write_text(text)
        parts = asked(model, data, protocol, search_share=0.25, window=16)
        (search,), (final,) = documents(parts)
        assert search + final == text and search[-1].isspace()
        assert len(search) == pytest.approx(0.25 * len(text), abs=100)  # a line is shorter
        assert lines == 1 or search.endswith("\n")
        assert parts.search.counts["windows"] == -(-len(search.split()) // 16)
        assert parts.search.counts["windows"] > 5 < parts.final.counts["windows"]


def test_the_limit_is_of_the_search_alone(model: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(prose(draw, 30) for _ in range(12)))
    parts = asked(model, tmp_path / "text.txt", limit=2)
    assert parts.search.counts["documents"] == 2 < parts.final.counts["documents"]


def test_what_cannot_be_divided_is_refused(model: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    story = prose(draw, 40)
    data = tmp_path / "text.txt"
    for content, protocol in (
        (story, "documents"),
        (f"{story}<|endoftext|>{story} on", "documents"),
        ("cat", "windows"),
    ):
        data.write_text(content)
        with pytest.raises(DataError, match=r"text\.txt: its \d documents? ?.*cannot be divided"):
            asked(model, data, protocol)


def test_a_part_of_one_document_has_no_interval(model: Path, tmp_path: Path) -> None:
    draw = random.Random(4)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(prose(draw, 30) for _ in range(2)))
    with pytest.raises(DataError, match="no interval follows"):
        asked(model, tmp_path / "text.txt", floor=Floor(0.1, lower_bound=True, figure="kl"))


def test_overlaps_with_the_final_test_or_the_calibration_text_are_refused_or_left_out(
    model: Path, tmp_path: Path
) -> None:
    draw = random.Random(5)
    stories = [prose(draw, 40) for _ in range(9)]
    data, held = tmp_path / "text.txt", tmp_path / "held.txt"
    data.write_text("<|endoftext|>".join(stories[:5]))
    held.write_text("<|endoftext|>".join(stories[4:]))
    with pytest.raises(DataError, match=r"held\.txt: 1 of its 5 articles are in text\.txt .*the first is document 1"):
        asked(model, data, held_out_data=held)
    search, final = documents(asked(model, data, held_out_data=held, leave_out_shared=True))
    assert (search, final) == (stories[:4], stories[4:])
    with pytest.raises(DataError, match=r"1 of its .* articles are in calibration text calibration\.txt"):
        asked(model, data, calibration=[stories[0]])
    search, final = documents(asked(model, data, calibration=[stories[0]], leave_out_shared=True))
    assert sorted(search + final) == sorted(stories[1:5])
    with pytest.raises(DataError, match="all of its articles are in the calibration text"):
        asked(model, data, calibration=stories, leave_out_shared=True)


def test_a_running_text_is_refused_for_a_paragraph_not_for_a_phrase(model: Path, tmp_path: Path) -> None:
    draw = random.Random(6)
    paragraphs = [prose(draw, 50) for _ in range(8)]
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(paragraphs))
    phrase = " ".join(paragraphs[2].split()[:RUN_WORDS])
    asked(model, data, "windows", calibration=[f"{phrase} {prose(draw, 40)}"])
    for place in (1, 6):
        with pytest.raises(DataError, match=r"part: 1 of its paragraphs are in calibration text .*the first begins '"):
            asked(model, data, "windows", calibration=[f"{prose(draw, 40)}\n{paragraphs[place].upper()}.\n"])


def test_a_limit_that_the_task_does_not_measure_is_refused() -> None:
    text, exam = EvaluationOptions("perplexity", "x.txt"), EvaluationOptions("multiple-choice", "x.jsonl")
    assert quality_of(text, LIMIT) == ("kl", "same-top") and quality_of(exam, Floor(0.5)) == ("accuracy",)
    assert quality_of(exam, Floor(10, figure="bytes")) == ("accuracy",)
    with pytest.raises(HalveError, match="the floor is an accuracy, which a text does not give"):
        quality_of(text, Floor(0.5))
    with pytest.raises(HalveError, match=r"max_kl 0\.1: is measured on a text, .* use task kl"):
        quality_of(exam, LIMIT)
    with pytest.raises(DataError, match="task kl has no data of its own"):
        quality_of(EvaluationOptions("perplexity"), LIMIT)
