"""MLP width pruned by every score, without and with refit: accuracy, perplexity and layer errors, as records and a plot.

    python benchmarks/pruning.py MODEL --exam EXAM.jsonl --text TEXT.txt --out benchmarks/results/pruning

The first --calibration-documents documents of TEXT (split at <|endoftext|>) calibrate; perplexity is measured on the
others, and of EXAM the questions whose article comes from a calibration document are left out. One record a variant
(existing ones are kept, so an interrupted run goes on), then a plot. With --steps, the steps named instead of all that,
each on its own, and no plot. docs/pruning.md shows the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from halve import compress, load_model, load_tokenizer
from halve.evaluation import evaluate
from halve.records import new_record, read_record, write_record

SCORES = ("l1", "activation", "obs")
SEPARATOR = "<|endoftext|>"


def variants(fractions: list[float], multiple: int) -> dict[str, str | None]:
    """Name of each variant -> its step, None for the model as it is."""
    steps: dict[str, str | None] = {"dense": None}
    for fraction in fractions:
        for score in SCORES:
            for refit in ("false", "true"):
                name = f"{fraction * 100:02.0f}-{score}{'-refit' if refit == 'true' else ''}"
                steps[name] = f"prune-mlp:fraction={fraction:g},score={score},refit={refit},multiple_of={multiple}"
        name = f"{fraction * 100:02.0f}-obs-refit-global"
        steps[name] = f"prune-mlp:fraction={fraction:g},allocation=global,multiple_of={multiple}"
    return steps


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


def mean_error(manifest: dict[str, Any], name: str) -> float | None:
    values = [line[name] for line in manifest["steps"][-1]["linears"] if name in line]
    return sum(values) / len(values) if values else None


def measure(
    model: Path, step: str | None, texts: tuple[Path, Path, Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Compress, reload, examine: the figures of one variant."""
    calibration, perplexity_text, exam = texts
    figures: dict[str, Any] = {"step": step}
    folder = model
    if step is not None:
        folder = calibration.parent / "pruned"
        result = compress(model, folder, [step], calibration=calibration, samples=options.samples,
                          window=options.window, overwrite=True)  # fmt: skip
        done = result.manifest["steps"][-1]
        figures |= {
            "linear_bytes": done["linear_bytes_after"],
            "linear_parameters": done["parameters_after"],
            "widths": done.get("resolved", {}).get("widths"),
            "layers": "|".join(done.get("resolved", {}).get("layers", [])) or None,
            "mean_output_error": mean_error(result.manifest, "output_error"),
            "mean_held_out_output_error": mean_error(result.manifest, "held_out_output_error"),
            "calibration": result.manifest["calibration"],
        }
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    asked = {"task": "multiple-choice", "protocol": options.protocol, "template": options.template}
    answers = evaluate(loaded, tokenizer, data=exam, limit=options.limit, **asked)
    text = evaluate(loaded, tokenizer, task="perplexity", protocol="documents", data=perplexity_text)
    figures |= {key: answers[key] for key in ("protocol", "template", "questions", "accuracy", "accuracy_ci95")}
    return figures | {key: text[key] for key in ("tokens", "perplexity", "nll_nats_per_token")}


def plot(records: dict[str, dict[str, Any]], fractions: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    series = [(f"{s}{r}", f"{s}{' + refit' if r else ''}") for s in SCORES for r in ("", "-refit")]
    series.append(("obs-refit-global", "obs + refit, global"))
    colours = {"l1": "tab:gray", "activation": "tab:blue", "obs": "tab:red"}
    for axes, key, title in zip(
        figure.subplots(1, 2), ("accuracy", "perplexity"), ("accuracy", "perplexity"), strict=True
    ):
        for suffix, label in series:
            values = [records["dense"][key]] + [records[f"{f * 100:02.0f}-{suffix}"][key] for f in fractions]
            style = ":" if "global" in suffix else "-" if "refit" in suffix else "--"
            axes.plot([0, *(100 * f for f in fractions)], values, style, marker="o",
                      color=colours[suffix.split("-")[0]], label=label)  # fmt: skip
        axes.set(xlabel="MLP channels removed (%)", title=title)
    figure.axes[0].axhline(0.25, color="black", linewidth=0.5)
    figure.axes[1].set_yscale("log")
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", type=Path)
    parser.add_argument("--exam", type=Path, required=True, help=".jsonl in RACE's layout")
    parser.add_argument("--text", type=Path, required=True, help=f"documents split at {SEPARATOR}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--steps", nargs="+", help="NAME:key=value,... of the variants")
    parser.add_argument("--multiple-of", type=int, default=4)
    parser.add_argument("--calibration-documents", type=int, default=120)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--protocol", default="pmi")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--limit", type=int, default=None, help="the first questions only")
    options = parser.parse_args()
    command = f"python benchmarks/pruning.py {options.model.name} --exam {options.exam.name} --text {options.text.name}"
    records: dict[str, dict[str, Any]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / options.model.name  # records name the model, not where it lies here
        shutil.copytree(options.model, model)
        texts = split(options.text, options.exam, options.calibration_documents, Path(work))
        steps = variants(options.fractions, options.multiple_of)
        if options.steps:
            steps = {re.sub(r"[^a-z0-9.]+", "-", step): step for step in options.steps}
        for name, step in steps.items():
            path = options.out / f"{options.model.name}-{name}.json"
            if not path.exists():
                figures = measure(model, step, texts, options)
                recipe = [] if step is None else [step]
                write_record(path, new_record("pruning", model.name, command=command, recipe=recipe, **figures))
            records[name] = read_record(path)
            found = {key: records[name].get(key) for key in ("accuracy", "perplexity", "mean_held_out_output_error")}
            print(json.dumps({"variant": name} | found), flush=True)
    if not options.steps:
        plot(records, options.fractions, options.out / f"{options.model.name}.png")


if __name__ == "__main__":
    main()
