"""What a page shows of single layers: the errors in a manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from halve.checkpoint.manifest import StepReport
from halve.measure.pictures import lines
from halve.report import plots

# what a manifest says of a linear, the most telling first
MEASURES = {
    "held_out_output_error": "error of the output, held-out text",
    "output_error": "error of the output, calibration text",
    "weight_error": "error of the weight",
    "l1_share_removed": "share of the L1 norm removed",
}


Series = dict[str, dict[int, float]]  # by role and layer
_LARGEST_DRAWN = 1e18


def error_series(step: StepReport) -> tuple[str, Series] | None:
    """The most telling measure of a manifest's step, by role and layer; None when it measured nothing by layer."""
    for key, title in MEASURES.items():
        series: Series = {}
        for row in step["linears"]:
            place, error = re.search(r"\.([0-9]{1,9})\.", row["name"]), row.get(key)
            if place and isinstance(error, int | float) and abs(error) < _LARGEST_DRAWN:
                series.setdefault(row["name"].rsplit(".", 1)[-1], {})[int(place[1])] = float(error)
        if series:
            return title, series
    return None


def error_plot(title: str, panels: Sequence[Series], described: str) -> str:
    """One line for each kind of linear over the layers, in per cent: side by side for several steps, on the same axes."""
    roles = list(dict.fromkeys(role for series in panels for role in series))
    painters = [lines(series, x="", y="", percent=True, among=roles) for series in panels]
    return plots.draw_multiples(painters, "layer", title, described)
