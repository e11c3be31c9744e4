"""Commands that measure many models, or many layers, at once, and show what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halve.cli.options import (
    Calibration,
    Device,
    Dtype,
    Model,
    Overwrite,
    Protocol,
    Samples,
    Seed,
    Template,
    Window,
    dtype_of,
    listed,
)
from halve.cli.output import complain, say
from halve.errors import HalveError
from halve.measure.quality.protocols import PROTOCOLS
from halve.measure.quality.tasks import QUESTION_TASKS
from halve.studies.search.options import TEXT_TASK, SearchOptions
from halve.studies.system1.protocol import SYSTEM1, protocol_named


def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for models, records and the plot.")] = Path(
        "halve-demo"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Compress the bundled model in several ways; reload, examine and time each; one table, one plot."""
    from halve.demo.run import demo as run
    from halve.demo.run import speed_table

    run(out, overwrite=overwrite).print()
    say(
        "A model this small is bound by overhead, not by memory: its speeds and peak memory say little, its accuracy and "
        "bytes are what this table shows."
    )
    speeds = speed_table()
    if speeds is not None:
        print()
        say("Speed at the shape of Llama-3.2-1B (random weights), from the records of this checkout:")
        speeds.print()
    say(f"models, records, accuracy-size.png and the page report.html are in {out}")


def layers(
    model: Model,
    data: Annotated[str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables (CSV, JSON) and the plot.")],
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    window: Window = 2048,
    mark: Annotated[
        int | None, typer.Option(help="Point out the best run of this many layers in the plot.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure how far every run of layers and every sublayer of MODEL turns the hidden state: what can go first."""
    from halve.studies.layers import analyse_layers

    analyse_layers(model, data, out, samples=samples, window=window, mark=mark, seed=seed, device=device)
    say(f"tables and plot are in {out}")


def search(
    model: Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the search: new, empty, or of the same search.")
    ],
    step: Annotated[list[str], typer.Option(help="NAME:key=value,... One step of the recipe; repeat for several.")],
    vary: Annotated[
        list[str],
        typer.Option(
            help="STEP.key=LOW..HIGH or STEP.key=A|B|C; STEP is a step's name, or its position where it is twice."
        ),
    ],
    floor: Annotated[
        str | None, typer.Option(help="Accuracy to keep: 0.5, or 95% of the dense model's.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Instead: KL divergence from MODEL of at most this many nats a token.", show_default=False),
    ] = None,
    min_same_top: Annotated[
        str | None,
        typer.Option(help="Instead: MODEL's most probable token at 97% of positions or more.", show_default=False),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="Instead: the best model of at most 20MB of weights on disk, or 25% of MODEL's.", show_default=False
        ),
    ] = None,
    minimise: Annotated[
        str | None,
        typer.Option(
            help="bytes of the weights on disk (default), memory they take while decoding on this machine, or ms of a "
            "decode step; with --max-bytes kl (default of task kl).",
            show_default=False,
        ),
    ] = None,
    floor_lower_bound: Annotated[
        bool,
        typer.Option("--floor-lower-bound", help="The worse end of the 95 % interval has to keep the limit."),
    ] = False,
    task: Annotated[
        str, typer.Option(help=f"{listed(QUESTION_TASKS, 'or')}, or {TEXT_TASK}: a text, compared with MODEL itself.")
    ] = "race-h",
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions or text to search on; without --held-out-data divided by article or document. race-h without it "
            "searches on the validation set and confirms on the test.",
            show_default=False,
        ),
    ] = None,
    held_out_data: Annotated[
        str | None, typer.Option(help="Questions or text the winner is confirmed on.", show_default=False)
    ] = None,
    search_share: Annotated[float, typer.Option(help="Share of --data to search on, where it is divided.")] = 0.5,
    leave_out_shared: Annotated[
        bool,
        typer.Option(
            "--leave-out-shared",
            help="Leave out search questions whose article is in the final test; of a text all documents found elsewhere.",
        ),
    ] = False,
    protocol: Protocol = None,
    template: Template = None,
    limit: Annotated[
        int | None,
        typer.Option(help="The first N questions, windows or documents to search on only.", show_default=False),
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(help="Distance of the values tried (default: 0.01; whole numbers are exact).", show_default=False),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Points to try where several options vary (default: 40).", show_default=False)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="SQL URL of the study, to share it between machines (default: OUT/study.db).", show_default=False
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep every trial's model; else the winner's alone.")
    ] = False,
    calibration: Calibration = "c4",
    samples: Samples = 128,
    window: Window = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Find how far a recipe can go: the smallest, or fastest, model with an accuracy or a KL divergence within a limit.

    One limit is given: --floor, --max-kl, --min-same-top or --max-bytes. One varied option is bisected, several are
    searched by Optuna. The winner, in OUT/winner, is confirmed on what no trial has seen. The same command goes on with an
    interrupted search, and run twice at once shares the work.
    """
    from halve.cli import terminal
    from halve.compression.windows import CalibrationOptions
    from halve.measure.quality.options import EvaluationOptions
    from halve.studies.search.search import search as run

    record = run(
        model,
        out,
        step,
        vary,
        floor=floor,
        max_kl=max_kl,
        min_same_top=min_same_top,
        max_bytes=max_bytes,
        floor_lower_bound=floor_lower_bound,
        evaluation=EvaluationOptions(
            "perplexity" if task == TEXT_TASK else task, data, protocol_named(protocol), template, limit, seed=seed
        ),
        calibration=CalibrationOptions(calibration, samples, window, seed),
        options=SearchOptions(
            minimise,
            held_out_data,
            search_share,
            leave_out_shared,
            resolution,
            trials,
            storage,
            keep_checkpoints,
            seed,
        ),
        device=device,
        dtype=dtype_of(dtype),
        overwrite=overwrite,
        on_trial=terminal.trial,
    )
    terminal.search(record, out)


def reproduce(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="system1: GPTQ and L1 pruning of Llama-3.2-3B.")],
    model: Annotated[str, typer.Option(help="Folder or hub id; a config.json with --random-weights.")],
    out: Annotated[Path, typer.Option(help="Folder for models, records and tables; a rerun goes on there.")] = Path(
        "halve-reproduce"
    ),
    data: Annotated[
        str | None,
        typer.Option(help="Questions in RACE's layout (default: RACE-H's test set from the hub).", show_default=False),
    ] = None,
    protocol: Annotated[str, typer.Option(help=f"How the right way asks: {listed(PROTOCOLS)}.")] = "letter",
    template: Annotated[
        str | None, typer.Option(help="race (default) or plain, for continuation and pmi.", show_default=False)
    ] = None,
    own_protocol: Annotated[
        str, typer.Option(help="The same of its own way; another one for a model that cannot answer in letters.")
    ] = SYSTEM1.name,
    limit: Annotated[int | None, typer.Option(help="The first N questions only.", show_default=False)] = None,
    calibration: Calibration = "c4",
    samples: Samples = 128,
    floor: Annotated[float, typer.Option(help="The accuracy that the largest fractions keep.")] = 0.5,
    fractions: Annotated[bool, typer.Option(help="Look for the largest fractions as well.")] = True,
    runs: Annotated[int, typer.Option(help="Runs the median speeds are taken over.")] = 5,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="MODEL is a config alone: speed and memory, no accuracy.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it needs and stop.")] = False,
) -> None:
    """Make the tables of a published study again: its own way and the right way, beside what it published.

    Says first how much memory, disk and time it takes, and refuses what cannot do. An interrupted run is continued by
    the same command.
    """
    from halve.cli import terminal
    from halve.studies.system1.reproduce import Study, check, reproduce_system1
    from halve.studies.system1.tables import tables

    if study != "system1":
        raise HalveError(f"study {study!r} is not known: use system1")
    options = {
        "data": data,
        "protocol": protocol,
        "template": template,
        "own_protocol": own_protocol,
        "limit": limit,
        "calibration": calibration,
        "samples": samples,
        "floor": floor,
        "fractions": fractions,
        "runs": runs,
        "random_weights": random_weights,
        "device": device,
        "dtype": dtype_of(dtype),
    }
    if dry_run:
        needs = check(Study(model, out, **options))[1]
        terminal.needs(needs)
        needs.check(out, device)
        return
    record = reproduce_system1(model, out, on_needs=terminal.needs, overwrite=overwrite, **options)
    for title, table in tables(record):
        print()
        say(title)
        table.print()
    say(f"models, records and reproduce.json are in {out}")


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Records, compressed models, a study, or all of them.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page to write (default: FOLDER/report.html).", show_default=False)
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Its title (default: the folder's name).", show_default=False)
    ] = None,
) -> None:
    """Write one self-contained HTML page about everything in FOLDER: tables, plots, recipes, machine."""
    from halve.report.page import write_page

    page = write_page(folder, out, title=title, on_left_out=lambda why: complain(f"left out: {why}"))
    say(f"wrote {page}")


def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A model that halve compressed.")],
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECORD.json... | FOLDER]", help="What was measured of it, beside its halve-check.json."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a README.md that halve did not write, or that was changed since."),
    ] = False,
) -> None:
    """Write the model card of OUT, its README.md, again: what was done, what it cost, how to load it.

    Only records of this very model count, told by content. Licence, language and base model in the card that is there stay.
    """
    from halve.report.card import write_card

    written = write_card(out, records or (), overwrite=overwrite, on_left_out=lambda why: complain(f"left out: {why}"))
    say(f"wrote {written}")
