"""MLP width pruned by every score, without and with refit: accuracy, perplexity and layer errors, as records and a plot.

    python benchmarks/pruning.py --out benchmarks/results/pruning-reader        the bundled reader, its exams and texts
    python benchmarks/pruning.py MODEL --exam EXAM.jsonl --text TEXT.txt --out benchmarks/results/pruning

Of another MODEL the first --calibration-documents documents of TEXT (split at <|endoftext|>) calibrate; perplexity is
measured on the others, and of EXAM the questions whose article comes from a calibration document are left out. One
record a variant (existing ones are kept, so an interrupted run goes on), then a plot. With --recipes, the recipes named
(steps separated by spaces) instead of all that, and no plot. docs/pruning.md shows the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halve import compress
from halve.demo.run import EXAMS, READER
from halve.measure.quality.evaluate import LoadedModel, evaluate_loaded, prepare
from halve.measure.quality.options import EvaluationOptions
from halve.measure.records import new_record, read_record, write_record

SCORES = ("l1", "activation", "obs")
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Material:
    """A model, the text it is calibrated on, and what it is examined on, by name."""

    model: Path
    calibration: Path
    exams: dict[str, EvaluationOptions]


def variants(fractions: list[float], multiple: int) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name of each variant -> its recipe, and what the table says of it."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {"dense": ([], {"removed_share": 0.0})}
    for fraction in fractions:
        for score in SCORES:
            for refit in ("no", "yes"):
                name = f"{fraction * 100:02.0f}-{score}{'-refit' * (refit == 'yes')}"
                step = f"prune-mlp:fraction={fraction:g},score={score},multiple_of={multiple},refit="
                said = {"removed_share": fraction, "score": score, "refit": refit}
                found[name] = [step + ("true" if refit == "yes" else "false")], said
        step = f"prune-mlp:fraction={fraction:g},allocation=global,multiple_of={multiple}"
        said = {"removed_share": fraction, "score": "obs, global", "refit": "yes"}
        found[f"{fraction * 100:02.0f}-obs-refit-global"] = [step], said
    return found


def split(text: Path, exam: Path, documents: int, folder: Path) -> tuple[Path, Path, Path]:
    """Calibration text, perplexity text and exam that share no document, written into `folder`."""
    stories = [s.strip() for s in text.read_text(encoding="utf-8").split(SEPARATOR) if s.strip()]
    if not 0 < documents < len(stories):
        sys.exit(f"--calibration-documents {documents}: {text} has {len(stories)} documents")
    seen = "\n".join(" ".join(story.split()) for story in stories[:documents])
    kept = [line for line in exam.read_text(encoding="utf-8").splitlines()
            if " ".join(json.loads(line)["article"].split()) not in seen]  # fmt: skip
    paths = folder / "calibration.txt", folder / "perplexity.txt", folder / "exam.jsonl"
    paths[0].write_text(SEPARATOR.join(stories[:documents]), encoding="utf-8")
    paths[1].write_text(SEPARATOR.join(stories[documents:]), encoding="utf-8")
    paths[2].write_text("\n".join(kept) + "\n", encoding="utf-8")
    return paths


def material(options: argparse.Namespace, folder: Path) -> Material:
    """What the options ask for; `folder` takes a copy of the model, so that records name it and not where it lies."""
    if options.model is None:
        return Material(READER, READER / "calibration.txt", {exam.name: exam.options for exam in EXAMS})
    if options.exam is None or options.text is None:
        sys.exit("MODEL needs --exam and --text")
    model = shutil.copytree(options.model, folder / options.model.name)
    calibration, text, exam = split(options.text, options.exam, options.calibration_documents, folder)
    cloze = EvaluationOptions("multiple-choice", exam, "pmi", "plain")
    return Material(
        model, calibration, {"cloze": cloze, "perplexity": EvaluationOptions("perplexity", text, "documents")}
    )


def mean_error(manifest: dict[str, Any], name: str) -> float | None:
    values = [line[name] for line in manifest["steps"][-1]["linears"] if name in line]
    return sum(values) / len(values) if values else None


def measure(material: Material, recipe: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Compress, reload, examine in float32: the figures of one variant."""
    figures: dict[str, Any] = {"steps": " ".join(recipe) or None}
    with tempfile.TemporaryDirectory() as work:
        folder = material.model
        if recipe:
            folder = Path(work) / "pruned"
            made = compress(material.model, folder, recipe, calibration=material.calibration,
                            samples=options.samples, window=options.window).manifest  # fmt: skip
            chosen = [step.get("resolved", {}) for step in made["steps"]]
            figures |= {
                "linear_bytes": made["steps"][-1]["linear_bytes_after"],
                "linear_parameters": made["steps"][-1]["parameters_after"],
                "widths": next((step["widths"] for step in chosen if step.get("widths")), None),
                "layers": "|".join(part for step in chosen for part in step.get("layers", [])) or None,
                "mean_output_error": mean_error(made, "output_error"),
                "mean_held_out_output_error": mean_error(made, "held_out_output_error"),
                "calibration": made["calibration"],
            }
        loaded = LoadedModel.load(folder, dtype=torch.float32)
        for name, asked in material.exams.items():
            answers = evaluate_loaded(loaded, prepare(asked))
            if name == "perplexity":
                figures |= {key: answers[key] for key in ("tokens", "perplexity", "nll_nats_per_token")}
            else:
                kept = ("protocol", "template", "questions", "accuracy", "accuracy_ci95")
                figures[name] = {key: answers.get(key) for key in kept}
    return figures


def plot(records: dict[str, dict[str, Any]], fractions: list[float], path: Path) -> None:
    """Each exam's accuracy and the perplexity against the share removed, a line for each score."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    exams = [name for name in ("cloze", "questions") if name in records["dense"]]
    figure = Figure(figsize=(5 * (1 + len(exams)), 4.4), layout="constrained")
    series = [(f"{s}{r}", f"{s}{' + refit' if r else ''}") for s in SCORES for r in ("", "-refit")]
    series.append(("obs-refit-global", "obs + refit, global"))
    colours = {"l1": "tab:gray", "activation": "tab:blue", "obs": "tab:red"}
    panels = figure.subplots(1, 1 + len(exams))
    for axes, name in zip(panels, [*exams, "perplexity"], strict=True):
        for suffix, label in series:
            shown = [records["dense"], *(records[f"{f * 100:02.0f}-{suffix}"] for f in fractions)]
            values = [r[name] if name == "perplexity" else 100 * r[name]["accuracy"] for r in shown]
            style = ":" if "global" in suffix else "-" if "refit" in suffix else "--"
            axes.plot([0, *(100 * f for f in fractions)], values, style, marker="o", markersize=4,
                      color=colours[suffix.split("-")[0]], label=label)  # fmt: skip
        title = name if name == "perplexity" else f"{name}: accuracy (%), chance 25"
        axes.set(xlabel="MLP channels removed (%)", title=title)
        if name != "perplexity":
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, high - 20), min(100, high + 1))  # a question more or less is no news
        elif axes.get_ylim()[1] > 4 * axes.get_ylim()[0]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """The program."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="left out: the bundled reader")
    parser.add_argument("--exam", type=Path, help=".jsonl in RACE's layout")
    parser.add_argument("--text", type=Path, help=f"documents split at {SEPARATOR}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--recipes", nargs="+", help="'NAME:key=value,... NAME:...' of the variants")
    parser.add_argument("--multiple-of", type=int, default=4)
    parser.add_argument("--calibration-documents", type=int, default=120)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    command = "python benchmarks/pruning.py"
    if options.model is not None:
        command += f" {options.model.name} --exam {options.exam.name} --text {options.text.name}"
    records: dict[str, dict[str, Any]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        what = material(options, Path(work))
        asked = variants(options.fractions, options.multiple_of)
        if options.recipes:
            asked = {re.sub(r"[^a-z0-9.]+", "-", recipe): (recipe.split(), {}) for recipe in options.recipes}
        for name, (recipe, said) in asked.items():
            path = options.out / f"{what.model.name}-{name}.json"
            if not path.exists():
                figures = said | measure(what, recipe, options)
                write_record(path, new_record("pruning", what.model.name, command=command, recipe=recipe, **figures))
            records[name] = read_record(path)
            exams = {exam: records[name][exam]["accuracy"] for exam in what.exams if exam != "perplexity"}
            print(json.dumps({"variant": name, "perplexity": records[name]["perplexity"]} | exams), flush=True)
    if not options.recipes:
        plot(records, options.fractions, options.out / f"{what.model.name}.png")


if __name__ == "__main__":
    main()
