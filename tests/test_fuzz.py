"""Some hundred files changed by a seeded draw are refused in one line, or read to something finite; more in fuzz.py."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from halve.errors import CheckpointError, DataError, HalveError, RecipeError, first_line
from halve.model.vocabulary import check_finite
from tests import fuzz

COUNT = 450


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Sample]:
    return fuzz.make_samples(tmp_path_factory.mktemp("samples"))


def test_whatever_is_in_a_file_is_refused_in_a_line_or_read(samples: dict[str, fuzz.Sample], tmp_path: Path) -> None:
    fates = {number: fuzz.run_mutant(samples, number, tmp_path / "mutant") for number in range(COUNT)}
    escapes = [f"python -m tests.fuzz {number}: {fate}" for number, fate in fates.items() if fate.outcome == "escape"]
    assert not escapes, "\n".join(escapes)
    outcomes = Counter(fate.outcome for fate in fates.values())
    assert outcomes["accepted"] > COUNT // 10 and outcomes["CheckpointError"] > COUNT // 10, outcomes
    assert len({fate.file for fate in fates.values()}) >= 15


def test_what_is_not_changed_is_read(samples: dict[str, fuzz.Sample]) -> None:
    for sample in samples.values():
        for entry in sample.entries:
            entry(sample.folder)


@pytest.mark.parametrize(
    ("kind", "name", "failure"),
    [
        ("dense", "model.safetensors", CheckpointError),
        ("pickled", "pytorch_model.bin", CheckpointError),
        ("tokenizer", "tokenizer.model", CheckpointError),
        ("text.txt", "text.txt", DataError),
        ("recipe.yaml", "recipe.yaml", RecipeError),
    ],
)
def test_no_pipe_is_waited_for(samples, tmp_path: Path, kind: str, name: str, failure: type[HalveError]) -> None:
    folder = tmp_path / "it"
    fuzz.shutil.copytree(samples[kind].folder, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for entry in samples[kind].entries:
        with fuzz.bounded(), pytest.raises(failure, match=r"pipe"):
            entry(folder)


def test_a_number_of_too_many_digits_is_named_with_its_line(samples, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n")
    with pytest.raises(DataError, match=r"text\.jsonl, line 2: .*digits"):
        samples["text.jsonl"].entries[0](tmp_path)


def test_the_words_of_other_libraries_are_cut_short() -> None:
    assert first_line(ValueError("a\nb")) == "a" and first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("a" * 300)) == "a" * 300 and first_line(ValueError("a" * 301)) == "a" * 299 + "…"


def test_scores_that_are_not_finite_are_refused() -> None:
    check_finite(fuzz.torch.zeros(3))
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(HalveError, match="not finite"):
            check_finite(fuzz.torch.tensor([0.0, value]))


def test_faults_of_messages() -> None:
    folder = Path("/x/y")
    assert fuzz.fault("/x/y/config.json: bits=3: use 4", folder) is None
    assert [fuzz.fault(text, folder) for text in ("a\nb=3", "wrong", "=" * 1000)] == [
        "not one line",
        "names nothing",
        "1000 characters",
    ]


def test_what_takes_too_much_is_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    with pytest.raises(fuzz.Escape, match="more than 1 s"), fuzz.bounded():
        while True:
            pass
    with pytest.raises((MemoryError, fuzz.Escape)), fuzz.bounded():
        bytearray(2 * fuzz.MEMORY)
