"""The picture of a search, read back from its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halve.measure.pictures import Painter, new_figure
from halve.studies.search.plot import by_objective, by_option, write_plot


def trial(fraction: float, nbytes: float, accuracy: float) -> dict[str, Any]:
    return {
        "parameters": {"rtn.fraction": fraction},
        "objective": nbytes,
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.1, accuracy + 0.1],
        "feasible": accuracy >= 0.5,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    trials = [trial(0.1, 3e6, 0.75), trial(0.2, 2e6, 0.5), trial(0.3, 1e6, 0.25)]
    return {
        "model": "tiny",
        "objective": "bytes",
        "varied": [{"name": "rtn.fraction"}],
        "floor": {"accuracy": 0.5},
        "dense": {"accuracy": 0.8, "objective": 4e6},
        "trials": trials,
        "pareto": trials[::-1],
        "winner": trials[1] | {"held_out_accuracy": 0.6, "held_out_accuracy_ci95": [0.5, 0.7]},
    }


def painted(paint: Painter) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """The points of everything that the legend names, and the x axis' label."""
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        points = {}
        for handle, name in zip(handles, labels, strict=True):
            line: Any = handle[0] if isinstance(handle, tuple) else handle  # points with intervals are a tuple
            points[name] = list(zip(*(map(float, values) for values in line.get_data()), strict=True))
        return points, axes.get_xlabel()


def test_everything_is_where_the_record_says(record: dict[str, Any]) -> None:
    points, label = painted(by_objective(record))
    assert label == "weights on disk (MB)"
    assert points.pop("floor") == [(0.0, 50.0), (1.0, 50.0)]
    assert points.pop("dense") == [(4.0, 80.0)]
    assert points == {
        "Pareto front": [(1.0, 25.0), (2.0, 50.0), (3.0, 75.0)],
        "clears the floor": [(3.0, 75.0), (2.0, 50.0)],
        "does not": [(1.0, 25.0)],
        "winner": [(2.0, 50.0)],
        "winner, held out": [(2.0, 60.0)],
    }
    points, label = painted(by_option(record, "rtn.fraction"))
    assert label == "rtn.fraction" and points["clears the floor"] == [(0.1, 75.0), (0.2, 50.0)]
    assert not {"Pareto front", "dense"} & points.keys()  # dense has no value of the option


def test_kl_stands_on_a_log_axis_without_the_dense_model_which_is_zero_from_itself(record: dict[str, Any]) -> None:
    def of_text(value: Any) -> Any:
        if isinstance(value, list):
            return [of_text(one) for one in value]
        if isinstance(value, dict):
            names = {"accuracy": "kl_nats_per_token", "accuracy_ci95": "kl_nats_per_token_interval"}
            names |= {f"held_out_{key}": f"held_out_{new}" for key, new in names.items()}
            return {names.get(key, key): of_text(one) for key, one in value.items()}
        return value

    record = of_text(record)
    record["floor"]["figure"], record["dense"]["kl_nats_per_token"] = "kl", 0.0
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        by_objective(record)(axes)
        assert axes.get_yscale() == "log" and axes.get_ylabel() == "KL (nats/token)"
    points, _ = painted(by_objective(record))
    assert "dense" not in points and points["floor"] == [(0.0, 0.5), (1.0, 0.5)]
    assert points["does not"] == [(1.0, 0.25)] and points["winner, held out"] == [(2.0, 0.6)]
    record["trials"][0]["kl_nats_per_token"] = 0.0  # a trial that changed nothing
    record["trials"][0]["kl_nats_per_token_interval"] = [0.0, 0.0]
    with new_figure((4, 3)) as figure:
        axes = figure.subplots()
        by_objective(record)(axes)
        assert axes.get_yscale() == "linear"


def test_where_bytes_are_the_limit_it_stands_on_their_axis(record: dict[str, Any]) -> None:
    for row in [*record["trials"], record["dense"], record["winner"]]:
        row["bytes"], row["objective"] = row["objective"], row["accuracy"]
    record |= {"objective": "accuracy", "floor": {"figure": "bytes", "bytes": 2.5e6}}
    points, label = painted(by_objective(record))
    assert label == "weights on disk (MB)" and points.pop("limit") == [(2.5, 0.0), (2.5, 1.0)] and "floor" not in points
    assert points["Pareto front"] == [(1.0, 25.0), (2.0, 50.0), (3.0, 75.0)] and points["dense"] == [(4.0, 80.0)]


def test_records_of_earlier_searches_are_read_and_drawn(tmp_path: Path) -> None:
    from halve import write_page
    from halve.measure.records import read_record

    place = Path(__file__).resolve().parents[3] / "benchmarks/results/search/reader-95-prune-gptq.json"
    old = read_record(place)
    assert "figure" not in old["floor"]
    points, label = painted(by_objective(old))
    assert len(points["clears the floor"]) + len(points["does not"]) == len(old["trials"]) and label.startswith(
        "weights"
    )
    (tmp_path / "search.json").write_text(place.read_text())
    page = write_page(tmp_path).read_text()
    assert "accuracy, held out" in page and f"All {len(old['trials'])} trials" in page


def test_milliseconds_keep_their_unit_and_a_search_may_have_no_winner(record: dict[str, Any], tmp_path: Path) -> None:
    record |= {"objective": "ms", "winner": None}
    points, label = painted(by_objective(record))
    assert label == "decode (ms a token)" and points["does not"] == [(1e6, 25.0)] and "winner" not in points
    write_plot(record, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
