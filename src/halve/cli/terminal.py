"""Plans and results as people read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halve.measure.quality.tasks import figure_of
from halve.measure.records import AnyRecord
from halve.measure.units import show_bytes, show_difference, show_duration, show_kl, show_percent

if TYPE_CHECKING:
    from pathlib import Path

    from halve.compression.compress import RecipePlan, Result
    from halve.compression.methods import Method
    from halve.compression.plan import StepPlan
    from halve.studies.system1.needs import Needs


_size = partial(show_bytes, decimals=2)


def plan(recipe: RecipePlan, steps: list[Method]) -> None:
    """What every step will do, one line per kind of linear, and the sizes before and after."""
    console = Console()
    for number, (method, step) in enumerate(zip(steps, recipe.steps, strict=True), 1):
        console.print(_step_table(f"step {number}: {method.name}", step))
    ratio = recipe.bytes_after / recipe.bytes_before
    console.print(
        f"weights: {_size(recipe.bytes_before)} -> {_size(recipe.bytes_after)} ({ratio:.0%}); "
        f"disk while working: {_size(recipe.disk_bytes)}; memory: about {_size(recipe.estimate.memory_bytes)}; "
        f"time: about {show_duration(recipe.estimate.seconds)}"
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
        table.add_row(name, str(count), what, _size(before), _size(after))
    return table


def steps(methods: dict[str, type]) -> None:
    """Every step with its description, options and defaults."""
    console = Console()
    for name, method in methods.items():
        options = ",".join(f"{f.name}={_text(f.default)}" for f in dataclasses.fields(method))
        console.print(f"[bold]{name}[/bold]:{escape(options)}", soft_wrap=True, highlight=False)
        console.print(f"    {escape(' '.join((method.__doc__ or '').split()))}\n", highlight=False)


def _text(default: object) -> str:
    return "|".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()


def needs(what: Needs) -> None:
    """Memory, disk and time of a study, before it begins."""
    print(
        f"needs about {_size(what.memory_bytes)} of memory ({_size(what.together_bytes)} to time all models side by side), "
        f"{_size(what.disk_bytes)} of disk, and at most about {show_duration(what.seconds)}"
    )


def result(done: Result) -> None:
    """What every step left of the linears, where the result is, and what is worth knowing about it."""
    console = Console()
    for step in done.manifest["steps"][-len(done.plan.steps) :]:
        sizes = " -> ".join(_size(step[f"linear_bytes_{when}"]) for when in ("before", "after"))
        counts = " -> ".join(f"{step[f'parameters_{when}']:,}" for when in ("before", "after"))
        console.print(f"{step['step']}: linears {sizes}, parameters {counts}", soft_wrap=True, highlight=False)
    for note in done.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {done.out}", soft_wrap=True)


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
        print(f"accuracy {text}: {record['answered']} of {record['questions']} questions answered", end="")
        print(f", {record.get('overflow', 0)} did not fit the context, {record.get('cut', 0)} articles cut", end="")
        print(f" [{', '.join(asked)}]")
    elif figure == "perplexity":
        print(
            f"perplexity {record['perplexity']:.4f} ({record['nll_nats_per_token']:.4f} nats/token over "
            f"{record['tokens']:,} tokens) [{record['protocol']}, window {record.get('window')}]"
        )
    else:
        print(f"{figure} {record[figure]:g} [{', '.join(asked)}]")
    if record.get("base"):
        _divergence(record)


def _divergence(record: AnyRecord) -> None:
    """What changed from the base, a line for predictions and one for perplexity or answers."""
    kept = record["base"]["kept"]
    print(
        f"against {record['base']['model']}: KL {show_kl(record['kl_nats_per_token'])} nats/token"
        f"{_interval(record['kl_nats_per_token_interval'], show_kl)}"
        f"{f', a lower bound by {kept:,} kept tokens' if kept else ''}, "
        f"99 % of them below {show_kl(record['kl_nats_percentiles']['99'])}; "
        f"same top token {show_percent(record['same_top_share'])}, "
        f"expected acceptance {show_percent(record['expected_acceptance'])}"
    )
    if record.get("perplexity_ratio"):
        around = _interval(record["perplexity_ratio_interval"], "{:.4f}".format)
        print(f"perplexity {record['perplexity_ratio']:.4f} times the base's {record['base_perplexity']:.4f}{around}")
    else:
        difference = show_difference(record["accuracy_difference"], record["accuracy_difference_p_value"])
        print(
            f"accuracy {difference} points from the base's {show_percent(record['base_accuracy'])}; the same answer to "
            f"{show_percent(record['agreement'])}, right to wrong {record['right_to_wrong']}, "
            f"wrong to right {record['wrong_to_right']}"
        )


def _interval(ends: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return f" (95 % interval {show(ends[0])} to {show(ends[1])})" if ends else ""


def benchmark(record: AnyRecord) -> None:
    """The figures of one benchmark, and what was not measured."""
    print(f"{record['model']} on {record['device']}:")
    ttft, low, high = record["ttft_ms"], record["decode_ms_p10"], record["decode_ms_p90"]
    print(f"  prefill   {ttft:.1f} ms to the first token ({record['prefill_tokens_per_s']:.0f} tokens/s)")
    print(
        f"  decode    {record['decode_ms_median']:.2f} ms a token, p10 {low:.2f}, p90 {high:.2f} "
        f"({record['decode_tokens_per_s']:.1f} tokens/s)"
    )
    print(f"  floor     {record['floor_share']:.0%} of what {record['bandwidth_gb_per_s']:.1f} GB/s allow")
    peak = record["peak_memory_bytes"]
    print(
        f"  memory    {'peak not measured' if peak is None else _size(peak) + ' peak'}, {_size(record['weight_bytes'])} weights"
    )
    kernels = ", ".join(f"{name} x{count}" for name, count in record["kernels"].items())
    print(f"  kernels   {kernels}; decode {record['decode_kernel']}")
    for note in record["notes"]:
        if note.startswith("PyTorch's own operations ran"):
            print(f"  {note}")
    for what, why in record.get("not_measured", {}).items():
        print(f"  not measured: {what} ({why})")


def trial(row: dict[str, Any]) -> None:
    """One line as a trial of a search is measured."""
    verdict = "clears the floor" if row["feasible"] else "below the floor"
    print(f"{_point(row)}: accuracy {row['accuracy']:.1%}, {_size(row['bytes'])}, {verdict}", flush=True)


def search(record: dict[str, Any], out: Path) -> None:
    """The Pareto front of a search, its winner, and what there is to know about it."""
    console, objective = Console(), record["objective"]
    table = Table(title=f"{len(record['trials'])} trials; none is better in both", title_justify="left")
    for title in (
        "recipe",
        "accuracy",
        objective if objective == "decode_ms" else objective.replace("_", " "),
        "floor",
    ):
        table.add_column(title, justify="left" if title == "recipe" else "right")
    for row in record["pareto"]:
        shown = f"{row['objective']:.2f}" if objective == "decode_ms" else _size(row["objective"])
        table.add_row(_point(row), f"{row['accuracy']:.1%}", shown, "yes" if row["feasible"] else "no")
    console.print(table)
    winner, dense = record["winner"], record["dense"]
    low, high = winner["held_out_accuracy_ci95"]
    print(
        f"winner: {_point(winner)}: {_size(winner['bytes'])}, {winner['bytes_share']:.0%} of the dense model; "
        f"accuracy {winner['held_out_accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) on "
        f"{record['held_out_data']['questions']} questions no trial has seen, dense {dense['held_out_accuracy']:.1%}: "
        f"{'confirmed' if winner['confirmed'] else 'NOT confirmed'} above {record['floor']['held_out_accuracy']:.1%}"
    )
    for note in record["notes"]:
        print(f"note: {note}")
    print(
        f"the winner is in {out / 'winner'}, everything measured in {out / 'search.json'}, the plot in {out / 'pareto.png'}"
    )


def _point(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in row["parameters"].items())
