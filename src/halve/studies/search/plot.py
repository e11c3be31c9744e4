"""Accuracy against what is minimised: every trial with its interval, the Pareto front, the floor and the winner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {"bytes": "weights", "decode_ms": "decode (ms a token)", "peak_memory": "peak memory"}


def plot(record: dict[str, Any], path: Path) -> None:
    """Write the picture of a search record as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, objective = record["trials"], record["objective"]
    scale, unit = _unit(objective, [row["objective"] for row in [*rows, record["dense"]]])
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for feasible, color, name in ((True, "tab:blue", "clears the floor"), (False, "tab:gray", "does not")):
        some = [row for row in rows if row["feasible"] is feasible]
        if not some:
            continue
        accuracy = [100 * row["accuracy"] for row in some]
        low = [100 * (row["accuracy"] - row["accuracy_ci95"][0]) for row in some]
        high = [100 * (row["accuracy_ci95"][1] - row["accuracy"]) for row in some]
        axes.errorbar(
            [row["objective"] / scale for row in some], accuracy, yerr=[low, high], color=color, label=name,
            fmt="o", markersize=4, elinewidth=0.6, alpha=0.7,
        )  # fmt: skip
    front = record["pareto"]
    axes.step(
        [row["objective"] / scale for row in front], [100 * row["accuracy"] for row in front], where="post",
        color="tab:orange", label="Pareto front",
    )  # fmt: skip
    dense = record["dense"]
    axes.plot(dense["objective"] / scale, 100 * dense["accuracy"], "k^", markersize=7, label="dense")
    axes.axhline(100 * record["floor"]["accuracy"], color="tab:red", linestyle=":", label="floor")
    winner = record["winner"]
    if winner is not None:
        axes.plot(winner["objective"] / scale, 100 * winner["accuracy"], "*", color="tab:green", markersize=14,
                  label="winner, search questions")  # fmt: skip
        low, high = winner["held_out_accuracy_ci95"]
        middle = winner["held_out_accuracy"]
        axes.errorbar(
            winner["objective"] / scale, 100 * middle, yerr=[[100 * (middle - low)], [100 * (high - middle)]],
            fmt="D", color="tab:green", markersize=5, capsize=3, label="winner, held-out questions",
        )  # fmt: skip
    axes.set(
        xlabel=f"{TITLES[objective]}{unit}", ylabel="accuracy (%)",
        title=f"{record['model']}: {', '.join(one['name'] for one in record['varied'])}",
    )  # fmt: skip
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    pyplot.close(figure)
    temporary.replace(path)


def _unit(objective: str, values: list[float]) -> tuple[float, str]:
    if objective == "decode_ms":
        return 1.0, ""
    top = max(values)
    return next(((s, f" ({u})") for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if top >= s), (1.0, " (bytes)"))
