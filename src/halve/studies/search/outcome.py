"""The end of a search: the winner among the trials, its confirmation, the Pareto front, search.json and the plot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.compression.recipe import step_json, step_text
from halve.errors import HalveError
from halve.measure.quality.statistics import paired_records
from halve.measure.records import AnyRecord, Record, new_record, write_record
from halve.studies.search.asked import keys_of
from halve.studies.search.bisection import reversals
from halve.studies.search.figures import FIGURES, Judged
from halve.studies.search.options import Floor
from halve.studies.search.plot import write_plot
from halve.studies.search.trial import PREFIX, TRIALS, TrialRunner
from halve.studies.search.vary import Point, Value, label, parameters

Row = dict[str, Any]
BY_ACCURACY = Judged(FIGURES["accuracy"], FIGURES["bytes"])


@dataclass(frozen=True)
class SearchResult:
    """Everything a search has found."""

    runner: TrialRunner
    floor: Floor
    dense: dict[str, Any]
    done: dict[Point, dict[str, Any]]
    ladder: list[Value] | None

    @property
    def judged(self) -> Judged:
        return Judged(self.floor.limited, FIGURES[self.runner.objective])


def trial_row(runner: TrialRunner, point: Point, figures: dict[str, Any], floor: Floor, dense: dict[str, Any]) -> Row:
    """A trial as search.json holds it."""
    return {
        "parameters": parameters(runner.varied, point),
        "values": list(point),
        **figures,
        "feasible": floor.shortfall(figures, dense) <= 0,
    }


def rank(row: Row, judged: Judged = BY_ACCURACY) -> tuple[Any, ...]:
    """The row that is first wins: best in the objective, of equal ones the smaller in files, then the better."""
    quality = judged.quality
    return judged.objective.cost(row["objective"]), row["bytes"], quality.cost(row[quality.key]), row["values"]


def pareto_front(rows: list[Row], judged: Judged = BY_ACCURACY) -> list[Row]:
    """The rows no other row beats in cost or quality without losing in the other, least cost first; of equal ones the
    smaller in files."""
    front: list[Row] = []
    quality = judged.quality
    for row in sorted(rows, key=lambda r: (judged.cost_of(r), quality.cost(r[quality.key]), r["bytes"])):
        if not front or quality.cost(row[quality.key]) < quality.cost(front[-1][quality.key]):
            front.append(row)
    return front


def finish(result: SearchResult) -> Record:
    """Confirm the winner, write search.json and the plot. Raises HalveError when no trial clears the floor."""
    runner, dense, floor, exam = result.runner, result.dense, result.floor, result.runner.exam
    rows = [trial_row(runner, point, figures, floor, dense) for point, figures in result.done.items()]
    feasible = [row for row in rows if row["feasible"]]
    dense_path = runner.dense_record(exam.final)
    dense_final = runner.confirm(runner.model, dense_path, runner.name)
    winner = None
    if feasible:
        best = min(feasible, key=lambda row: rank(row, result.judged))
        winner = _confirm(result, tuple(best["values"]), dense_final)
    record = new_record(
        "search",
        runner.name,
        command=runner.options.command,
        recipe=[step_json(method) for method in runner.steps],
        recipe_text=_recipe_text(runner),
        varied=[one.json(runner.steps) for one in runner.varied],
        floor=_floor(floor, dense, dense_final),
        objective=runner.objective,
        task=exam.task,
        protocol=exam.protocol,
        template=exam.template,
        limit=exam.limit,
        search_data=exam.search.about,
        held_out_data=exam.final.about,
        calibration={
            "source": Path(runner.calibration.source).name,
            "samples": runner.calibration.samples,
            "window": runner.calibration.window,
        }
        if any(method.calibrates for method in runner.steps)
        else None,
        kept_tokens=exam.kept_tokens,
        dense={**dense, **_held_out(result, dense_final), "records": [*dense["records"], dense_path.name]},
        trials=rows,
        winner=winner,
        pareto=pareto_front(rows, result.judged),
        notes=_notes(result, rows, winner),
    )
    write_plot(record, runner.out / "pareto.png")
    write_record(runner.out / "search.json", record)
    if not runner.options.keep_checkpoints:
        shutil.rmtree(runner.out / PREFIX, ignore_errors=True)
        for part in (exam.search, exam.final):
            runner.dense_base(part).unlink(missing_ok=True)
    if winner is None:
        raise HalveError(_nothing_found(result, rows))
    return record


def _floor(floor: Floor, dense: dict[str, Any], dense_final: AnyRecord) -> dict[str, Any]:
    """What had to be kept, on both parts; in bytes both are the same."""
    key, on_final = floor.limited.key, dense if floor.figure == "bytes" else dense_final
    return {
        "figure": floor.figure,
        "asked": f"{100 * floor.value:g}% of dense" if floor.relative else floor.value,
        key: floor.level(dense),
        f"held_out_{key}": floor.level(on_final),
        "lower_bound": floor.lower_bound,
    }


def _held_out(result: SearchResult, record: AnyRecord) -> dict[str, Any]:
    """The figures of quality on the part that no trial has seen."""
    return {f"held_out_{key}": record[key] for key in keys_of(result.runner.exam.figures)}


def _recipe_text(runner: TrialRunner) -> str:
    """`gptq:bits=4 + l1-inputs:fraction=0..0.5`"""
    texts = []
    for number, method in enumerate(runner.steps):
        texts.append(step_text(method, **{one.option: one.text for one in runner.varied if one.step == number}))
    return " + ".join(texts)


def _confirm(result: SearchResult, point: Point, dense_final: AnyRecord) -> Row:
    """The winner's checkpoint in OUT/winner, examined on what no trial has seen."""
    runner = result.runner
    name, folder = f"{runner.name} {label(runner.varied, point)}", runner.out / "winner"
    marker = runner.out / "winner-held-out.json"
    built = runner.out / "winner-built.txt"
    if not (folder.exists() and built.exists() and built.read_text() == name):
        built.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        kept = runner.out / TRIALS / label(runner.varied, point)
        if kept.exists():
            shutil.copytree(kept, folder)
        else:
            runner.build(point, folder)
        built.write_text(name)
    record = runner.confirm(folder, marker, name)
    row = trial_row(runner, point, result.done[point], result.floor, result.dense)
    figures = {"bytes": row["bytes"], **record}
    row |= {
        "records": [*row["records"], marker.name],
        "checkpoint": folder.name,
        **_held_out(result, record),
        "bytes_share": row["bytes"] / result.dense["bytes"],
        "confirmed": result.floor.shortfall(figures, result.dense | dict(dense_final)) <= 0,
    }
    if "answers" in record:  # KL compares by itself
        test = paired_records(record, dense_final)
        row |= {"held_out_difference_to_dense": test.difference, "held_out_difference_p_value": test.p_value}
    return row


def _notes(result: SearchResult, rows: list[Row], winner: Row | None) -> list[str]:
    notes, figure = [], result.floor.limited
    if result.ladder is not None:
        place = {value: index for index, value in enumerate(result.ladder)}
        measured = {place[row["values"][0]]: row for row in rows}
        feasible = {index: row["feasible"] for index, row in measured.items()}
        (varied,) = result.runner.varied
        for below, above in reversals(feasible):
            values = [figure.show(measured[index][figure.key]) for index in (below, above)]
            notes.append(
                f"{figure.label} is not monotone: {varied.name}={result.ladder[below]:g} falls below the floor "
                f"({values[0]}), {result.ladder[above]:g} clears it ({values[1]})"
            )
        left_out = len(varied.values) - len(result.ladder)
        if left_out:
            notes.append(
                f"{left_out} of the {len(varied.values)} values of {varied.name} cannot be applied to this model"
            )
        if feasible.get(len(result.ladder) - 1):
            notes.append(
                f"the end of the range, {varied.name}={result.ladder[-1]:g}, clears the floor: widen the range"
            )
    if winner is not None and not winner["confirmed"]:
        whose = "the worse end of the interval of " * result.floor.lower_bound
        notes.append(
            f"the winner is NOT confirmed: on the held-out part {whose}its {figure.label} does not clear the floor; the "
            "search picks what just clears it, so luck is part of it: ask for more, or for --floor-lower-bound"
        )
    if winner is None:
        notes.append("no trial clears the floor")
    if result.runner.objective == "ms":
        notes.append("times are measured while other workers may be running: one worker a machine is fair")
    return notes


def _nothing_found(result: SearchResult, rows: list[Row]) -> str:
    figure, floor = result.floor.limited, result.floor
    best = min(rows, key=lambda row: figure.cost(row[figure.key]), default=None)
    if best is None:
        return f"no trial could be run: see {result.runner.out / 'search.json'}"
    named = ", ".join(f"{name}={value:g}" for name, value in best["parameters"].items())
    level = floor.level(result.dense)
    limit = figure.show(level) if floor.figure == "accuracy" else figure.bound(level)
    return (
        f"none of the {len(rows)} trials clears the floor of {limit}: the best is {named} "
        f"with {figure.show(best[figure.key])}; ask for less or vary within "
        f"{'a gentler range' if figure.of_quality else 'a range that leaves less'}"
    )
