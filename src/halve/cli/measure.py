"""Commands that measure one model, or a few, and compare what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halve.cli.options import Device, Dtype, Json, Model, Protocol, Seed, Task, Template, Tp, dtype_of
from halve.cli.output import complain, say
from halve.cli.ranks import together
from halve.errors import HalveError
from halve.measure.quality.base_file import BASE_TOKENS
from halve.studies.system1.protocol import protocol_named


def evaluate(
    model: Model,
    task: Task,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text (.txt, .raw, .jsonl) or questions in RACE's layout (.jsonl, folder, hub:NAME:CONFIG:SPLIT); "
            "race-h without it takes the test set from the hub.",
            show_default=False,
        ),
    ] = None,
    protocol: Protocol = None,
    template: Template = None,
    limit: Annotated[
        int | None, typer.Option(help="The first N questions, windows or documents only.", show_default=False)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens a window of perplexity (default: the context, at most 2048).", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Compare with this: the model that MODEL was made from (folder or hub id), or a file of --save-base. Adds "
            "KL divergence, same top token, expected acceptance and paired tests.",
            show_default=False,
        ),
    ] = None,
    save_base: Annotated[
        Path | None,
        typer.Option(
            help="Keep the predictions of --base, or of MODEL without it, in this file: 6 kB a token.",
            show_default=False,
        ),
    ] = None,
    base_tokens: Annotated[int, typer.Option(help="Most probable tokens kept by --save-base.")] = BASE_TOKENS,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    tp: Tp = 1,
    json: Json = None,
) -> None:
    """Measure the perplexity or multiple-choice accuracy of MODEL, the very folder that will ship.

    With --json an interrupted run is continued by the same command.
    """
    from halve.cli import terminal
    from halve.measure.quality.evaluate import evaluate as run
    from halve.measure.records import check_record_path, write_record

    with together(tp, device) as (ranks, device):
        record = run(
            model,
            task=task,
            data=data,
            protocol=protocol_named(protocol),
            template=template,
            limit=limit,
            window=window,
            seed=seed,
            device=device,
            dtype=dtype_of(dtype),
            progress_file=None if json is None else check_record_path(json).with_suffix(".progress.jsonl"),
            base=base,
            save_base=save_base,
            base_tokens=base_tokens,
            ranks=ranks,
        )
        terminal.evaluation(record)
        if json is not None and not ranks.rank:
            say(f"wrote {write_record(json, record)}")


def benchmark(
    model: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One model, or several to measure side by side in one run."),
    ],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 64,
    runs: Annotated[int, typer.Option(help="Runs the medians are taken over, after a warm-up.")] = 5,
    long_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="A second, longer prompt; 0 leaves it out (default: 2048, left out where it would take over 5 minutes).",
            show_default=False,
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="MODEL is a config alone: speed does not depend on weight values.")
    ] = False,
    backend: Annotated[str, typer.Option(help="auto, or the name of one kernel backend.")] = "auto",
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Also profile: time and memory by operation, and the memory timeline as this PNG.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tp: Tp = 1,
    json: Json = None,
) -> None:
    """Measure prefill and decode at batch 1, peak memory, and the share of the memory-bandwidth limit reached.

    With several models the runs take turns, so that their ratios hold; --json then names a folder.
    """
    from halve.cli import terminal
    from halve.measure.pictures import check_picture_path
    from halve.measure.records import check_record_path, write_record
    from halve.measure.speed.benchmark import BenchmarkOptions, Placement, benchmark_side_by_side

    with together(tp, device) as (ranks, device):
        options = BenchmarkOptions(prompt_tokens, new_tokens, runs, long_prompt_tokens)
        placement = Placement(device, dtype_of(dtype), backend, random_weights, ranks)
        if len(model) > 1 and profile is not None:
            raise HalveError(f"--profile takes one model, {len(model)} were given")
        targets = []
        if json is not None:
            names = (
                [json]
                if len(model) == 1
                else [json / f"{number}-{Path(m).name}.json" for number, m in enumerate(model, 1)]
            )
            if len(model) > 1:
                json.mkdir(parents=True, exist_ok=True)
            targets = [check_record_path(name) for name in names]
        plot = None if profile is None else check_picture_path(profile)
        records = benchmark_side_by_side(model, options, placement, profile_plot=plot)
        for record in records:
            terminal.benchmark(record)
        for target, record in zip(targets if not ranks.rank else [], records, strict=False):
            say(f"wrote {write_record(target, record)}")


def compare(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD.json... | FOLDER", help="Records, or folders of them.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Put records of evaluations and benchmarks into one table, a row a model, tested against the first row."""
    from halve.measure.records import find_records
    from halve.measure.table import compare as run

    if markdown and csv:
        raise HalveError("--markdown and --csv were both given: use one of them")
    found = find_records(records)
    for why in found.left_out:
        complain(f"left out: {why}")
    table = run(found.records)
    if markdown or csv:
        print(table.markdown() if markdown else table.csv(), end="")
    else:
        table.print()
