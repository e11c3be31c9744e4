"""The end of a search: the winner among the trials, its confirmation, the Pareto front, search.json and the plot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.compression.recipe import step_json, step_text
from halve.errors import HalveError
from halve.measure.quality.race import QuestionSet
from halve.measure.quality.statistics import paired_records
from halve.measure.records import AnyRecord, Record, new_record, write_record
from halve.studies.search.bisection import reversals
from halve.studies.search.options import Floor
from halve.studies.search.plot import write_plot
from halve.studies.search.trial import PREFIX, TRIALS, TrialRunner
from halve.studies.search.vary import Point, Value, label, parameters

Row = dict[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """Everything a search has found."""

    runner: TrialRunner
    floor: Floor
    questions: QuestionSet
    final: QuestionSet
    dense: dict[str, Any]
    done: dict[Point, dict[str, Any]]
    ladder: list[Value] | None


def trial_row(runner: TrialRunner, point: Point, figures: dict[str, Any], floor: Floor, dense: dict[str, Any]) -> Row:
    """A trial as search.json holds it."""
    return {
        "parameters": parameters(runner.varied, point),
        "values": list(point),
        **figures,
        "feasible": floor.shortfall(figures, dense["accuracy"]) <= 0,
    }


def rank(row: Row) -> tuple[Any, ...]:
    """The row that is first wins: least of the objective, of equal ones the smaller in files, then the more accurate."""
    return row["objective"], row["bytes"], -row["accuracy"], row["values"]


def pareto_front(rows: list[Row]) -> list[Row]:
    """The rows no other row beats in objective or accuracy without losing in the other, least objective first; of equal ones
    the smaller in files."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["objective"], -r["accuracy"], r["bytes"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def finish(result: SearchResult) -> Record:
    """Confirm the winner, write search.json and the plot. Raises HalveError when no trial clears the floor."""
    runner, dense = result.runner, result.dense
    rows = [trial_row(runner, point, figures, result.floor, dense) for point, figures in result.done.items()]
    feasible = [row for row in rows if row["feasible"]]
    dense_final = runner.confirm(runner.model, runner.out / "dense-held-out.json", runner.name, result.final)
    winner = _confirm(result, tuple(min(feasible, key=rank)["values"]), dense_final) if feasible else None
    notes = _notes(result, rows, winner)
    record = new_record(
        "search",
        runner.name,
        command=runner.options.command,
        recipe=[step_json(method) for method in runner.steps],
        recipe_text=_recipe_text(runner),
        varied=[one.json(runner.steps) for one in runner.varied],
        floor={
            "asked": f"{100 * result.floor.value:g}% of dense" if result.floor.relative else result.floor.value,
            "accuracy": result.floor.accuracy(dense["accuracy"]),
            "held_out_accuracy": result.floor.accuracy(dense_final["accuracy"]),
            "lower_bound": result.floor.lower_bound,
        },
        objective=runner.options.minimise,
        task=runner.exam.task,
        protocol=runner.exam.protocol.name,
        template=runner.exam.template,
        limit=runner.exam.limit,
        search_data=_described(result.questions, runner.exam.limit),
        held_out_data=_described(result.final, None),
        calibration={
            "source": Path(runner.calibration.source).name,
            "samples": runner.calibration.samples,
            "window": runner.calibration.window,
        }
        if any(method.calibrates for method in runner.steps)
        else None,
        dense={
            **dense,
            "held_out_accuracy": dense_final["accuracy"],
            "held_out_accuracy_ci95": dense_final["accuracy_ci95"],
            "records": [*dense["records"], "dense-held-out.json"],
        },
        trials=rows,
        winner=winner,
        pareto=pareto_front(rows),
        notes=notes,
    )
    write_plot(record, runner.out / "pareto.png")
    write_record(runner.out / "search.json", record)
    if not runner.options.keep_checkpoints:
        shutil.rmtree(runner.out / PREFIX, ignore_errors=True)
    if winner is None:
        raise HalveError(_nothing_found(rows, record["floor"]["accuracy"], runner.out))
    return record


def _recipe_text(runner: TrialRunner) -> str:
    """`gptq:bits=4 + l1-inputs:fraction=0..0.5`"""
    texts = []
    for number, method in enumerate(runner.steps):
        texts.append(step_text(method, **{one.option: one.text for one in runner.varied if one.step == number}))
    return " + ".join(texts)


def _described(data: QuestionSet, limit: int | None) -> dict[str, Any]:
    asked = data.questions[:limit]
    return {
        "name": data.name,
        "questions": len(asked),
        "articles": len({q.article_id for q in asked}),
        "sha256": data.sha256,
    }


def _confirm(result: SearchResult, point: Point, dense_final: AnyRecord) -> Row:
    """The winner's checkpoint in OUT/winner, examined on questions no trial has seen."""
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
    record = runner.confirm(folder, marker, name, result.final)
    row = trial_row(runner, point, result.done[point], result.floor, result.dense)
    test = paired_records(record, dense_final)
    confirmed = result.floor.shortfall(record, dense_final["accuracy"]) <= 0
    return row | {
        "records": [*row["records"], marker.name],
        "checkpoint": folder.name,
        "held_out_accuracy": record["accuracy"],
        "held_out_accuracy_ci95": record["accuracy_ci95"],
        "held_out_difference_to_dense": test.difference,
        "held_out_difference_p_value": test.p_value,
        "bytes_share": row["bytes"] / result.dense["bytes"],
        "confirmed": confirmed,
    }


def _notes(result: SearchResult, rows: list[Row], winner: Row | None) -> list[str]:
    notes = []
    if result.ladder is not None:
        place = {value: index for index, value in enumerate(result.ladder)}
        measured = {place[row["values"][0]]: row for row in rows}
        feasible = {index: row["feasible"] for index, row in measured.items()}
        (varied,) = result.runner.varied
        for below, above in reversals(feasible):
            notes.append(
                f"accuracy is not monotone: {varied.name}={result.ladder[below]:g} falls below the floor "
                f"({measured[below]['accuracy']:.1%}), {result.ladder[above]:g} clears it ({measured[above]['accuracy']:.1%})"
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
        what = "the lower end of its interval" if result.floor.lower_bound else "its accuracy"
        notes.append(
            f"the winner is NOT confirmed: on the held-out questions {what} is below the floor; the search picks what just "
            "clears it, so luck is part of it: ask for more with a higher floor or --floor-lower-bound"
        )
    if winner is None:
        notes.append("no trial clears the floor")
    if result.runner.options.minimise == "ms":
        notes.append("times are measured while other workers may be running: one worker a machine is fair")
    return notes


def _nothing_found(rows: list[Row], floor: float, out: Path) -> str:
    best = max(rows, key=lambda row: row["accuracy"], default=None)
    if best is None:
        return f"no trial could be run: see {out / 'search.json'}"
    named = ", ".join(f"{name}={value:g}" for name, value in best["parameters"].items())
    return (
        f"none of the {len(rows)} trials clears the floor of {floor:.1%}: the best is {named} with {best['accuracy']:.1%}; "
        "lower the floor or vary within a gentler range"
    )
