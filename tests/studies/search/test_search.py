"""Searches end to end on a small model: what they find, write, refuse, and how they share work and survive."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from halve import CalibrationOptions, EvaluationOptions, SearchOptions, search
from halve.checkpoint.reader import load_model, open_checkpoint
from halve.compression.compress import compress
from halve.errors import DataError, HalveError, OutputError, RecipeError
from halve.kernels import cpu
from halve.measure.records import read_record
from halve.studies.search import outcome
from halve.studies.search.options import Floor
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow

ONE = {"steps": ["l1-inputs"], "vary": ["l1-inputs.fraction=0..0.9"], "floor": 0.6, "resolution": 0.05}
SEVERAL = {
    "steps": ["rtn:bits=8,targets=*.down_proj", "l1-inputs:ignore=*.down_proj", "l1-outputs:targets=*.o_proj"],
    "vary": ["l1-inputs.fraction=0..0.5", "l1-outputs.fraction=0..0.5"],
    "floor": "70%",
    "resolution": 0.1,
    "trials": 8,
}

WORDS = "the a cat dog sat ran on mat and then red blue bird sang to in house tree big small".split()


@dataclass(frozen=True)
class Subject:
    """A model folder, and the exam it is asked."""

    model: Path
    exam: Path

    @property
    def evaluation(self) -> EvaluationOptions:
        return EvaluationOptions("multiple-choice", self.exam, "continuation", "plain")

    def search(self, out: Path, steps: list[str], vary: list[str], floor: str | float, **asked: Any) -> dict[str, Any]:
        """Search with flat options, as the command line has them."""
        evaluation = EvaluationOptions(asked.pop("task"), self.exam) if "task" in asked else self.evaluation
        calibration = CalibrationOptions(str(asked.pop("calibration", "c4")))
        limit = Floor.parse(floor, asked.pop("floor_lower_bound", False))
        options = SearchOptions(**asked)
        return search(
            self.model, out, steps, vary, floor=limit, evaluation=evaluation, calibration=calibration, options=options
        )


@pytest.fixture(scope="session")
def subject(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A small random model and an exam that it answers without a mistake, so that pruning it costs accuracy."""
    from halve import evaluate

    folder = tmp_path_factory.mktemp("search")
    model = Path(shutil.copytree(make_hf("llama"), folder / "tiny"))
    write_word_tokenizer(model, WORDS)

    draw = random.Random(1)
    items = [
        {
            "id": f"article-{n}",
            "article": " ".join(draw.choices(WORDS, k=14)),
            "questions": ["?"],
            "options": [[" ".join(draw.choices(WORDS, k=3)) for _ in range(4)]],
            "answers": ["A"],
        }
        for n in range(80)
    ]
    exam = folder / "exam.jsonl"
    for letter in "ABCD":  # the answer is what the model says
        for item in items:
            item["answers"] = item["answers"] if "right" in item else [letter]
        exam.write_text("".join(json.dumps({k: v for k, v in i.items() if k != "right"}) + "\n" for i in items))
        found = evaluate(model, task="multiple-choice", data=exam, protocol="continuation", template="plain")
        for item in items:
            if found["answers"][item["id"]] == "1":
                item["right"] = True
    assert all("right" in item for item in items)
    return Subject(model, exam)


WORKER = """
import json, sys, time
from halve import EvaluationOptions, SearchOptions, search
from halve.studies.search import study, trial
model, exam, out, log, wait = *sys.argv[1:5], float(sys.argv[5])
steps, vary, floor, options = json.loads(sys.argv[6])
study.SIGN_S, study.DEAD_S = 0.2, 20.0
real = trial.compress
def compress(model, folder, *rest, **options):
    with open(log, "a") as file:
        file.write(f"{folder.name}\\n")
    time.sleep(wait)
    return real(model, folder, *rest, **options)
trial.compress = compress
evaluation = EvaluationOptions("multiple-choice", exam, "continuation", "plain")
search(model, out, steps, vary, floor=floor, evaluation=evaluation, options=SearchOptions(**options))
"""


def worker(subject: Subject, request: dict, out: Path, log: Path, wait: float) -> subprocess.Popen:
    """A process that searches, writes every compression it begins to `log` and takes `wait` seconds more for each."""
    options = {key: value for key, value in request.items() if key not in ("steps", "vary", "floor")}
    asked = json.dumps([request["steps"], request["vary"], request["floor"], options])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in (subject.model, subject.exam, out, log, wait, asked)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *words], env=environment)


@pytest.fixture(scope="module")
def found(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search of one option."""
    out = tmp_path_factory.mktemp("found") / "out"
    subject.search(out, **ONE)
    return out


def test_the_winner_is_the_last_that_clears_the_floor(found: Path) -> None:
    record = read_record(found / "search.json")
    trials = {row["values"][0]: row for row in record["trials"]}
    winner = record["winner"]
    assert record["dense"]["accuracy"] == 1.0 and winner["accuracy"] >= 0.6
    assert winner["values"][0] == max(value for value, row in trials.items() if row["feasible"])
    beyond = round(winner["values"][0] + 0.05, 10)
    assert beyond > 0.9 or trials[beyond]["accuracy"] < 0.6
    assert winner["bytes"] == min(row["bytes"] for row in trials.values() if row["feasible"])
    assert winner["bytes"] < record["dense"]["bytes"]
    for row in record["trials"]:
        (name,) = row["records"]
        kept = read_record(found / name)
        assert kept["kind"] == "evaluation" and kept["accuracy"] == row["accuracy"]
        assert (
            kept["recipe"][0]["fraction"] == row["values"][0] and kept["disk_bytes"] == row["bytes"] == row["objective"]
        )


def test_the_winner_is_confirmed_on_other_questions(found: Path) -> None:
    record = read_record(found / "search.json")
    asked = read_record(found / record["winner"]["records"][0])
    confirmed = read_record(found / record["winner"]["records"][-1])
    assert not set(asked["answers"]) & set(confirmed["answers"])
    assert len(asked["answers"]) + len(confirmed["answers"]) == 80
    assert confirmed["recipe"] == open_checkpoint(found / "winner").manifest["recipe"]
    low, high = record["winner"]["held_out_accuracy_ci95"]
    assert low < record["winner"]["held_out_accuracy"] == confirmed["accuracy"] < high
    assert record["winner"]["confirmed"] is (confirmed["accuracy"] >= 0.6)


def test_only_the_winner_is_kept_as_a_model(found: Path) -> None:
    assert not [p for p in (found / "trials").iterdir() if p.is_dir()] and not (found / "prefix").exists()
    assert (found / "pareto.png").stat().st_size > 10_000


def test_the_front_holds_what_no_trial_beats(found: Path) -> None:
    record = read_record(found / "search.json")
    for row in record["trials"]:
        better = [
            other
            for other in record["trials"]
            if other["objective"] <= row["objective"]
            and other["accuracy"] >= row["accuracy"]
            and (other["objective"], other["accuracy"]) != (row["objective"], row["accuracy"])
        ]
        same = [f for f in record["pareto"] if (f["objective"], f["accuracy"]) == (row["objective"], row["accuracy"])]
        assert bool(better) is not bool(same)


def test_the_same_call_again_measures_nothing(subject: Subject, found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halve.studies.search import trial

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was compressed or examined again")

    before = read_record(found / "search.json")
    monkeypatch.setattr(trial, "compress", refuse)
    monkeypatch.setattr(trial, "evaluate_loaded", refuse)
    again = subject.search(found, **ONE)
    assert again["trials"] == before["trials"] and again["winner"] == before["winner"]
    with pytest.raises(OutputError, match="another request"):
        subject.search(found, **ONE | {"floor": 0.7})


def test_shared_steps_run_once_and_give_the_same_model(subject: Subject, tmp_path: Path) -> None:
    request = SEVERAL | {"vary": ["l1-outputs.fraction=0.25|0.5"], "trials": None, "resolution": None, "floor": 0.01}
    record = subject.search(tmp_path / "out", **request, keep_checkpoints=True)
    assert (tmp_path / "out" / "prefix" / "halve.json").exists() and record["winner"]["values"] == [0.5]
    steps = [*SEVERAL["steps"][:2], "l1-outputs:targets=*.o_proj,fraction=0.5"]
    compress(subject.model, tmp_path / "whole", steps)
    for kept in (tmp_path / "out" / "winner", tmp_path / "out" / "trials" / "l1-outputs.fraction=0.5"):
        for file in (tmp_path / "whole").glob("*.safetensors"):
            assert file.read_bytes() == (kept / file.name).read_bytes()
        assert read_recipe(kept) == read_recipe(tmp_path / "whole")
    assert any("widen the range" in note for note in record["notes"])


def read_recipe(folder: Path) -> list:
    return json.loads((folder / "halve.json").read_text())["recipe"]


def test_two_processes_share_one_study(subject: Subject, tmp_path: Path) -> None:
    """Bisection and sampler: every point is measured once, by one of them, and both end with the same result."""
    for name, request in (("one", ONE), ("several", SEVERAL)):
        out, logs = tmp_path / name, [tmp_path / f"{name}-{n}.log" for n in (1, 2)]
        for process in [worker(subject, request, out, log, 0.2) for log in logs]:
            assert process.wait(timeout=240) == 0
        begun = [[line for line in log.read_text().split() if "=" in line] for log in logs]
        record = read_record(out / "search.json")
        labels = ["+".join(f"{k}={v:g}" for k, v in row["parameters"].items()) for row in record["trials"]]
        assert all(begun) and sorted(begun[0] + begun[1]) == sorted(labels), (begun, labels)
        assert record["winner"] is not None
        if name == "several":
            assert len(labels) == 8


def test_a_killed_search_is_finished_by_the_same_call(
    subject: Subject, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halve.studies.search import study

    out, log = tmp_path / "out", tmp_path / "log"
    process = worker(subject, ONE, out, log, 0.5)
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().split()) >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)  # in the middle of the fourth trial
    assert process.wait() == -signal.SIGKILL
    finished = {path.name: path.read_bytes() for path in (out / "trials").glob("*.json") if path.name != "dense.json"}
    assert len(finished) == 3 and not (out / "search.json").exists()
    monkeypatch.setattr(study, "SIGN_S", 0.1)
    monkeypatch.setattr(study, "DEAD_S", 0.5)
    record = subject.search(out, **ONE)
    assert all((out / "trials" / name).read_bytes() == content for name, content in finished.items())
    whole = read_record(found / "search.json")
    assert {row["values"][0]: row["accuracy"] for row in record["trials"]} == {
        row["values"][0]: row["accuracy"] for row in whole["trials"]
    }
    assert record["winner"]["values"] == whole["winner"]["values"]


def test_the_lower_end_of_the_interval_asks_for_more(subject: Subject, found: Path, tmp_path: Path) -> None:
    record = subject.search(tmp_path / "out", **ONE, floor_lower_bound=True)
    assert record["winner"]["accuracy_ci95"][0] >= 0.6
    assert record["winner"]["bytes"] >= read_record(found / "search.json")["winner"]["bytes"]


def test_what_is_timed_has_a_record_of_its_own(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "halve.measure.speed.benchmark.bandwidth_gb_per_s", lambda device: 1.0
    )  # takes seconds, is of no interest here
    request = {"steps": ["drop-layers:count=1,select=deepest"], "vary": ["drop-layers.count=1|2"], "floor": 0.01}
    record = subject.search(tmp_path / "out", **request, minimise="ms")
    for row in record["trials"]:
        speed = read_record(tmp_path / "out" / row["records"][1])
        assert speed["kind"] == "benchmark" and speed["decode_ms_median"] == row["objective"] == row["ms"]


@pytest.mark.parametrize("library", [True, False], ids=["C kernels", "reference"])
@pytest.mark.parametrize("minimise", ["bytes", "memory"])
def test_bytes_are_those_of_the_files_whatever_kernels_run(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: bool, minimise: str
) -> None:
    """With a scale every 4 columns the C kernels hold 8 bits in less than 3, while on disk fewer bits are fewer bytes."""
    if not library:
        monkeypatch.setattr(cpu, "load_library", lambda: "left out")
    request = {"steps": ["rtn:group_size=4"], "vary": ["rtn.bits=3|4|8"], "floor": 0.01, "minimise": minimise}
    record = subject.search(tmp_path / "out", **request, keep_checkpoints=True)
    assert record["objective"] == minimise
    for row in record["trials"]:
        folder = tmp_path / "out" / "trials" / f"rtn.bits={row['values'][0]}"
        stored = sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())
        assert (row["bytes"], row["memory"]) == (stored, load_model(folder).weight_bytes())
        assert row["objective"] == row[minimise]
    assert record["winner"]["objective"] == min(row["objective"] for row in record["trials"])
    if minimise == "bytes":
        assert record["winner"]["values"] == [3]


def test_of_equal_ones_the_smaller_in_files_wins_then_the_more_accurate() -> None:
    rows = [
        {"objective": objective, "bytes": nbytes, "accuracy": accuracy, "values": [value]}
        for value, (objective, nbytes, accuracy) in enumerate(
            [(2, 1, 0.9), (1, 6, 0.9), (1, 5, 0.6), (1, 5, 0.7), (1, 5, 0.7)]
        )
    ]
    assert min(rows, key=outcome.rank)["values"] == [3]
    assert [row["values"] for row in outcome.pareto_front([*rows, rows[3] | {"bytes": 4, "values": [9]}])] == [[1]]
    assert [
        row["values"] for row in outcome.pareto_front([rows[2], rows[3], rows[3] | {"bytes": 4, "values": [9]}])
    ] == [[9]]


def test_nothing_clears_the_floor(subject: Subject, tmp_path: Path) -> None:
    request = {"steps": ["l1-inputs"], "vary": ["l1-inputs.fraction=0.8|0.9"], "floor": 0.99}
    with pytest.raises(HalveError, match=r"none of the 2 trials clears the floor of 99.0%: the best is l1-inputs"):
        subject.search(tmp_path / "out", **request)
    record = read_record(tmp_path / "out" / "search.json")
    assert record["winner"] is None and len(record["trials"]) == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"floor": "50 points"}, HalveError, "give an accuracy above 0"),
        ({"floor": 1.5}, HalveError, "give an accuracy above 0"),
        ({"minimise": "watts"}, HalveError, "minimise 'watts': unknown, use bytes, memory, ms"),
        ({"minimise": "peak_memory"}, HalveError, "minimise 'peak_memory': is now called memory"),
        ({"minimise": "weight_bytes"}, HalveError, "minimise 'weight_bytes': is now called bytes"),
        ({"minimise": "decode_ms"}, HalveError, "minimise 'decode_ms': is now called ms"),
        ({"task": "perplexity"}, HalveError, "the floor is an accuracy"),
        ({"trials": 5}, HalveError, "bisection"),
        ({"search_share": 1.0}, HalveError, "search_share"),
        ({"vary": ["rtn.bits=4|8"]}, RecipeError, "not in the recipe"),
        ({"steps": ["rtn"], "vary": ["rtn.group_size=7|11"], "resolution": None}, RecipeError, "none of its 2 values"),
        (
            {"steps": ["prune-mlp:multiple_of=4"], "vary": ["prune-mlp.damping=0.01..0.1"]},
            RecipeError,
            "vary what changes its size",
        ),
        ({"held_out_data": "EXAM"}, DataError, "are in exam.jsonl as well"),
        ({"held_out_data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        (
            {"steps": ["gptq:group_size=16", "l1-inputs"], "calibration": "EXAM"},
            DataError,
            "are in calibration text exam.jsonl",
        ),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(
    subject: Subject, tmp_path: Path, change: dict, error: type, words: str
) -> None:
    change = {key: subject.exam if value == "EXAM" else value for key, value in change.items()}
    with pytest.raises(error) as caught:
        subject.search(tmp_path / "out", **(ONE | change))
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_floor_above_the_dense_model_is_refused(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(HalveError, match=r"the dense model itself reaches"):
        subject.search(tmp_path / "out", **ONE | {"floor": 0.99}, floor_lower_bound=True)


def test_on_the_command_line(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halve.cli.app import main

    words = ["search", subject.model, tmp_path / "out", "--step", "l1-inputs", "--vary", "l1-inputs.fraction=0.2|0.9"]
    words += ["--floor", "40%", "--task", "multiple-choice", "--data", subject.exam, "--protocol", "continuation"]
    monkeypatch.setattr(sys, "argv", ["halve", *map(str, words), "--template", "plain"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    assert "winner: l1-inputs.fraction=0.2" in printed.out and "no trial has seen" in printed.out
