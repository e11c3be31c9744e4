"""Which layers of a model do little: every distance of its residual stream, as tables and as a plot."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor

from halve.checkpoint.reader import check_device, open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.distances import LayerDistances, best_start, measure_every_run
from halve.compression.walk import Walk
from halve.compression.windows import CalibrationOptions, make_windows
from halve.errors import DataError, OutputError
from halve.files import read_object, resolve_out, write_json, write_text
from halve.files.typed import check_type
from halve.studies.layer_plots import write_plots
from halve.texts import read_documents

_Distance = Annotated[float, (0, 1.001)]  # rounded
FILES = ("layers.json", "distances.csv", "sublayers.csv", "layers.png")


@dataclass(frozen=True)
class LayerAnalysis:
    """What `analyse_layers` measured. `last_token` and `all_tokens` float64 [P, P]: d(start, end) between the points
    of the stream before layer `start` and before layer `end` (P = layers + 1)."""

    model: str
    turns: LayerDistances
    last_token: Tensor
    all_tokens: Tensor
    origin: dict[str, object]

    @property
    def layers(self) -> int:
        return self.last_token.shape[0] - 1

    def best(self) -> dict[int, int]:
        """For every count of layers the first of the run that the last token's distance says to drop."""
        return {count: best_start(self.last_token, count) for count in range(1, self.layers)}

    def distances_csv(self) -> str:
        """start, count, last_token, all_tokens: one row for every run of layers."""
        rows = []
        for count in range(1, self.layers + 1):
            for start in range(self.layers - count + 1):
                pair = start, start + count
                rows.append([start, count, f"{self.last_token[pair]:.8g}", f"{self.all_tokens[pair]:.8g}"])
        return _csv(["start", "count", "last_token", "all_tokens"], rows)

    def sublayers_csv(self) -> str:
        """layer, part (attention, mlp, or layer for both), last_token, all_tokens, influence."""
        rows = []
        for index, whole in enumerate(self.turns.layers):
            parts = {kind: turns[index] for kind, turns in self.turns.sublayers.items() if index in turns}
            for part, turn in {**parts, "layer": whole}.items():
                rows.append([index, part, *(f"{v:.8g}" for v in (turn.last_token, turn.all_tokens, turn.influence))])
        return _csv(["layer", "part", "last_token", "all_tokens", "influence"], rows)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the unit in words."""
        return {
            "model": self.model,
            "distance": "arccos(cosine) / pi, mean over windows; float32",
            "data": self.origin,
            "layers": [asdict(turn) for turn in self.turns.layers],
            "sublayers": {
                kind: {str(layer): asdict(turn) for layer, turn in turns.items()}
                for kind, turns in self.turns.sublayers.items()
            },
            "best_first_layer": {str(count): start for count, start in self.best().items()},
            "last_token": self.last_token.tolist(),
            "all_tokens": self.all_tokens.tolist(),
        }


def analyse_layers(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    samples: int = 32,
    window: int = 2048,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    mark: int | None = None,
) -> LayerAnalysis:
    """Measure the distance of every run of layers and of every sublayer on `data`; write FILES into the folder `out`.

    The whole model is in memory, in `dtype`. `mark`: a count of layers whose best run the plot points out. Raises
    HalveError subclasses for a model, data or folder that cannot be used, before any weight is read.
    """
    device = check_device(device)
    checkpoint = open_checkpoint(model)
    folder = _claim(resolve_out(out), checkpoint.folder.resolve())
    layers = len(checkpoint.config.layers)
    if mark is not None and not 1 <= mark < layers:
        raise OutputError(f"mark={mark}: the model has {layers} layers: use 1 to {layers - 1}")
    asked = CalibrationOptions(str(data), samples, min(window, checkpoint.config.max_positions), seed)
    calibration = make_windows(read_documents(data), load_tokenizer(model), asked, checkpoint.config.vocab_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror or error}): choose another place") from error

    turns, all_tokens = measure_every_run(Walk(checkpoint, calibration, dtype, device))
    analysis = LayerAnalysis(str(model), turns, turns.pairs, all_tokens, calibration.origin)
    for name in FILES[1:]:  # those of an earlier model do not outlive its layers.json
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "layers.json", analysis.as_json())  # first: it says whose the others are
    write_text(folder / "distances.csv", analysis.distances_csv())
    write_text(folder / "sublayers.csv", analysis.sublayers_csv())
    write_plots(analysis.as_json(), folder / "layers.png", mark)
    return analysis


class TurnJson(TypedDict):
    """How far one layer or sublayer turns the stream."""

    last_token: _Distance


class AnalysisJson(TypedDict):
    """What layers.json holds, as far as it is read."""

    model: str
    data: NotRequired[dict[str, Any]]
    sublayers: dict[str, dict[str, TurnJson]]
    best_first_layer: dict[str, int]
    last_token: list[list[_Distance]]


def is_analysis(value: Any) -> bool:
    """Whether a value out of JSON is meant to be what `analyse_layers` writes."""
    return (
        isinstance(value, dict) and len({"distance", "best_first_layer", "last_token", "sublayers"} & value.keys()) > 1
    )


def check_analysis(value: Any, source: str | Path) -> None:
    """Raise DataError unless `value` holds the distances of all pairs of layers, and what follows from them."""
    check_type(value, AnalysisJson, source)
    points = len(value["last_token"])
    fault = None
    if any(len(row) != points for row in value["last_token"]):
        fault = f'"last_token" is not {points} rows of {points}'
    elif any(not 0 <= value["best_first_layer"].get(str(n), -1) < points - n for n in range(1, points - 1)):
        fault = '"best_first_layer" does not name a layer for every count'
    elif not {layer for turns in value["sublayers"].values() for layer in turns} <= {str(n) for n in range(points - 1)}:
        fault = '"sublayers" are not by layer'
    if fault is not None:
        raise DataError(f"{source} is malformed, {fault}: run halve layers again")


def _claim(folder: Path, model: Path) -> Path:
    """`folder` when nothing of anybody else's goes by writing FILES into it; raises OutputError otherwise."""
    if folder == model or model in folder.parents:
        raise OutputError(f"{folder}: is the model's own folder or inside it: choose another folder")
    ours = {"distance", "best_first_layer"} <= (read_object(folder / "layers.json") or {}).keys()
    there = [name for name in FILES if os.path.lexists(folder / name)]
    if there and not ours:
        raise OutputError(f"{folder}: holds {there[0]}, which halve did not write: choose another folder")
    return folder


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
