"""The GPU benchmark's steps, tried on the CPU with a tiny shape: what they write, leave out and refuse."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from halve.measure.records import read_record
from halve.measure.speed import benchmark as benchmarking
from tools.gpu import steps as gpu
from tools.gpu.models import step_error

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    """A folder for records, and a bandwidth that takes no time to measure."""
    monkeypatch.setattr(benchmarking, "bandwidth_gb_per_s", lambda device: 8.0)
    return gpu.Run(tmp_path / "records", "cpu", "tiny", quick=True)


def test_rows_are_what_they_say(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in gpu.ROWS_3B}
    chosen = [rows[name] for name in ("3b-bf16", "3b-int4-head8", "3b-int4-head8-inputs-10", "3b-bf16-mlp-20")]
    run.rows(chosen, "3b")
    made = {row.name: read_record(run.out / f"{row.name}.json") for row in chosen}
    # 2 layers: q, o 256 x 256; k, v 128 x 256; gate, up, down 512 x 256; two norms; a tied embedding 512 x 256, a final norm
    linears = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert made["3b-bf16"]["weight_bytes"] == 2 * (linears + 4 * 256 + 512 * 256 + 256)
    # half a byte and a 2-byte scale for 128; the head in bytes with 512 scales, and the embedding besides
    packed = linears // 2 + linears // 128 * 2 + 512 * 256 + 512 * 2
    assert made["3b-int4-head8"]["weight_bytes"] == packed + 2 * (4 * 256 + 512 * 256 + 256)
    pruned = made["3b-int4-head8-inputs-10"]
    assert pruned["recipe"][0] == {"step": "l1-inputs", "fraction": 0.1} and pruned["baseline"] == "3b-int4-head8"
    assert made["3b-bf16-mlp-20"]["weight_bytes"] < made["3b-bf16"]["weight_bytes"]
    assert all(record["decode_ms_median"] > 0 and record["random_weights"] for record in made.values())
    monkeypatch.setattr(gpu, "measure_row", None)  # what is there is not measured again
    run.rows(chosen, "3b")
    gpu.pack(run)
    with tarfile.open(run.out.with_suffix(".tar.gz")) as archive:
        assert set(archive.getnames()) == {f"{name}.json" for name in made}


def test_both_models_of_a_comparison_have_the_same_weights(run: gpu.Run) -> None:
    error, kernel = step_error(gpu.Row("tiny", "tiny", bits=8, kept_inputs=0.5), run.placement)
    assert error == 0 and "fused" not in kernel


def test_a_pruned_row_that_saves_no_memory_is_found(run: gpu.Run) -> None:
    for name, peak, baseline in (("whole", 100, None), ("better", 90, "whole"), ("worse", 100, "whole")):
        record = {"model": name, "peak_memory_bytes": peak, "baseline": baseline}
        (run.out / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"did not go down: worse$"):
        gpu.check(run)
