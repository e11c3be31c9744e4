"""Searches on a text end to end: models are compared with the dense one's kept predictions."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halve import EvaluationOptions, SearchOptions, evaluate, search, write_page
from halve.errors import HalveError, OutputError
from halve.measure.records import read_record
from halve.studies.search import trial
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow

WORDS = "the a cat dog sat ran on mat and then red blue bird sang to in house tree big small".split()
ONE = {"steps": ["l1-inputs"], "vary": ["l1-inputs.fraction=0..0.8"], "resolution": 0.1}
SEVERAL = {
    "steps": ["rtn:targets=*.down_proj", "l1-inputs:ignore=*.down_proj"],
    "vary": ["rtn.bits=4|8", "l1-inputs.fraction=0..0.4"],
    "resolution": 0.1,
    "trials": 6,
}


@pytest.fixture(scope="module")
def world(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model and two texts of some stories."""
    folder = tmp_path_factory.mktemp("text-search")
    shutil.copytree(make_hf("llama"), folder / "tiny")
    write_word_tokenizer(folder / "tiny", WORDS)
    draw = random.Random(1)
    for name in ("text.txt", "held.txt"):
        stories = (" ".join(draw.choices(WORDS, k=draw.randint(25, 40))) for _ in range(8))
        (folder / name).write_text("<|endoftext|>".join(stories))
    return folder


def run(world: Path, out: Path, steps: list[str], vary: list[str], **asked: Any) -> dict[str, Any]:
    """Search with flat options, as the command line has them."""
    limit = {
        key: asked.pop(key) for key in ("max_kl", "min_same_top", "max_bytes", "floor_lower_bound") if key in asked
    }
    evaluation = EvaluationOptions("perplexity", world / "text.txt", asked.pop("protocol", "documents"))
    options = SearchOptions(**{"held_out_data": world / "held.txt"} | asked)
    return search(world / "tiny", out, steps, vary, **limit, evaluation=evaluation, options=options)


def exact(world: Path, model: Path, data: str) -> Any:
    """An evaluation of the same with the dense model itself in memory."""
    return evaluate(
        model, task="perplexity", protocol="documents", data=world / data, base=world / "tiny"
    )  # fmt: skip


@pytest.fixture(scope="module")
def most(world: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """A KL that some of the trials keep: that of a fraction of 0.4."""
    from halve import compress

    place = tmp_path_factory.mktemp("half") / "half"
    compress(world / "tiny", place, ["l1-inputs:fraction=0.4"])
    return 1.001 * exact(world, place, "text.txt")["kl_nats_per_token"]


@pytest.fixture(scope="module")
def found(world: Path, most: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search that has kept its models."""
    out = tmp_path_factory.mktemp("found") / "out"
    run(world, out, **ONE, max_kl=most, keep_checkpoints=True)
    return out


def test_the_winner_is_the_smallest_within_the_kl(world: Path, found: Path, most: float) -> None:
    record = read_record(found / "search.json")
    dense, winner = record["dense"], record["winner"]
    assert dense["kl_nats_per_token"] == dense["held_out_kl_nats_per_token"] == 0.0 and dense["same_top_share"] == 1.0
    for row in record["trials"]:
        assert row["feasible"] is (row["kl_nats_per_token"] <= most)
        low, high = row["kl_nats_per_token_interval"]
        assert 0 <= low <= row["kl_nats_per_token"] <= high
    kept = [row for row in record["trials"] if row["feasible"]]
    assert 0 < len(kept) < len(record["trials"]) and winner["bytes"] == min(row["bytes"] for row in kept)
    assert winner["confirmed"] is (winner["held_out_kl_nats_per_token"] <= most)
    assert record["floor"]["figure"] == record["task"] == "kl" and record["floor"]["kl_nats_per_token"] == most
    assert (record["search_data"]["name"], record["search_data"]["documents"]) == ("text.txt", 8)


def test_figures_are_those_of_an_evaluation_against_the_model_itself(world: Path, found: Path) -> None:
    """Kept logarithms are off by 2^-17 of their range at most, 1e-4 where it is 13 nats; KL changes by less than that times
    the sum of p |log p/q| + |p - q|, which is below 3 here."""
    record = read_record(found / "search.json")
    for row in record["trials"]:
        model = found / "trials" / f"l1-inputs.fraction={row['values'][0]:g}"
        other = exact(world, model, "text.txt")
        assert row["kl_nats_per_token"] == pytest.approx(other["kl_nats_per_token"], abs=3e-4)
        assert row["same_top_share"] == pytest.approx(other["same_top_share"], abs=1 / other["positions"])
    other = exact(world, found / "winner", "held.txt")
    assert record["winner"]["held_out_kl_nats_per_token"] == pytest.approx(other["kl_nats_per_token"], abs=3e-4)
    assert max(row["kl_nats_per_token"] for row in record["trials"]) > 0.01


def test_kl_of_kept_tokens_is_told_to_be_a_lower_bound(
    world: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from halve.cli import terminal

    monkeypatch.setattr("halve.studies.search.asked.BASE_TOKENS", 5)
    monkeypatch.setattr(trial, "BASE_TOKENS", 5)
    record = run(
        world, tmp_path / "out", **ONE | {"vary": ["l1-inputs.fraction=0.2|0.8"], "resolution": None}, max_kl=9
    )
    whole = {row["values"][0]: row["kl_nats_per_token"] for row in read_record(found / "search.json")["trials"]}
    assert record["kept_tokens"] == 5
    for row in record["trials"]:
        assert row["kl_nats_per_token"] < whole.get(row["values"][0], 9)
    terminal.search(record, tmp_path / "out")
    assert "KL is a lower bound, from the dense model's 5 most probable tokens" in capsys.readouterr().out


def test_the_same_call_again_measures_nothing(
    world: Path, found: Path, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was compressed or examined again")

    before = read_record(found / "search.json")
    monkeypatch.setattr(trial, "compress", refuse)
    monkeypatch.setattr(trial, "evaluate_loaded", refuse)
    again = run(world, found, **ONE, max_kl=most, keep_checkpoints=True)
    assert again["trials"] == before["trials"] and again["winner"] == before["winner"]
    with pytest.raises(OutputError, match="another request"):
        run(world, found, **ONE, max_kl=2 * most)
    with pytest.raises(OutputError, match="another request"):
        run(world, found, **ONE, min_same_top=0.9)


def test_an_interrupted_search_goes_on_and_leaves_no_predictions_behind(
    world: Path, found: Path, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halve.studies.search import study

    class Killed(BaseException):
        """What no handler in the search takes."""

    out, begun, real = tmp_path / "out", [], trial.compress

    def compress(model: Any, folder: Any, *rest: Any, **options: Any) -> Any:
        begun.append(folder.name)
        if len(begun) == 3:
            raise Killed
        return real(model, folder, *rest, **options)

    monkeypatch.setattr(trial, "compress", compress)
    with pytest.raises(Killed):
        run(world, out, **ONE, max_kl=most)
    monkeypatch.setattr(study, "DEAD_S", -1.0)  # whoever holds a claim between two trials is dead, however fast this is
    assert (out / "trials" / "dense.base").exists() and not (out / "search.json").exists()
    dense = (out / "trials" / "dense.json").read_bytes()
    record = run(world, out, **ONE, max_kl=most)
    whole = read_record(found / "search.json")
    assert {row["values"][0]: row["kl_nats_per_token"] for row in record["trials"]} == {
        row["values"][0]: row["kl_nats_per_token"] for row in whole["trials"]
    }
    assert (out / "trials" / "dense.json").read_bytes() == dense
    assert not list(out.rglob("*.base")) and not [p for p in (out / "trials").iterdir() if p.is_dir()]
    # a record that is lost is made again, and the predictions it needs with it
    (out / "winner-held-out.json").unlink()
    again = run(world, out, **ONE, max_kl=most)
    assert again["winner"] == record["winner"]


WORKER = """
import json, sys, time
from pathlib import Path
from halve.studies.search import study, trial
from tests.studies.search.test_text_search import SEVERAL, run
study.SIGN_S, study.DEAD_S = 0.2, 20.0
world, out, log, most = *map(Path, sys.argv[1:4]), float(sys.argv[4])
real = trial.compress
def compress(model, folder, *rest, **options):
    with open(log, "a") as file:
        file.write(f"{folder.name}\\n")
    time.sleep(0.2)
    return real(model, folder, *rest, **options)
trial.compress = compress
run(world, out, **SEVERAL, max_kl=most)
"""


def test_two_processes_share_a_search_of_several_options(world: Path, most: float, tmp_path: Path) -> None:
    out, logs = tmp_path / "out", [tmp_path / "1.log", tmp_path / "2.log"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [[sys.executable, "-c", WORKER, world, out, log, repr(most)] for log in logs]
    for process in [subprocess.Popen(one, env=environment) for one in words]:
        assert process.wait(timeout=500) == 0
    begun = [line for log in logs if log.exists() for line in log.read_text().split() if "=" in line]
    record = read_record(out / "search.json")
    trials = record["trials"]
    labels = ["+".join(f"{k}={v:g}" for k, v in row["parameters"].items()) for row in trials]
    assert sorted(begun) == sorted(labels) and len(labels) == 6
    kept = [row for row in trials if row["kl_nats_per_token"] <= most]
    assert record["winner"]["bytes"] == min(row["bytes"] for row in kept)
    for row in trials:  # the front holds what no trial beats in both
        beaten = [
            other
            for other in trials
            if other["bytes"] <= row["bytes"]
            and other["kl_nats_per_token"] <= row["kl_nats_per_token"]
            and (other["bytes"], other["kl_nats_per_token"]) != (row["bytes"], row["kl_nats_per_token"])
        ]
        assert bool(beaten) is (row["values"] not in [one["values"] for one in record["pareto"]])
    page = write_page(out).read_text()
    assert "KL, held out" in page and "KL at most" in page and "6 trials" in page


def test_the_share_of_the_same_top_token_is_a_limit_too(world: Path, found: Path, tmp_path: Path) -> None:
    shares = sorted(row["same_top_share"] for row in read_record(found / "search.json")["trials"])
    record = run(world, tmp_path / "out", **ONE, min_same_top=shares[len(shares) // 2])
    kept = [row for row in record["trials"] if row["same_top_share"] >= shares[len(shares) // 2]]
    assert record["winner"]["bytes"] == min(row["bytes"] for row in kept)
    assert record["winner"]["held_out_same_top_share"] <= 1 and record["floor"]["figure"] == "same-top"


def test_the_worse_end_of_the_interval_asks_for_more(world: Path, found: Path, most: float, tmp_path: Path) -> None:
    record = run(world, tmp_path / "out", **ONE, max_kl=most, floor_lower_bound=True)
    assert record["winner"]["kl_nats_per_token_interval"][1] <= most
    assert record["winner"]["bytes"] >= read_record(found / "search.json")["winner"]["bytes"]


def test_within_some_bytes_the_least_kl_wins(world: Path, found: Path, tmp_path: Path) -> None:
    whole = read_record(found / "search.json")
    sizes = sorted(row["bytes"] for row in whole["trials"])
    record = run(world, tmp_path / "out", **ONE, max_bytes=sizes[len(sizes) // 2])
    kept = [row for row in record["trials"] if row["bytes"] <= sizes[len(sizes) // 2]]
    winner = record["winner"]
    assert 0 < len(kept) < len(record["trials"]) and record["objective"] == "kl"
    assert winner["kl_nats_per_token"] == winner["objective"] == min(row["kl_nats_per_token"] for row in kept)
    assert winner["bytes"] == max(row["bytes"] for row in kept) and winner["confirmed"] is True
    with pytest.raises(HalveError, match=r"none of the \d trials clears the floor of weights on disk at most 10 B"):
        run(
            world, tmp_path / "none", **ONE | {"vary": ["l1-inputs.fraction=0.5|0.8"], "resolution": None}, max_bytes=10
        )


def test_nothing_is_within_the_kl(world: Path, tmp_path: Path) -> None:
    asked = ONE | {"vary": ["l1-inputs.fraction=0.5|0.8"], "resolution": None}
    with pytest.raises(
        HalveError, match=r"none of the 2 trials clears the floor of KL at most 1e-09 nats/token: the best"
    ):
        run(world, tmp_path / "out", **asked, max_kl=1e-9)
    assert read_record(tmp_path / "out" / "search.json")["winner"] is None
    assert "none: no trial clears the floor" in write_page(tmp_path / "out").read_text()


def on_command_line(world: Path, out: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    from halve.cli.app import main

    asked = ["search", world / "tiny", out, "--step", "l1-inputs", "--vary", "l1-inputs.fraction=0.2|0.5", *words]
    monkeypatch.setattr(sys, "argv", ["halve", *map(str, asked)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task kl --data TEXT", "nothing to keep: give one limit"),
        ("--task kl --data TEXT --max-kl 0.1 --floor 95%", "floor 95% and max_kl 0.1: give one limit"),
        ("--task kl --data TEXT --max-kl 0", "max_kl 0.0: give nats a token above 0"),
        ("--task kl --data TEXT --max-kl nan", "max_kl nan"),
        ("--task kl --data TEXT --min-same-top 1.5", "min_same_top '1.5'"),
        ("--task kl --data TEXT --floor 95%", "the floor is an accuracy, which a text does not give"),
        ("--task kl --max-kl 0.1", "task kl has no data of its own"),
        ("--task kl --data nowhere.txt --max-kl 0.1", "nowhere.txt"),
        ("--task kl --data TEXT --max-kl 0.1 --minimise kl", "minimise 'kl': does not go with max_kl 0.1"),
        ("--task kl --data TEXT --max-kl 0.1 --template plain", "task perplexity has no template"),
        ("--task kl --data TEXT --max-kl 0.1 --protocol pmi", "protocol 'pmi': unknown"),
        ("--task multiple-choice --data TEXT --max-kl 0.1", "max_kl 0.1: is measured on a text"),
        ("--task kl --data TEXT --max-bytes 1MB --floor-lower-bound", "max_bytes 1MB has no interval"),
        ("--task kl --data TEXT --max-kl 0.1 --held-out-data TEXT", "8 of its 8 articles are in text.txt as well"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(
    world: Path,
    tmp_path: Path,
    words: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(trial.LoadedModel, "load", None)
    asked = words.replace("TEXT", str(world / "text.txt")).split()
    assert on_command_line(world, tmp_path / "out", *asked, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--task", "kl", "--data", str(world / "text.txt"), "--max-kl", "100", "--protocol", "documents"]
    assert not on_command_line(world, tmp_path / "out", *words, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "winner: l1-inputs.fraction=0.5" in said and "documents no trial has seen: confirmed, KL at most 100" in said
    assert json.loads((tmp_path / "out" / "search.json").read_text())["task"] == "kl"
