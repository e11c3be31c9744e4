"""The sections about models: what was measured, how they were made, what each layer lost, and on what machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halve.checkpoint.manifest import Manifest, StepReport
from halve.compression.methods import METHODS
from halve.compression.recipe import option_text
from halve.measure.records import Measurement, Record
from halve.measure.table import Comparison, Row, compare, evaluation_setups
from halve.measure.units import byte_unit, show_bytes
from halve.report import layers, plots
from halve.report.blocks import Block, FactsBlock, Plot, PlotsBlock, Section, TableBlock
from halve.report.contents import Contents
from halve.report.plots import Mark
from halve.studies.layer_plots import by_run, by_sublayer

_LARGEST_DRAWN = 1e18  # the perplexity of a broken model is beyond what an axis can show, or infinite
# a broken model's is many times the others'; the KL of the dense model from itself, 0, has no place on such an axis
_BY_FACTORS = ("perplexity", "KL")
_ALWAYS = ("bits", "group_size", "fraction", "count")  # options worth saying even at their defaults


def results(contents: Contents) -> Section:
    """One row a model, dense ones first, and the plots of accuracy, size and speed."""
    records = [r for r in contents.shown().values() if r["kind"] in ("evaluation", "benchmark")]
    section = Section("results", "Results")
    if not records:
        return section
    sizes = {r["model"]: r["weight_bytes"] for r in records if r["kind"] == "benchmark"}
    # the dense model is the first row, which the others are compared with
    ordered = sorted(records, key=lambda r: (len(r["recipe"]) > 0, -sizes.get(r["model"], 0)))
    table = compare(ordered)
    section.blocks.append(TableBlock.of(table))
    found_plots = _plots(table, records)
    if found_plots:
        section.blocks.append(PlotsBlock(found_plots))
    return section


def _plots(table: Comparison, records: Sequence[Record]) -> list[Plot]:
    made = []
    quality = [column for column in table.columns if column.setup]
    evaluated = {Measurement.of(r): r for r in records if r["kind"] == "evaluation"}
    chances = {setup: evaluated[key].get("chance") for key, setup in evaluation_setups(evaluated).items()}
    speed, size = "decode_tokens_per_s", "weight_bytes"
    for column in quality:
        if column.title.startswith("same top"):
            continue  # it follows the KL beside it
        setup, chance = column.setup, chances.get(column.setup)
        unit = {"accuracy": " (%)", "KL": " (nats/token)"}.get(column.title.split()[0], "")
        y = column.title + unit
        for key, x in ((size, "weights"), (speed, "decode (tokens/s)")):
            if column.title.startswith(_BY_FACTORS) and key == speed:
                continue
            caption = f"{column.title} against {'size' if key == size else 'speed'}"
            made += _plot(table.rows, key, x, list(column.keys), y, chance, f"{caption} ({setup})")
    if not quality:
        made += _plot(table.rows, size, "weights", [speed], "decode (tokens/s)", None, "speed against size")
    return made


def _plot(
    rows: Sequence[Row], x_key: str, x: str, keys: list[str], y: str, chance: float | None, caption: str
) -> list[Plot]:
    """At most one plot: none where fewer than two models have both figures."""
    factor, log = 100 if "(%)" in y else 1, y.startswith(_BY_FACTORS)
    marks, scale = [], 1.0
    if x_key == "weight_bytes":
        scale, unit = byte_unit(max((row[x_key] for row in rows if row.get(x_key)), default=0))
        x = f"{x} ({unit})"
    for number, row in enumerate(rows):
        figures = [row.get(key) for key in (x_key, *keys, "", "")][:4]
        place, value, low, high = (v if isinstance(v, int | float) else None for v in figures)
        if place is not None and value is not None and abs(value) < _LARGEST_DRAWN and not (log and value <= 0):
            ends = [None if end is None else end * factor for end in (low, high)]
            marks.append(Mark(row["model"], place / scale, value * factor, *ends, kind=min(number, 1)))
    if len(marks) < 2:
        return []
    level = None if chance is None or factor == 1 else 100 * chance
    label = "chance" if level is not None else ""
    paint = plots.scatter(marks, x=x, y=y, line=level, line_label=label, log=log)
    return [Plot(plots.draw(paint, caption), caption)]


def distances(contents: Contents) -> Section:
    """What `halve layers` measured."""
    section = Section("layers", "What layers do")
    for place, analysis in contents.analyses.items():
        name = Path(str(analysis["model"])).name
        data = analysis.get("data", {})
        text = (
            f"{data.get('windows')} windows of {data.get('window_tokens')} tokens"
            if data.get("windows")
            else "the text"
        )
        runs = f"{name}: how far every run of layers turns the hidden state (last token, {text}); a dot on the best run"
        alone = f"{name}: every attention and every MLP alone"
        spoken = "angular distance of every run of layers", "angular distance of every sublayer, by layer"
        pair = [
            Plot(plots.draw(by_run(analysis), spoken[0]), runs),
            Plot(plots.draw(by_sublayer(analysis), spoken[1]), alone),
        ]
        section.blocks.append(PlotsBlock(pair, str(place.parent) if len(contents.analyses) > 1 else ""))
    return section


def recipes(contents: Contents) -> Section:
    """How each model was made, from its manifest, or from its record where there is none."""
    section = Section("recipes", "How the models were made")
    rows = []
    for place, manifest in contents.manifests.items():
        for step in manifest["steps"]:
            name = place.name if place.name else manifest["base_model"]
            done = [line for line in step["linears"] if line["action"] != "skipped"]
            rows.append([
                name,
                step_text(step.get("resolved") or step),
                f"{len(done)} of {len(step['linears'])}",
                f"{show_bytes(step['linear_bytes_before'])} to {show_bytes(step['linear_bytes_after'])}",
                _calibration(manifest, step),
            ])  # fmt: skip
    told = {place.name for place in contents.manifests}
    for record in contents.shown().values():
        name = Path(record["model"]).name
        if name not in told and record["recipe"]:
            told.add(name)
            for step in record["recipe"]:
                rows.append([name, step_text(step), "-", "-", "-"])
    if rows:
        head = ["model", "step", "linears", "their bytes", "calibrated on"]
        section.blocks.append(TableBlock(head, rows, text_columns=len(head)))
    return section


def _calibration(manifest: Manifest, step: StepReport) -> str:
    origin = manifest["calibration"]
    method = METHODS.get(step["step"])
    if not origin or (method is not None and getattr(method, "calibrates", None) is False):
        return "-"
    return f"{origin.get('windows')} windows of {origin.get('window_tokens')} tokens of {origin.get('source')}"


def step_text(step: Mapping[str, Any] | str) -> str:
    """A step of a manifest or record as it is written on the command line, most options at their defaults left out."""
    if isinstance(step, str):
        return step
    name = str(step["step"])
    method = METHODS.get(name)
    defaults = {f.name: f.default for f in dataclasses.fields(method)} if method else {}
    options = []
    for key, default in defaults.items():
        value = step.get(key, default)
        value = tuple(value) if isinstance(value, list) else value
        if value != default or key in _ALWAYS:
            options.append(f"{key}={option_text(value)}")
    return name + (":" + ",".join(options) if options else "")


def errors(contents: Contents) -> Section:
    """What every layer lost, by kind of linear."""
    section = Section("errors", "Error per layer")
    by_measure: dict[str, dict[str, layers.Series]] = {}
    for place, manifest in contents.manifests.items():
        for step in manifest["steps"]:
            found = layers.error_series(step)
            if found is not None:
                title, series = found
                panels = by_measure.setdefault(title, {})
                name = f"{place.name or manifest['base_model']}: {step_text(step.get('resolved') or step)}"
                panels[name if name not in panels else f"{place}: {name}"] = series
    shown = []
    for title, panels in by_measure.items():
        caption = "; ".join(panels if len(panels) == 1 else (f"{n}: {name}" for n, name in enumerate(panels, 1)))
        shown.append(Plot(layers.error_plot(title, list(panels.values()), title), caption))
    if shown:
        section.blocks.append(PlotsBlock(shown))
    return section


def machines(contents: Contents) -> Section:
    """Where the figures were measured."""
    section = Section("machine", "Machine")
    seen: dict[tuple[str, ...], None] = {}
    for record in contents.everything.values():
        machine, versions = record["machine"], record.get("versions", {})
        ram = machine.get("ram_bytes")
        seen[
            str(machine.get("cpu")),
            str(machine.get("gpu") or "none"),
            f"{machine.get('cores')} cores, {machine.get('threads')} used by PyTorch",
            show_bytes(ram) if ram else "-",
            str(machine.get("system")),
            f"halve {record['halve_version']}, torch {record['torch_version']}, Python {versions.get('python', '-')}",
        ] = None
    names = ("processor", "GPU", "cores", "memory", "system", "versions")
    blocks: list[Block] = [FactsBlock(list(zip(names, values, strict=True))) for values in seen]
    section.blocks.extend(blocks)
    return section


def provenance(contents: Contents) -> Section:
    """Every record with the command that made it."""
    section = Section("records", "Records")
    rows = [
        [str(path), record["kind"], str(record.get("date", "-")).replace("T", " ").removesuffix("+00:00"),
         str(record.get("commit") or "-")[:10], record["command"]]
        for path, record in (contents.shown() | contents.searches | contents.reproductions).items()
    ]  # fmt: skip
    if rows:
        head = ["file", "kind", "date (UTC)", "commit", "command"]
        section.blocks.append(TableBlock(head, rows, text_columns=len(head)))
    missing: dict[tuple[str, str], None] = {}
    for record in contents.shown().values():
        if record["kind"] == "benchmark":  # quality is no business of a benchmark's, unless it could not be measured
            passed_over = () if record.get("random_weights") else ("accuracy", "perplexity")
            items = record.get("not_measured", {}).items()
            missing |= {(str(what), str(why)): None for what, why in items if what not in passed_over}
    if missing:
        section.blocks.append(TableBlock(["not measured", "why"], [list(pair) for pair in missing], text_columns=2))
    if contents.left_out:
        rows = [[str(place), wrong] for place, wrong in contents.left_out.items()]
        section.blocks.append(TableBlock(["left out", "what is wrong"], rows, text_columns=2))
    return section
