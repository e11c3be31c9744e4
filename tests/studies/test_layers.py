"""The tables and the plot of `analyse_layers`, on a real model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from halve.checkpoint.reader import Checkpoint
from halve.errors import DataError, HalveError, OutputError
from halve.studies.layers import FILES, analyse_layers


def test_tables_agree_and_every_run_is_there(assets: Path, tmp_path: Path, monkeypatch) -> None:
    model, data = assets / "models" / "stories260K", assets / "data" / "tinystories_317.txt"
    read, original = [], Checkpoint.block
    monkeypatch.setattr(Checkpoint, "block", lambda self, i, *rest: read.append(i) or original(self, i, *rest))
    found = analyse_layers(model, data, tmp_path / "out", samples=4, window=64, mark=2)
    assert read == [0, 1, 2, 3, 4]  # one pass
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    with (tmp_path / "out" / "distances.csv").open() as file:
        runs = {(int(r["start"]), int(r["count"])): r for r in csv.DictReader(file)}
    assert set(runs) == {(start, count) for count in range(1, 6) for start in range(6 - count)}
    with (tmp_path / "out" / "sublayers.csv").open() as file:
        parts = {(int(r["layer"]), r["part"]): r for r in csv.DictReader(file)}
    assert set(parts) == {(layer, part) for layer in range(5) for part in ("attention", "mlp", "layer")}
    for layer in range(5):
        for column in ("last_token", "all_tokens"):
            assert float(parts[layer, "layer"][column]) == pytest.approx(float(runs[layer, 1][column]), rel=1e-4)
            assert 0 < float(parts[layer, "attention"][column]) < 1
    two = [float(runs[start, 2]["last_token"]) for start in range(4)]
    saved = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert saved["best_first_layer"]["2"] == two.index(min(two)) == found.best()[2]
    assert saved["data"]["tokens"] == 4 * 64
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_analysed_is_refused(assets: Path, tmp_path: Path) -> None:
    model, data = assets / "models" / "stories260K", assets / "data" / "tinystories_317.txt"
    with pytest.raises(HalveError, match="mark=5"):
        analyse_layers(model, data, tmp_path / "out", mark=5)
    with pytest.raises(DataError, match="no such file"):
        analyse_layers(model, tmp_path / "none.txt", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        analyse_layers(model, data, tmp_path / "file" / "out", samples=1, window=16)


def test_tables_never_replace_what_is_not_ours(assets: Path, tmp_path: Path) -> None:
    model, data = tmp_path / "m", assets / "data" / "tinystories_317.txt"
    shutil.copytree(assets / "models" / "stories260K", model)
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(OutputError, match="model's own folder"):
        analyse_layers(model, data, model, samples=1, window=16)
    assert sorted(path.name for path in model.iterdir()) == before
    for name in FILES:
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(OutputError, match="which halve did not write"):
            analyse_layers(model, data, out, samples=1, window=16)
        assert (out / name).read_text() == "{}"
    for _ in range(2):  # made again, it is replaced
        analyse_layers(model, data, tmp_path / "twice", samples=1, window=16)
