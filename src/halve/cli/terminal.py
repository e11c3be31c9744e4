"""Plans and results as people read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from halve.cli.output import console, say
from halve.compression.plan import dense_table
from halve.escapes import plain
from halve.measure.quality.tasks import figure_of
from halve.measure.records import AnyRecord
from halve.measure.units import show_bytes, show_difference, show_duration, show_kl, show_percent
from halve.studies.search.figures import UNITS, Judged, qualities

if TYPE_CHECKING:
    from pathlib import Path

    from halve.compression.compress import RecipePlan, Result
    from halve.compression.methods import Method
    from halve.compression.plan import StepPlan
    from halve.studies.search.figures import Figure
    from halve.studies.system1.needs import Needs


_size = partial(show_bytes, decimals=2)


def plan(recipe: RecipePlan, steps: list[Method]) -> None:
    """What every step will do, one line per kind of linear, and the sizes before and after."""
    screen = console()
    for number, (method, step) in enumerate(zip(steps, recipe.steps, strict=True), 1):
        screen.print(_step_table(f"step {number}: {method.name}", step))
    ratio = recipe.bytes_after / recipe.bytes_before
    screen.print(
        f"weights: {_size(recipe.bytes_before)} -> {_size(recipe.bytes_after)} ({ratio:.0%}); "
        f"disk while working: {_size(recipe.disk_bytes)}; memory: about {_size(recipe.estimate.memory_bytes)}; "
        f"time: about {show_duration(recipe.estimate.seconds)}"
    )
    after = recipe.steps[-1].after
    if (dense := dense_table(after)) is not None:
        screen.print(
            f"{' and '.join(dense.names)} stay dense: {_size(dense.nbytes)}, {dense.nbytes / after.nbytes:.0%} of the "
            f"result; --step {dense.step} would leave {_size(dense.nbytes_after)} of them"
        )


def _step_table(title: str, step: StepPlan) -> Table:
    """Linears that fare alike share a line."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in step.rows:
        what = f"{row.action}: {row.reason}" if row.reason else row.action
        total = kinds.setdefault((row.name.split(".")[-1], what), [0, 0, 0])
        for i, value in enumerate((1, row.bytes_before, row.bytes_after)):
            total[i] += value
    table = Table(title=title, title_justify="left")
    table.add_column("linear", no_wrap=True)
    table.add_column("layers", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    for (name, what), (count, before, after) in kinds.items():
        table.add_row(plain(name), str(count), plain(what), _size(before), _size(after))
    return table


def steps(methods: dict[str, type]) -> None:
    """Every step with its description, options and defaults."""
    screen = console()
    for name, method in methods.items():
        options = ",".join(f"{f.name}={_text(f.default)}" for f in dataclasses.fields(method))
        screen.print(Text.assemble((name, "bold"), f":{options}"), soft_wrap=True)
        screen.print(f"    {' '.join((method.__doc__ or '').split())}\n")


def _text(default: object) -> str:
    return "|".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()


def needs(what: Needs) -> None:
    """Memory, disk and time of a study, before it begins."""
    say(
        f"needs about {_size(what.memory_bytes)} of memory ({_size(what.together_bytes)} to time all models side by side), "
        f"{_size(what.disk_bytes)} of disk, and at most about {show_duration(what.seconds)}"
    )


def result(done: Result) -> None:
    """What every step left of the linears, where the result is, and what is worth knowing about it."""
    for step in done.manifest["steps"][-len(done.plan.steps) :]:
        sizes = " -> ".join(_size(step[f"linear_bytes_{when}"]) for when in ("before", "after"))
        counts = " -> ".join(f"{step[f'parameters_{when}']:,}" for when in ("before", "after"))
        say(f"{step['step']}: linears {sizes}, parameters {counts}")
    for note in done.notes:
        say(f"note: {note}")
    say(f"wrote {done.out}")


def evaluation(record: AnyRecord) -> None:
    """One line of figures, with the protocol they were measured by."""
    figure = figure_of(record)
    asked = [record["task"], *([record["protocol"]] if record.get("protocol") else [])]
    if figure == "accuracy":
        accuracy = record["accuracy"]
        text = "undefined (no question answered)" if accuracy is None else f"{accuracy:.1%}"
        if record.get("accuracy_ci95"):
            low, high = record["accuracy_ci95"]
            text += f" (95 % interval {low:.1%} to {high:.1%})"
        say(
            f"accuracy {text}: {record['answered']} of {record['questions']} questions answered, "
            f"{record.get('overflow', 0)} did not fit the context, {record.get('cut', 0)} articles cut [{', '.join(asked)}]"
        )
    elif figure == "perplexity":
        say(
            f"perplexity {record['perplexity']:.4f} ({record['nll_nats_per_token']:.4f} nats/token over "
            f"{record['tokens']:,} tokens) [{record['protocol']}, window {record.get('window')}]"
        )
    else:
        say(f"{figure} {record[figure]:g} [{', '.join(asked)}]")
    if record.get("base"):
        _divergence(record)


def _divergence(record: AnyRecord) -> None:
    """What changed from the base, a line for predictions and one for perplexity or answers."""
    kept = record["base"]["kept"]
    say(
        f"against {record['base']['model']}: KL {show_kl(record['kl_nats_per_token'])} nats/token"
        f"{_interval(record['kl_nats_per_token_interval'], show_kl)}"
        f"{f', a lower bound by {kept:,} kept tokens' if kept else ''}, "
        f"99 % of them below {show_kl(record['kl_nats_percentiles']['99'])}; "
        f"same top token {show_percent(record['same_top_share'])}, "
        f"expected acceptance {show_percent(record['expected_acceptance'])}"
    )
    if record.get("perplexity_ratio"):
        around = _interval(record["perplexity_ratio_interval"], "{:.4f}".format)
        say(f"perplexity {record['perplexity_ratio']:.4f} times the base's {record['base_perplexity']:.4f}{around}")
    else:
        difference = show_difference(record["accuracy_difference"], record["accuracy_difference_p_value"])
        say(
            f"accuracy {difference} points from the base's {show_percent(record['base_accuracy'])}; the same answer to "
            f"{show_percent(record['agreement'])}, right to wrong {record['right_to_wrong']}, "
            f"wrong to right {record['wrong_to_right']}"
        )


def _interval(ends: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return f" (95 % interval {show(ends[0])} to {show(ends[1])})" if ends else ""


def benchmark(record: AnyRecord) -> None:
    """The figures of one benchmark, and what was not measured."""
    say(f"{record['model']} on {record['device']}:")
    ttft, low, high = record["ttft_ms"], record["decode_ms_p10"], record["decode_ms_p90"]
    say(f"  prefill   {ttft:.1f} ms to the first token ({record['prefill_tokens_per_s']:.0f} tokens/s)")
    say(
        f"  decode    {record['decode_ms_median']:.2f} ms a token, p10 {low:.2f}, p90 {high:.2f} "
        f"({record['decode_tokens_per_s']:.1f} tokens/s)"
    )
    floor = f"{record['floor_share']:.0%} of what {record['bandwidth_gb_per_s']:.1f} GB/s allow"
    if record.get("floor_beside_share") is not None:
        near, low, high = (record[f"floor_beside_share{end}"] for end in ("", "_p10", "_p90"))
        floor += f"; of what the bandwidth beside each run allows {near:.0%}, p10 {low:.0%}, p90 {high:.0%}"
    say(f"  floor     {floor}")
    peak, long = record["peak_memory_bytes"], record.get("long_prompt") or {}
    peaks = "peak not measured" if peak is None else f"{_size(peak)} peak at {record['prompt_tokens']} prompt tokens"
    if long.get("peak_memory_bytes") is not None:
        peaks += f", {_size(long['peak_memory_bytes'])} at {long['prompt_tokens']}"
    say(f"  memory    {peaks}, {_size(record['weight_bytes'])} weights")
    kernels = ", ".join(f"{name} x{count}" for name, count in record["kernels"].items())
    say(f"  kernels   {kernels}; decode {record['decode_kernel']}")
    for note in record["notes"]:
        if note.startswith("PyTorch's own operations ran"):
            say(f"  {note}")
    for what, why in record.get("not_measured", {}).items():
        say(f"  not measured: {what} ({why})")


def trial(row: dict[str, Any]) -> None:
    """One line as a trial of a search is measured."""
    verdict = "clears the floor" if row["feasible"] else "does not clear the floor"
    quality = [f"{figure.label} {figure.show(row[figure.key])}" for figure in qualities(row)]
    measured = [f"{_size(row['bytes'])} on disk", f"{_size(row['memory'])} in memory"]
    measured += [f"{row['ms']:.2f} ms a token"] if "ms" in row else []
    say(f"{_point(row)}: {', '.join([*quality, *measured, verdict])}")


def search(record: dict[str, Any], out: Path) -> None:
    """The Pareto front of a search, its winner, and what there is to know about it."""
    judged = Judged.of(record)
    table = Table(title=f"{len(record['trials'])} trials; none is better in both", title_justify="left")
    for title in ("recipe", judged.quality.label, judged.cost.label, "floor"):
        table.add_column(title, justify="left" if title == "recipe" else "right")
    for row in record["pareto"]:
        shown = [judged.quality.show(row[judged.quality.key]), judged.cost.show(judged.cost_of(row))]
        table.add_row(plain(_point(row)), *shown, "yes" if row["feasible"] else "no")
    console().print(table)
    winner = record["winner"]
    held_out = [_held_out(figure, winner, record["dense"]) for figure in qualities(winner)]
    count, unit = next((record["held_out_data"][unit], unit) for unit in UNITS if unit in record["held_out_data"])
    level = record["floor"][f"held_out_{judged.limited.key}"]
    say(
        f"winner: {_point(winner)}: {_size(winner['bytes'])} on disk, {winner['bytes_share']:.0%} of the dense model; "
        f"{', '.join(held_out)} on {count} {unit} no trial has seen: "
        f"{'confirmed' if winner['confirmed'] else 'NOT confirmed'}, {judged.limited.bound(level)}"
    )
    if record.get("kept_tokens"):
        say(f"note: KL is a lower bound, from the dense model's {record['kept_tokens']:,} most probable tokens")
    for note in record["notes"]:
        say(f"note: {note}")
    say(
        f"the winner is in {out / 'winner'}, everything measured in {out / 'search.json'}, the plot in {out / 'pareto.png'}"
    )


def _held_out(figure: Figure, winner: dict[str, Any], dense: dict[str, Any]) -> str:
    """A figure of the winner with its interval, and the dense model's where that is not known by itself."""
    low, high = figure.ends(winner, "held_out_")
    around = "" if low is None or high is None else f" (95 % interval {figure.show_interval(low, high)})"
    beside = f", dense {figure.show(dense['held_out_accuracy'])}" if figure.key == "accuracy" else ""
    return f"{figure.label} {figure.show(winner[f'held_out_{figure.key}'])}{around}{beside}"


def _point(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in row["parameters"].items())
