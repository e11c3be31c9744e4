"""The command line: parse, call one function, print. Defaults live with the functions or here, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from halve._version import __version__
from halve.cli import studies as cli_studies
from halve.cli.options import Calibration, Device, Dtype, Json, Model, Out, Overwrite, Samples, Seed, dtype_of
from halve.errors import HalveError
from halve.measure.machine import ask_for_huge_pages

app = typer.Typer(
    name="halve",
    help="Make a large language model smaller and faster without retraining it, and know what that cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer brings its own copy of click in some versions; this is the base of its usage errors in all of them
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _command() -> str:
    return "halve " + shlex.join(sys.argv[1:])


@app.command()
def compress(
    model: Model,
    out: Out,
    step: Annotated[
        list[str] | None,
        typer.Option(help="NAME:key=value,... One step; repeat for several, they run in order.", show_default=False),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The same steps as a YAML list.", show_default=False)] = None,
    calibration: Calibration = "c4",
    samples: Samples = 128,
    window: Annotated[int, typer.Option(help="Tokens a window (at most the model's context).")] = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop before any weight is read.")
    ] = False,
) -> None:
    """Quantize or prune MODEL by a recipe of steps and write the result to OUT.

    For example `--step rtn:bits=8` (int8 weight-only); `halve steps` lists all steps and their options. Every linear is
    listed as done or skipped with its reason. An interrupted run is continued by the same command.
    """
    from halve.cli import terminal as show
    from halve.compression.compress import Request, plan_recipe
    from halve.compression.compress import compress as run
    from halve.compression.recipe import as_steps, read_recipe

    if step and recipe:
        raise HalveError("--step and --recipe were both given: use one of them")
    steps = read_recipe(recipe) if recipe else as_steps(step or [])
    options = {"calibration": calibration, "samples": samples, "window": window, "seed": seed, "device": device}
    if dry_run:
        plan = plan_recipe(Request(model, out, steps, dtype=dtype_of(dtype), **options))
        show.plan(plan, steps)
        return
    result = run(
        model, out, steps, dtype=dtype_of(dtype), overwrite=overwrite, on_plan=lambda p: show.plan(p, steps), **options
    )
    show.result(result)


@app.command()
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="perplexity, race-h or multiple-choice.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text (.txt, .raw, .jsonl) or questions in RACE's layout (.jsonl, folder, hub:NAME:CONFIG:SPLIT); "
            "race-h without it takes the test set from the hub.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="letter (default), continuation, pmi, generate or system1 for questions; windows (default) or documents "
            "for perplexity.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="race (default) or plain: the prompt of continuation and pmi.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first N questions, windows or documents only.", show_default=False)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens a window of perplexity (default: the context, at most 2048).", show_default=False),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = None,
) -> None:
    """Measure the perplexity or multiple-choice accuracy of MODEL, the very folder that will ship.

    With --json an interrupted run is continued by the same command.
    """
    from halve.checkpoint.reader import load_model
    from halve.checkpoint.tokenizer import load_tokenizer
    from halve.cli import terminal as show
    from halve.measure.quality.evaluate import prepare
    from halve.measure.records import check_output_path, new_record, write_record

    progress_file = None
    if json is not None:
        progress_file = check_output_path(json).with_suffix(".progress.jsonl")
    run = prepare(
        task=task,
        data=data,
        protocol=protocol,
        template=template,
        limit=limit,
        window=window,
        seed=seed,
        progress_file=progress_file,
    )
    loaded = load_model(model, dtype=dtype_of(dtype), device=device)
    figures = run(loaded, load_tokenizer(model))
    record = new_record("evaluation", model, device=device, dtype=str(loaded.dtype).removeprefix("torch."), **figures)
    show.evaluation(record)
    if json is not None:
        print(f"wrote {write_record(json, record)}")


@app.command()
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
    json: Json = None,
) -> None:
    """Measure prefill and decode at batch 1, peak memory, and the share of the memory-bandwidth limit reached.

    With several models the runs take turns, so that their ratios hold; --json then names a folder.
    """
    from halve.cli import terminal as show
    from halve.measure.records import check_output_path, write_record
    from halve.measure.speed.benchmark import Placement, Settings, benchmark_side_by_side

    settings = Settings(prompt_tokens, new_tokens, runs, long_prompt_tokens)
    placement = Placement(device, dtype_of(dtype), backend, random_weights)
    if len(model) > 1 and profile is not None:
        raise HalveError(f"--profile takes one model, {len(model)} were given")
    targets = []
    if json is not None:
        names = (
            [json] if len(model) == 1 else [json / f"{number}-{Path(m).name}.json" for number, m in enumerate(model, 1)]
        )
        if len(model) > 1:
            json.mkdir(parents=True, exist_ok=True)
        targets = [check_output_path(name) for name in names]
    plot = None if profile is None else check_output_path(profile)
    records = benchmark_side_by_side(model, settings, placement, profile_plot=plot)
    for record in records:
        show.benchmark(record)
    for target, record in zip(targets, records, strict=False):
        print(f"wrote {write_record(target, record)}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeat for several at once.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that hold this probability; 1 is off.")
    ] = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Continue text with MODEL, streaming to the terminal."""
    from halve.checkpoint.reader import load_model
    from halve.checkpoint.tokenizer import load_tokenizer
    from halve.decode.generate import generate_text
    from halve.decode.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    loaded, tokenizer = load_model(model, dtype=dtype_of(dtype), device=device), load_tokenizer(model)

    def stream(piece: str) -> None:
        print(piece, end="", flush=True)

    single = len(prompt) == 1
    if single:
        stream(prompt[0])
    results = generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, on_text=stream if single else None
    )
    print("" if single else "\n\n".join(p + r.text for p, r in zip(prompt, results, strict=True)))


@app.command()
def compare(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD.json... | FOLDER", help="Records, or folders of them.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Put records of evaluations and benchmarks into one table, a row a model, tested against the first row."""
    from halve.measure.records import read_records
    from halve.measure.table import compare as run

    if markdown and csv:
        raise HalveError("--markdown and --csv were both given: use one of them")
    table = run(read_records(records))
    if markdown or csv:
        print(table.markdown() if markdown else table.csv(), end="")
    else:
        table.print()


@app.command()
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
    print(
        "A model this small is bound by overhead, not by memory: its speeds and peak memory say little, its accuracy and "
        "bytes are what this table shows."
    )
    speeds = speed_table()
    if speeds is not None:
        print("\nSpeed at the shape of Llama-3.2-1B (random weights), from the records of this checkout:")
        speeds.print()
    print(f"models, records, accuracy-size.png and the page report.html are in {out}")


for command in (cli_studies.layers, cli_studies.search, cli_studies.reproduce, cli_studies.report):
    app.command()(command)


@app.command()
def fetch(model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id (owner/name).")]) -> None:
    """Download MODEL from the Hugging Face hub once; every command then takes its id, without a network.

    Takes safetensors, config and tokenizer. It lands in the hub's own cache (set HF_HOME to move it).
    """
    from halve.checkpoint.hub import fetch as run

    folder = run(model)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{model}: {size / 1e9:.2f} GB in {folder}")


@app.command()
def convert(model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Turn a folder of pickled .bin weights into safetensors (most OPT checkpoints need it)."""
    from halve.checkpoint.convert import convert as run

    print(f"wrote {run(model, out, overwrite=overwrite)}")


@app.command()
def steps() -> None:
    """List the steps a recipe may have, with their options and defaults."""
    from halve.cli import terminal as show
    from halve.compression.methods import METHODS

    show.steps(METHODS)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the input or the request is wrong, 1 anything else."""
    ask_for_huge_pages()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="halve", standalone_mode=False)
    except HalveError as error:
        _fail(str(error))
    except UsageError as error:
        context = getattr(error, "ctx", None)
        message = getattr(error, "format_message", error.__str__)()
        _fail(message + (f" (see `{context.command_path} --help`)" if context else ""))
    except (typer.Abort, KeyboardInterrupt):
        print("halve: interrupted", file=sys.stderr)
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print("halve: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
