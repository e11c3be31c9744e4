"""The comparison table, from records made by hand."""

from __future__ import annotations

import csv
import io

import pytest

from halve.errors import DataError
from halve.measure.table import Comparison, compare

MACHINE = {"cpu": "Chip", "cores": 2, "threads": 1}


def base(kind: str, model: str, **figures: object) -> dict[str, object]:
    return {
        "kind": kind,
        "model": model,
        "command": "halve",
        "recipe": [],
        "halve_version": "0.1.0",
        "torch_version": "2.13.0",
        "machine": MACHINE,
        "date": "2026-01-01T00:00:00+00:00",
    } | figures


def speed(model: str, **figures: object) -> dict[str, object]:
    held = {
        "device_name": "Chip",
        "decode_ms_median": 25.0,
        "decode_ms_p10": 24.0,
        "decode_ms_p90": 27.0,
        "decode_tokens_per_s": 39.5,
        "ttft_ms": 300.0,
        "peak_memory_bytes": 2_400_000_000,
        "weight_bytes": 1_850_000_000,
        "floor_share": 0.62,
        "system1": {"latency_ms": 25.95},
        "not_measured": {},
    }
    return base("benchmark", model, **(held | figures))


def exam(model: str, answers: dict[str, str], **figures: object) -> dict[str, object]:
    marks = "".join(answers.values())
    held = {
        "task": "race-h",
        "protocol": "letter",
        "accuracy": marks.count("1") / len(marks),
        "accuracy_ci95": [0.4, 0.7],
        "questions": len(marks),
        "answers": answers,
        "data": "race.jsonl",
        "data_sha256": "00",
        "perplexity": None,
    }
    return base("evaluation", model, **(held | figures))


def perplexity(model: str, value: float | None, **figures: object) -> dict[str, object]:
    held = {"task": "perplexity", "protocol": "windows", "window": 512, "data": "w.txt", "accuracy": None}
    return base("evaluation", model, perplexity=value, **(held | figures))


def texts(comparison: Comparison) -> list[dict[str, str]]:
    return [{column.title: column.text(row) for column in comparison.columns} for row in comparison.rows]


def test_a_model_is_one_row_with_all_that_was_measured() -> None:
    result = compare(
        [
            speed("a/dense/"),
            perplexity("a/dense", 12.3456),
            exam("./a/dense", {"1": "1101"}),
            perplexity("b/int4", 13.0),
        ]
    )
    first, second = texts(result)
    assert first == {
        "model": "dense",
        "latency (ms)": "25.95",
        "tokens/s": "39.5",
        "decode (ms)": "25.00",
        "TTFT (ms)": "300.0",
        "peak memory": "2.4 GB",
        "weights": "1.85 GB",
        "share of floor": "62 %",
        "perplexity": "12.346",
        "accuracy": "75.0 % [40.0, 70.0]",
    }
    assert second["perplexity"] == "13.000"
    assert {v for k, v in second.items() if k not in ("model", "perplexity")} == {"-"}
    assert result.notes == [
        "perplexity: windows, w.txt, window 512",
        "accuracy: race-h, letter, race.jsonl",
        "Speed measured on: Chip, 2 cores, 1 used by PyTorch, torch 2.13.0.",
    ]


def test_rows_keep_the_order_of_the_records() -> None:
    result = compare([perplexity("z", 1.0), perplexity("a", 2.0), speed("z"), speed("m")])
    assert [row["model"] for row in result.rows] == ["z", "a", "m"]


def test_other_protocols_and_windows_are_other_columns() -> None:
    result = compare(
        [
            perplexity("m", 5.0),
            perplexity("m", 6.0, window=256),
            exam("m", {"1": "1"}),
            exam("m", {"1": "0"}, protocol="pmi"),
        ]
    )
    assert [column.title for column in result.columns[1:]] == [
        "perplexity 1",
        "perplexity 2",
        "accuracy 1",
        "accuracy 2",
    ]


def test_the_newest_of_equal_measurements_counts() -> None:
    newer, older = speed("m", ttft_ms=1.0, date="2026-02-01"), speed("m", ttft_ms=2.0, date="2026-01-01")
    for records in ([newer, older], [older, newer]):
        result = compare(records)
        assert [row["ttft_ms"] for row in result.rows] == [1.0]
        assert "1 older records of the same measurement are not shown" in result.notes


def test_other_devices_and_random_weights_are_other_rows() -> None:
    gpu = speed("m", device_name="GPU", ttft_ms=3.0)
    result = compare([speed("m"), gpu, speed("m", random_weights=True), exam("m", {"1": "1"})])
    labels = [row["model"] for row in result.rows]
    assert labels == ["m (device name Chip)", "m (device name GPU)", "m (random weights)"]
    accuracy = [text["accuracy"] for text in texts(result)]
    assert accuracy == ["100.0 % [40.0, 70.0]", "100.0 % [40.0, 70.0]", "-"]
    assert any("not comparable" in note for note in result.notes)


def shown_rows(*records: dict[str, object]) -> list[dict[str, str]]:
    return texts(compare(records))


def test_other_data_of_one_name_are_another_column() -> None:
    result = compare([perplexity("m", 5.0, data_sha256="aa" * 32), perplexity("m", 6.0, data_sha256="bb" * 32)])
    (row,) = texts(result)
    assert (row["perplexity 1"], row["perplexity 2"]) == ("5.000", "6.000")
    assert result.notes[0] == "perplexity 1: windows, w.txt, window 512, sha256 aaaaaaaaaaaa"
    assert "sha256 bbbbbbbbbbbb" in result.csv().splitlines()[0] and "sha256 bbbbbbbbbbbb" in result.markdown()


def test_questions_of_other_data_are_not_compared_with_the_first_row() -> None:
    result = compare([exam("a", {"1": "10"}), exam("b", {"1": "11"}, data_sha256="11")])
    assert [column.title for column in result.columns] == ["model", "accuracy 1", "accuracy 2"]


DTYPES = {"bfloat16": 5.0, "float32": 6.0}


@pytest.mark.parametrize("order", [1, -1])
def test_each_dtype_keeps_its_own_figures(order: int) -> None:
    made = [perplexity("m", value, dtype=dtype, device="cpu") for dtype, value in DTYPES.items()]
    made += [speed("m", dtype=dtype, device="cpu", ttft_ms=100 * value) for dtype, value in DTYPES.items()]
    found = {row["model"]: (row["perplexity"], row["TTFT (ms)"]) for row in shown_rows(*made[::order])}
    assert found == {"m (dtype bfloat16)": ("5.000", "500.0"), "m (dtype float32)": ("6.000", "600.0")}


def test_a_benchmark_is_not_joined_with_the_evaluation_in_another_dtype() -> None:
    made = [perplexity("m", value, dtype=dtype, device="cpu") for dtype, value in DTYPES.items()]
    rows = shown_rows(*made, speed("m", dtype="bfloat16", device="cpu", ttft_ms=9.0))
    found = {row["model"]: (row["perplexity"], row["TTFT (ms)"]) for row in rows}
    assert found == {"m (dtype bfloat16)": ("5.000", "9.0"), "m (dtype float32)": ("6.000", "-")}


def test_columns_say_in_what_each_was_measured() -> None:
    one = [perplexity("m", 6.0, dtype="float32", device="cpu"), speed("m", dtype="bfloat16", device="cpu")]
    result = compare(one)
    (row,) = texts(result)
    assert (row["perplexity"], row["quality in"], row["speed in"]) == ("6.000", "float32, cpu", "bfloat16, Chip")
    assert "Quality measured in float32, speed in bfloat16." in result.notes
    assert "float32, cpu" in result.csv() and "float32, cpu" in result.markdown()
    rows = shown_rows(*one, perplexity("n", 7.0, dtype="bfloat16", device="cuda"))
    assert [row["quality in"] for row in rows] == ["float32, cpu", "bfloat16, cuda"]
    (alike,) = shown_rows(
        perplexity("m", 6.0, dtype="float32", device="cpu"), speed("m", dtype="float32", device="cpu")
    )
    assert "quality in" not in alike


def test_a_folder_made_again_is_another_model() -> None:
    first, second = ([{"step": "rtn", "bits": bits}] for bits in (8, 4))
    rows = shown_rows(perplexity("OUT", 5.0, recipe=first), perplexity("OUT", 6.0, recipe=second))
    assert [(row["model"], row["perplexity"]) for row in rows] == [
        ("OUT (rtn bits=8)", "5.000"), ("OUT (rtn bits=4)", "6.000"),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["task", "protocol", "template", "data", "data_sha256", "window", "limit", "sampling"])
def test_whatever_was_asked_differently_is_another_column(key: str) -> None:
    changed = {"seed": 1} if key == "sampling" else 3 if key in ("window", "limit") else "other"
    result = compare([exam("m", {"1": "1"}), exam("m", {"1": "0"}, **{key: changed})])
    assert [text["accuracy 1"][:5] + text["accuracy 2"][:5] for text in texts(result)] == ["100.00.0 %"]
    assert len(set(result.notes[:2])) == 2


def test_equal_folder_names_are_told_apart_by_their_paths() -> None:
    assert [row["model"] for row in compare([speed("x/m"), speed("y/m")]).rows] == ["x/m", "y/m"]


def test_the_paired_test_is_against_the_first_row() -> None:
    # ten articles of one question, each lost by the first row and won by the second: a difference without any
    # spread, whose exact two-sided sign test has p = 2 / 2^10
    wrong, right = ({str(i): mark for i in range(10)} for mark in "01")
    first, second, third = texts(compare([exam("a", wrong), exam("b", right), exam("c", wrong)]))
    assert first["to the first row"] == "-"
    assert second["to the first row"] == "+100.0 (p = 0.002)"
    assert third["to the first row"] == "+0.0 (p = 1.000)"


def test_answers_to_other_questions_are_not_tested() -> None:
    result = compare([exam("a", {"1": "10"}), exam("b", {"1": "1"})])
    assert "to the first row" not in texts(result)[1]
    assert any(note.startswith("b is not tested against the first row") for note in result.notes)


def test_undefined_accuracy_and_unbounded_perplexity_are_said() -> None:
    silent = exam("m", {"1": "--"}, accuracy=None, accuracy_ci95=None, protocol="system1")
    broken = perplexity("m", None, not_measured={"perplexity": "beyond the range of a float"})
    (row,) = texts(compare([silent, broken]))
    assert row["accuracy"] == "undefined"
    assert row["perplexity"] == "inf"


def test_ratios_only_from_runs_that_took_turns_with_the_first_row() -> None:
    beside = {"models": ["a", "b"], "decode_speed_to_first": 1.7}
    records = [speed("a", side_by_side=beside | {"decode_speed_to_first": 1.0}), speed("b", side_by_side=beside)]
    assert [text["speed to the first row"] for text in texts(compare(records))] == ["1.00x", "1.70x"]
    alone = compare([speed("z"), *records])
    assert all("speed to the first row" not in text for text in texts(alone))


def test_csv_holds_unrounded_values() -> None:
    table = compare([speed("a"), exam("b", {"1": "110"})]).csv()
    first, second = csv.DictReader(io.StringIO(table))
    assert (first["model"], first["peak_memory_bytes"], first["decode_ms_p90"]) == ("a", "2400000000", "27.0")
    assert float(second["accuracy (race-h, letter, race.jsonl)"]) == 2 / 3
    assert second["accuracy_ci95_low (race-h, letter, race.jsonl)"] == "0.4"
    assert second["ttft_ms"] == ""


def test_markdown_and_columns_by_name() -> None:
    chosen = compare([speed("a|b"), perplexity("c", 1.5)]).only(["model", "decode_ms_median"])
    table, _, notes = chosen.markdown().partition("\n\n")
    assert table == "| model | decode (ms) |\n| --- | ---: |\n| a\\|b | 25.00 |\n| c | - |"
    assert notes.startswith("<sub>perplexity: windows, w.txt, window 512</sub>\n\n<sub>Speed measured on: Chip")
    with pytest.raises(DataError, match="no column speed: use some of model, latency_ms"):
        compare([speed("a")]).only(["speed"])


def test_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    compare([speed("dense")]).print()
    out = capsys.readouterr().out
    assert "dense" in out and "39.5" in out and "Speed measured on: Chip" in out


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="no evaluation and no benchmark"):
        compare([base("plan", "m")])
