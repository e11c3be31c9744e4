"""A folder with one of everything a page can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halve.compression.compress import compress
from halve.measure.records import new_record, write_record
from halve.studies.layers import LayerAnalysis
from tests.common import BENCHMARK

HOSTILE = "<script>alert(1)</script>&\"'"
RTN, GPTQ = {"step": "rtn", "bits": 8}, {"step": "gptq", "bits": 4, "group_size": 16}


def evaluation(model: str, recipe: list[Any], accuracy: float, **more: Any) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "accuracy_ci95": [accuracy - 0.04, accuracy + 0.04], "questions": 500}
    figures |= {"answered": 500, "perplexity": None, "nll_nats_per_token": None, "tokens": None}
    setup = {"task": "multiple-choice", "protocol": "pmi", "template": "race", "data": "exam.jsonl", "chance": 0.25}
    setup |= {"data_sha256": "00", "limit": None, "dtype": "bfloat16", "not_measured": {}}
    return new_record("evaluation", model, command=f"halve evaluate {model}", recipe=recipe, **figures, **setup, **more)


def speed(model: str, recipe: list[Any], nbytes: int, tokens_per_s: float) -> dict[str, Any]:
    figures = {"weight_bytes": nbytes, "decode_tokens_per_s": tokens_per_s, "decode_ms_median": 1e3 / tokens_per_s}
    figures |= {"not_measured": {"accuracy": "a benchmark measures speed and memory only"}}
    return new_record("benchmark", model, command="halve benchmark", recipe=recipe, **BENCHMARK | figures)


def trial(fraction: float, accuracy: float, nbytes: int) -> dict[str, Any]:
    return {
        "parameters": {"prune-mlp.fraction": fraction},
        "values": [fraction],
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.05, accuracy + 0.05],
        "bytes": nbytes,
        "objective": nbytes,
        "feasible": accuracy >= 0.5,
        "records": [f"trials/prune-mlp-{fraction:g}.json"],
    }


def write_search(folder: Path) -> None:
    """A search as `halve search` leaves it: search.json and the trials' records."""
    (folder / "trials").mkdir(parents=True)
    trials = [trial(0.1, 0.61, 3_000_000), trial(0.3, 0.52, 2_000_000), trial(0.4, 0.43, 1_500_000)]
    winner = trials[1] | {
        "held_out_accuracy": 0.515,
        "held_out_accuracy_ci95": [0.47, 0.56],
        "confirmed": True,
        "bytes_share": 0.5,
    }
    dense = {"accuracy": 0.64, "accuracy_ci95": [0.6, 0.68], "bytes": 4_000_000, "objective": 4_000_000, "records": []}
    varied = {"name": "prune-mlp.fraction", "low": 0.0, "high": 0.5, "resolution": 0.1, "values": None}
    data = {"name": "exam.jsonl", "questions": 250, "articles": 250}
    record = new_record(
        "search",
        "tiny",
        command="halve search",
        recipe=[{"step": "prune-mlp", "fraction": 0.2}],
        varied=[varied],
        floor={"asked": 0.5, "accuracy": 0.5, "lower_bound": False},
        objective="bytes",
        task="multiple-choice",
        protocol="pmi",
        template="race",
        search_data=data,
        held_out_data=data,
        dense=dense,
        trials=trials,
        winner=winner,
        pareto=trials,
        notes=[f"accuracy is not monotone {HOSTILE}"],
    )
    write_record(folder / "search.json", record)
    for one in trials:
        name = f"tiny {one['parameters']['prune-mlp.fraction']:g}"
        write_record(folder / one["records"][0], evaluation(name, [], one["accuracy"]))


@pytest.fixture(scope="session")
def study(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of three models (one with a hostile name), a compressed model, a search, measured layers."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "records").mkdir()
    (folder / "layers").mkdir()
    records = [
        evaluation("tiny", [], 0.64),
        speed("tiny", [], 4_000_000, 200.0),
        evaluation("tiny-int8", [RTN], 0.63),
        speed("tiny-int8", [RTN], 2_100_000, 250.0),
        evaluation(HOSTILE, [GPTQ], 0.55),
        speed(HOSTILE, [GPTQ], 1_200_000, 280.0),
    ]
    for number, record in enumerate(records):
        write_record(folder / "records" / f"{number}.json", record)
    compress(make_hf("llama"), folder / "models" / "tiny-int8", ["rtn:bits=8"])
    write_search(folder / "search")
    (folder / "layers" / "layers.json").write_text(json.dumps(analysis().as_json()))
    (folder / "unrelated.json").write_text('["not a record"]')
    return folder


def analysis() -> LayerAnalysis:
    import torch

    from halve.compression.distances import Distances, LayerDistances

    pairs = torch.tensor([[0.0, 0.5, 0.6, 0.7], [0.5, 0.0, 0.1, 0.3], [0.6, 0.1, 0.0, 0.2], [0.7, 0.3, 0.2, 0.0]])
    turns = [Distances(0.5, 0.4, 0.3), Distances(0.1, 0.1, 0.05), Distances(0.2, 0.2, 0.1)]
    sublayers = {kind: dict(enumerate(turns)) for kind in ("attention", "mlp")}
    return LayerAnalysis("somewhere/tiny", LayerDistances(pairs, turns, sublayers), pairs, pairs, {"windows": 4})
