"""The first system's tables made again: whole on small models, resumed, and refused early."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.demo.run import READER
from halve.errors import DataError, HalveError, OutputError
from halve.measure.records import read_record
from halve.measure.speed import benchmark as benchmarking
from halve.measure.speed import timed_model
from halve.measure.speed.timed_model import BenchmarkOptions
from halve.studies.system1 import published, variants
from halve.studies.system1 import reproduce as system1
from halve.studies.system1.protocol import System1Timing
from halve.studies.system1.reproduce import Study, _Run, reproduce_system1
from halve.studies.system1.tables import tables
from halve.studies.system1.variants import OWN, RIGHT, Variant
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow

EXAM = READER / "exam_questions.jsonl"
QUICK = {"data": EXAM, "protocol": "pmi", "limit": 6, "calibration": READER / "calibration.txt", "samples": 2}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few fractions and short timings; the peak memory, which takes a process a model, is made up."""
    monkeypatch.setattr(variants, "FRACTIONS", (0.001, 0.1))
    monkeypatch.setattr(published, "FRACTIONS", (published.FRACTIONS[2], published.FRACTIONS[5]))  # 4 bit in, bf16 out
    monkeypatch.setattr(Study, "timing", lambda self: BenchmarkOptions(8, 3, min(self.runs, 1), 0))
    monkeypatch.setattr(System1Timing, "new_tokens", 5)
    monkeypatch.setattr(timed_model, "peak_memory", lambda *a, **k: {"peak": 123_000_000})
    monkeypatch.setattr(benchmarking, "bandwidth_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr("halve.studies.system1.needs.bandwidth_gb_per_s", lambda device: 10.0)


@pytest.fixture
def opt(make_hf: Callable[..., Path], tmp_path: Path) -> Path:
    """A small OPT with a word tokenizer and questions made of its words."""
    folder = Path(shutil.copytree(make_hf("opt", max_position_embeddings=128), tmp_path / "opt"))
    write_word_tokenizer(folder, "the cat dog sat ran mat . , A B C D : ) ? Question Answer Article".split())
    item = {"questions": ["the cat ?"], "options": [["sat", "ran", "mat", "dog"]], "answers": ["A"]}
    lines = [json.dumps({"id": str(n), "article": "the cat sat . " * (n + 1)} | item) for n in range(3)]
    (tmp_path / "exam.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text("the cat sat , the dog ran . " * 60)
    return folder


def recipe_of(folder: Path) -> list[str]:
    held = json.loads((folder / "halve.json").read_text())["recipe"]
    return [f"{step['step']} {step.get('bits', step.get('fraction'))} {'|'.join(step['targets'])}" for step in held]


def test_the_bundled_reader_from_nothing_to_both_tables_and_again(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MODELS", (*published.MODELS[:2], published.MODELS[4]))  # 4 bit, pruned, and bf16
    out, heard = tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(system1, "benchmark_side_by_side", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # cut off after models and exams, before the speeds
            reproduce_system1(READER, out, on_needs=heard.append, fractions=False, **QUICK)
    assert heard[0].disk_bytes > 4_000_000 and heard[0].seconds > 0 and not (out / "reproduce.json").exists()
    made = {path.name: path.stat().st_mtime_ns for path in (out / "models").iterdir()}
    names = ["4bit", "4bit-inputs-10-all", "4bit-inputs-10-head"]
    assert sorted(made) == names
    own, right = out / "models" / names[2], out / "models" / names[1]
    assert recipe_of(own) == ["gptq 4 Linear", "l1-inputs 0.1 lm_head"]
    assert recipe_of(right) == ["gptq 4 Linear", "l1-inputs 0.1 Linear|lm_head"]
    gptq = json.loads((own / "halve.json").read_text())["recipe"][0]
    assert (gptq["group_size"], gptq["damping"], gptq["act_order"], gptq["symmetric"]) == (128, 0.1, False, True)

    record = reproduce_system1(READER, out, floor=0.2, **QUICK)
    assert {p.name: p.stat().st_mtime_ns for p in (out / "models").iterdir()} == made  # kept, and trials are gone
    assert [row["published"]["latency_ms"] for row in record["models"]] == [25.95, 25.93, 30.78]
    for row in record["models"]:
        assert row["right"]["questions"] == 6 and row["own"]["peak_memory_bytes"] == 123_000_000
        assert row["own"]["latency_ms"] > 0 and row["right"]["tokens_per_s"] > 0
    assert record["models"][1]["own"]["model"] != record["models"][1]["right"]["model"]
    assert record["models"][0]["own"]["model"] == record["models"][0]["right"]["model"] == "4bit"
    for cell in record["fractions"]:
        tried = [point["fraction"] for point in cell["right"]["tried"]]
        assert tried[0] == 0.0 and 0.001 not in tried  # of 128 channels 0.1 % is none, the vocabulary aside
    text = json.dumps(record)
    assert str(tmp_path) not in text.replace(json.dumps(record["command"]), "") and str(READER) not in text

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("everything is done already")

    for name in ("compress", "benchmark_side_by_side", "evaluate_loaded"):
        monkeypatch.setattr(system1, name, fail)
    again = reproduce_system1(READER, out, floor=0.2, **QUICK)
    assert (again["models"], again["fractions"]) == (record["models"], record["fractions"])
    shown = "".join(table.markdown() for _, table in tables(read_record(out / "reproduce.json")))
    assert "| 4 bit, pruned 10 % | published | 25.93 | 43.1 | 3.1 GB |" in shown and "below 0.1 %" in shown


def test_an_opt_with_widths_that_no_group_divides(
    quick: None, opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MODELS", (published.MODELS[1], published.MODELS[4]))  # 4 bit pruned, bf16
    options = {"data": tmp_path / "exam.jsonl", "calibration": tmp_path / "text.txt", "samples": 2, "fractions": False}
    record = reproduce_system1(opt, tmp_path / "out", **options)
    assert record["fractions"] == [] and record["not_measured"]["fractions"] == "not asked for"
    assert [row["right"]["questions"] for row in record["models"]] == [3] * 2
    assert len(tables(record)) == 1


def test_random_weights_fill_speed_and_memory_only(quick: None, make_hf: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copyfile(make_hf("llama", tie_word_embeddings=True) / "config.json", tmp_path / "config.json")
    record = reproduce_system1(tmp_path / "config.json", tmp_path / "out", random_weights=True)
    assert all("accuracy" not in row[way] for row in record["models"] for way in ("own", "right"))
    sizes = [row["own"]["weight_bytes"] for row in record["models"]]
    assert sizes[0] < sizes[2] < sizes[4] and sizes[0] < sizes[1]  # 4 bit, 8 bit, bf16; a pruned head is a copy
    (_, table), *rest = tables(record)
    assert not rest and table.markdown().count("not measured") == 10
    assert record["not_measured"] == {"accuracy": "the weights are random", "fractions": "the weights are random"}
    assert read_record(tmp_path / "out" / "records" / "4bit-speed.json")["random_weights"] is True


def test_the_largest_fraction_is_the_last_before_the_first_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "FRACTIONS", (0.01, 0.1, 0.2, 0.5))
    run = _Run(Study(str(READER), tmp_path), system1.open_checkpoint(READER), None)  # type: ignore[arg-type]
    monkeypatch.setattr(run, "build", lambda variant: READER)
    asked: list[Variant] = []

    def accuracy(variant: Variant, procedure: variants.Procedure) -> dict[str, Any]:
        asked.append(variant)
        return {"accuracy": {0.0: 0.8, 0.01: 0.7, 0.1: 0.6}.get(variant.fraction, 0.5)}

    monkeypatch.setattr(run, "accuracy", accuracy)
    cell = next(c for c in published.FRACTIONS if c.bits is None and c.side == "inputs")
    found = run.largest(cell, RIGHT)
    assert found["largest"] == 0.1  # 0.2 has exactly the floor, which is not above it
    assert [point["fraction"] for point in found["tried"]] == [0.0, 0.01, 0.1, 0.2]
    assert {variant.targets for variant in asked[1:]} == {("Linear", "lm_head")}
    monkeypatch.setattr(run, "accuracy", lambda variant, procedure: {"accuracy": None})
    assert run.largest(cell, OWN) == {"largest": None, "tried": [{"fraction": 0.0, "accuracy": None}]}


def test_what_cannot_do_is_refused_before_any_work(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for options, kind, words in (
        ({"data": tmp_path / "none.jsonl"}, DataError, "none.jsonl"),
        ({"calibration": tmp_path / "none.txt"}, DataError, "none.txt"),
        ({"protocol": "chess"}, HalveError, "chess"),
        ({"floor": 50}, HalveError, "floor 50"),
        ({"samples": 0}, HalveError, "samples 0"),
        ({"runs": 0}, HalveError, "runs=0"),
    ):
        with pytest.raises(kind, match=words):
            reproduce_system1(READER, out, **QUICK | options)
    with monkeypatch.context() as patch:
        patch.setattr("halve.studies.system1.needs.memory_there", lambda device: 1)
        with pytest.raises(HalveError, match=r"cpu has 1 bytes of memory free .*--samples"):
            reproduce_system1(READER, out, **QUICK)
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, 1))  # type: ignore[attr-defined]
        with pytest.raises(OutputError, match=r"the disk has 1 bytes free .*--out"):
            reproduce_system1(READER, out, **QUICK)
    assert not out.exists()
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(OutputError, match="holds no model but precious"):
        reproduce_system1(READER, out, **QUICK)
    assert (out / "precious").exists()


def test_the_command_says_what_it_needs_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halve.cli.app import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halve", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        held = capsys.readouterr()
        return int(stop.value.code or 0), held.out, held.err

    asked = ("--data", EXAM, "--calibration", READER / "calibration.txt", "--out", tmp_path / "out", "--dry-run")
    code, printed, error = call("system1", "--model", READER, *asked)
    assert code == 0 and printed.startswith("needs about ") and "of disk" in printed, error
    assert not (tmp_path / "out").exists()
    code, printed, error = call("system9", "--model", READER)
    assert code == 2 and "system9" in error and not printed
