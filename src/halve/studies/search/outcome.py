"""The end of a search: the winner among the trials, its confirmation, the Pareto front, search.json and the plot."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.compression.recipe import step_json, step_text
from halve.errors import HalveError
from halve.measure.quality.race import QuestionSet
from halve.measure.quality.statistics import paired_records
from halve.measure.records import Record, new_record, write_record
from halve.studies.search.bisection import reversals
from halve.studies.search.trial import PREFIX, TRIALS, Bench
from halve.studies.search.vary import Point, Value, label, parameters

if TYPE_CHECKING:
    from halve.studies.search.search import Floor

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Everything a search has measured."""

    bench: Bench
    floor: Floor
    questions: QuestionSet
    final: QuestionSet
    dense: dict[str, Any]
    done: dict[Point, dict[str, Any]]
    ladder: list[Value] | None


def trial_row(bench: Bench, point: Point, figures: dict[str, Any], floor: Floor, dense: dict[str, Any]) -> Row:
    """A trial as search.json holds it."""
    return {
        "parameters": parameters(bench.varied, point),
        "values": list(point),
        **figures,
        "feasible": floor.shortfall(figures, dense["accuracy"]) <= 0,
    }


def pareto_front(rows: list[Row]) -> list[Row]:
    """The rows no other row beats in objective or accuracy without losing in the other, least objective first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["objective"], -r["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def finish(found: Found) -> Record:
    """Confirm the winner, write search.json and the plot. Raises HalveError when no trial clears the floor."""
    bench, dense = found.bench, found.dense
    rows = [trial_row(bench, point, figures, found.floor, dense) for point, figures in found.done.items()]
    feasible = [(row["objective"], -row["accuracy"], point) for point, row in zip(found.done, rows, strict=True)
                if row["feasible"]]  # fmt: skip
    dense_final = bench.confirm(bench.model, bench.out / "dense-held-out.json", bench.name, found.final)
    winner = None if not feasible else _confirm(found, min(feasible)[2], dense_final)
    notes = _notes(found, rows, winner)
    record = new_record(
        "search",
        bench.name,
        command=bench.command,
        recipe=[step_json(method) for method in bench.steps],
        recipe_text=_recipe_text(bench),
        varied=[one.json(bench.steps) for one in bench.varied],
        floor={
            "asked": f"{100 * found.floor.value:g}% of dense" if found.floor.relative else found.floor.value,
            "accuracy": found.floor.accuracy(dense["accuracy"]),
            "held_out_accuracy": found.floor.accuracy(dense_final["accuracy"]),
            "lower_bound": found.floor.lower_bound,
        },
        objective=bench.objective,
        task=bench.how.task,
        protocol=bench.how.protocol,
        template=bench.how.template,
        limit=bench.how.limit,
        search_data=_described(found.questions, bench.how.limit),
        held_out_data=_described(found.final, None),
        calibration={
            "source": Path(bench.calibrating.calibration).name,
            "samples": bench.calibrating.samples,
            "window": bench.calibrating.window,
        }
        if any(method.calibrates for method in bench.steps)
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
    from halve.studies.search.plot import plot

    plot(record, bench.out / "pareto.png")
    write_record(bench.out / "search.json", record)
    if not bench.keep:
        shutil.rmtree(bench.out / PREFIX, ignore_errors=True)
    if winner is None:
        raise HalveError(_nothing_found(rows, record["floor"]["accuracy"], bench.out))
    return record


def _recipe_text(bench: Bench) -> str:
    """`gptq:bits=4 + l1-inputs:fraction=0..0.5`"""
    texts = []
    for number, method in enumerate(bench.steps):
        texts.append(step_text(method, **{one.option: one.text for one in bench.varied if one.step == number}))
    return " + ".join(texts)


def _described(data: QuestionSet, limit: int | None) -> dict[str, Any]:
    asked = data.questions[:limit]
    return {
        "name": data.name,
        "questions": len(asked),
        "articles": len({q.article_id for q in asked}),
        "sha256": data.sha256,
    }


def _confirm(found: Found, point: Point, dense_final: Record) -> Row:
    """The winner's checkpoint in OUT/winner, examined on questions no trial has seen."""
    bench = found.bench
    name, folder = f"{bench.name} {label(bench.varied, point)}", bench.out / "winner"
    marker = bench.out / "winner-held-out.json"
    built = bench.out / "winner-built.txt"
    if not (folder.exists() and built.exists() and built.read_text() == name):
        built.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        kept = bench.out / TRIALS / label(bench.varied, point)
        if kept.exists():
            shutil.copytree(kept, folder)
        else:
            bench.build(point, folder)
        built.write_text(name)
    record = bench.confirm(folder, marker, name, found.final)
    row = trial_row(bench, point, found.done[point], found.floor, found.dense)
    test = paired_records(record, dense_final)
    confirmed = found.floor.shortfall(record, dense_final["accuracy"]) <= 0
    return row | {
        "records": [*row["records"], marker.name],
        "checkpoint": folder.name,
        "held_out_accuracy": record["accuracy"],
        "held_out_accuracy_ci95": record["accuracy_ci95"],
        "held_out_difference_to_dense": test.difference,
        "held_out_difference_p_value": test.p_value,
        "bytes_share": row["bytes"] / found.dense["bytes"],
        "confirmed": confirmed,
    }


def _notes(found: Found, rows: list[Row], winner: Row | None) -> list[str]:
    notes = []
    if found.ladder is not None:
        place = {value: index for index, value in enumerate(found.ladder)}
        measured = {place[row["values"][0]]: row for row in rows}
        feasible = {index: row["feasible"] for index, row in measured.items()}
        (varied,) = found.bench.varied
        for below, above in reversals(feasible):
            notes.append(
                f"accuracy is not monotone: {varied.name}={found.ladder[below]:g} falls below the floor "
                f"({measured[below]['accuracy']:.1%}), {found.ladder[above]:g} clears it ({measured[above]['accuracy']:.1%})"
            )
        left_out = len(varied.values) - len(found.ladder)
        if left_out:
            notes.append(
                f"{left_out} of the {len(varied.values)} values of {varied.name} cannot be applied to this model"
            )
        if feasible.get(len(found.ladder) - 1):
            notes.append(f"the end of the range, {varied.name}={found.ladder[-1]:g}, clears the floor: widen the range")
    if winner is not None and not winner["confirmed"]:
        what = "the lower end of its interval" if found.floor.lower_bound else "its accuracy"
        notes.append(
            f"the winner is NOT confirmed: on the held-out questions {what} is below the floor; the search picks what just "
            "clears it, so luck is part of it: ask for more with a higher floor or --floor-lower-bound"
        )
    if winner is None:
        notes.append("no trial clears the floor")
    if found.bench.objective != "bytes":
        notes.append(
            "times and peak memory are measured while other workers may be running: one worker a machine is fair"
        )
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
