"""What a page shows of single layers: the errors in a manifest."""

from __future__ import annotations

import re
from typing import Any

from halve.measure.pictures import lines
from halve.report import plots

# what a manifest says of a linear, the most telling first
MEASURES = {
    "held_out_output_error": "error of the output, held-out text",
    "output_error": "error of the output, calibration text",
    "weight_error": "error of the weight",
    "l1_share_removed": "share of the L1 norm removed",
}


def error_series(step: dict[str, Any]) -> tuple[str, dict[str, dict[int, float]]] | None:
    """The most telling measure of a manifest's step, by role and layer; None when it measured nothing by layer."""
    for key, title in MEASURES.items():
        series: dict[str, dict[int, float]] = {}
        for row in step["linears"]:
            place = re.search(r"\.(\d+)\.", row["name"])
            if place and isinstance(row.get(key), int | float):
                series.setdefault(row["name"].rsplit(".", 1)[-1], {})[int(place[1])] = row[key]
        if series:
            return title, series
    return None


def error_plot(title: str, series: dict[str, dict[int, float]], described: str) -> str:
    """One line for each kind of linear over the layers, in per cent."""
    return plots.draw(lines(series, x="layer", y=title, percent=True), described)
