"""Evaluations and benchmarks of a model that ranks share: the figures of one process, and what each rank held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.measure.quality.evaluate import evaluate
from halve.measure.records import check_record
from halve.measure.speed.benchmark import benchmark
from halve.ranks.collective import ALONE, Ranks
from tests.common import write_lines, write_word_tokenizer
from tests.ranks.processes import on_ranks

WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path]) -> Path:
    model = make_hf("llama")
    write_word_tokenizer(model, WORDS)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [{"text": " ".join(WORDS[(i * k + k) % 60] for i in range(5 + k))} for k in range(1, 6)]
    return write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", *documents)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "article": " ".join(WORDS[k : k + 8]),
            "questions": [WORDS[k], WORDS[k + 1]],
            "options": [[f"{WORDS[k + 3 + o]} {WORDS[k + o]}" for o in range(4)]] * 2,
            "answers": ["A", "C"],
        }
        for k in range(3)
    ]
    return write_lines(tmp_path_factory.mktemp("questions") / "questions.jsonl", *rows)


def evaluated(ranks: Ranks, model: Path, request: dict[str, Any]) -> dict[str, Any]:
    return dict(evaluate(model, ranks=ranks, **request))


FIGURES = (
    "nll_nats_per_token perplexity accuracy kl_nats_per_token base_perplexity same_top_share base_accuracy".split()
)


def check(model: Path, request: dict[str, Any]) -> None:
    expected = evaluated(ALONE, model, request)
    records = on_ranks(2, evaluated, model, request)
    for record in records:
        assert isinstance(record, dict), record
        figures, wanted = (
            {name: of[name] for name in FIGURES if of.get(name) is not None} for of in (record, expected)
        )
        # sums in another order: far from any decision that accuracy counts
        assert figures == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert record["tp"] == 2
        check_record(json.loads(json.dumps(record)), "record")


def test_perplexity(folder: Path, text: Path) -> None:
    check(folder, {"task": "perplexity", "data": text, "protocol": "documents"})


@pytest.mark.parametrize("protocol", ["letter", "continuation", "pmi", "generate"])
def test_questions(folder: Path, questions: Path, protocol: str) -> None:
    check(folder, {"task": "multiple-choice", "data": questions, "protocol": protocol})


def test_against_a_base(folder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    check(other, {"task": "perplexity", "data": text, "protocol": "documents", "base": folder})


def test_one_file_of_a_base_is_written(folder: Path, text: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"task": "perplexity", "data": text, "protocol": "documents"}
    kept = tmp_path / "base.zip"
    assert all(isinstance(r, dict) for r in on_ranks(2, evaluated, folder, {**request, "save_base": kept}))
    assert [path.name for path in tmp_path.iterdir()] == ["base.zip"]
    check(folder, {**request, "base": kept})


def test_progress_is_not_kept(folder: Path, text: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"task": "perplexity", "data": text, "progress_file": tmp_path / "progress.jsonl"}
    on_ranks(2, evaluated, folder, request)
    assert not list(tmp_path.iterdir())


def timed(ranks: Ranks, model: Path) -> dict[str, Any]:
    return dict(benchmark(model, prompt_tokens=4, new_tokens=3, runs=1, long_prompt_tokens=0, ranks=ranks))


def test_a_benchmark_says_what_ranks_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halve.measure.speed.benchmark.bandwidth_gb_per_s", lambda device: 10.0)  # of large buffers
    first, second = on_ranks(2, timed, folder)
    assert first["ranks"] == second["ranks"]
    for own, held in zip((first, second), first["ranks"], strict=True):
        assert (own["weight_bytes"], own["step_weight_bytes"]) == (held["weight_bytes"], held["step_weight_bytes"])
        assert held["read_bytes"] == held["weight_bytes"]  # dense, and nothing is there twice
        assert held["peak_memory_bytes"] > held["weight_bytes"]
        assert own["tp"] == 2
        assert own["command"].endswith("--tp 2")
        check_record(json.loads(json.dumps(own)), "record")


def profiled(ranks: Ranks, model: Path) -> None:
    benchmark(model, ranks=ranks, profile_plot=model / "plot.png")


def test_a_profile_takes_one_process(folder: Path) -> None:
    first, _ = on_ranks(2, profiled, folder)
    assert "profile without --tp" in str(first)


def random_timed(ranks: Ranks, model: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"prompt_tokens": 4, "new_tokens": 3, "runs": 1, "long_prompt_tokens": 0}
    return dict(benchmark(model, **options, random_weights=True, ranks=ranks))


def test_random_weights_of_a_config_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halve.measure.speed.benchmark.bandwidth_gb_per_s", lambda device: 10.0)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    for record in on_ranks(2, random_timed, tmp_path):
        assert [held["read_bytes"] for held in record["ranks"]] == [0, 0]
        assert record["ranks"][0]["weight_bytes"] > 0


def test_perplexity_of_the_real_models(assets: Path) -> None:
    for name in ("stories260K", "babyllama-tok361"):
        check(
            assets / "models" / name,
            {
                "task": "perplexity",
                "data": assets / "data" / "tinystories_317.txt",
                "protocol": "documents",
                "limit": 12,
            },
        )
