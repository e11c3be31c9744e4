"""The command line: parse, call one function, print. Defaults live with the functions or here, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import halve
from halve.errors import HalveError
from halve.machine import ask_for_huge_pages

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

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, halve checkpoint, or hub id (owner/name).")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bf16 or fp32: the type of computation (default: the model's own).", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds something.")]
Json = Annotated[Path | None, typer.Option(help="Write one record to this file.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _dtype(name: str | None):
    from halve.checkpoint import DTYPES

    if name is not None and name not in ("bf16", "fp32"):
        raise HalveError(f"--dtype {name!r} is not known: use bf16 or fp32")
    return None if name is None else DTYPES[name]


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
    calibration: Annotated[
        str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
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
    from halve import show
    from halve.compression import Request, plan_recipe
    from halve.compression import compress as run
    from halve.recipe import as_steps, read_recipe

    if step and recipe:
        raise HalveError("--step and --recipe were both given: use one of them")
    steps = read_recipe(recipe) if recipe else as_steps(step or [])
    options = {"calibration": calibration, "samples": samples, "window": window, "seed": seed, "device": device}
    if dry_run:
        plan = plan_recipe(Request(model, out, steps, dtype=_dtype(dtype), **options))
        show.plan(plan, steps)
        return
    result = run(
        model, out, steps, dtype=_dtype(dtype), overwrite=overwrite, on_plan=lambda p: show.plan(p, steps), **options
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
    from halve import show
    from halve.checkpoint import load_model
    from halve.evaluation import prepare
    from halve.records import check_output_path, new_record, write_record
    from halve.tokenizer import load_tokenizer

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
    loaded = load_model(model, dtype=_dtype(dtype), device=device)
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
    from halve import show
    from halve.benchmarking import Placement, Settings, benchmark_side_by_side
    from halve.records import check_output_path, write_record

    settings = Settings(prompt_tokens, new_tokens, runs, long_prompt_tokens)
    placement = Placement(device, _dtype(dtype), backend, random_weights)
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
    from halve.checkpoint import load_model
    from halve.generation import Sampling, generate_text
    from halve.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p, seed)
    loaded, tokenizer = load_model(model, dtype=_dtype(dtype), device=device), load_tokenizer(model)

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
    from halve.comparison import compare as run
    from halve.records import read_records

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


@app.command()
def layers(
    model: Model,
    data: Annotated[str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables (CSV, JSON) and the plot.")],
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens a window (at most the model's context).")] = 2048,
    mark: Annotated[
        int | None, typer.Option(help="Point out the best run of this many layers in the plot.", show_default=False)
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure how far every run of layers and every sublayer of MODEL turns the hidden state: what can go first."""
    from halve.layer_analysis import analyse_layers

    analyse_layers(model, data, out, samples=samples, window=window, mark=mark, seed=seed, device=device)
    print(f"tables and plot are in {out}")


@app.command()
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
    protocol: Annotated[str, typer.Option(help="How the right way asks: letter, continuation, pmi, generate.")] = (
        "letter"
    ),
    template: Annotated[
        str | None, typer.Option(help="race (default) or plain, for continuation and pmi.", show_default=False)
    ] = None,
    own_protocol: Annotated[
        str, typer.Option(help="The same of its own way; another one for a model that cannot answer in letters.")
    ] = "system1",
    limit: Annotated[int | None, typer.Option(help="The first N questions only.", show_default=False)] = None,
    calibration: Annotated[
        str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
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
    from halve import show
    from halve.reproduction import Study, reproduce_system1, tables
    from halve.reproduction.system1 import check

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
        "dtype": _dtype(dtype),
    }
    if dry_run:
        needs = check(Study(model, out, **options))[1]
        show.needs(needs)
        needs.check(out, device)
        return
    record = reproduce_system1(model, out, on_needs=show.needs, overwrite=overwrite, **options)
    for title, table in tables(record):
        print(f"\n{title}")
        table.print()
    print(f"models, records and reproduce.json are in {out}")


@app.command()
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
    floor: Annotated[str, typer.Option(help="Accuracy to keep: 0.5, or 95% of the dense model's.")],
    minimise: Annotated[str, typer.Option(help="bytes, decode_ms or peak_memory.")] = "bytes",
    floor_lower_bound: Annotated[
        bool, typer.Option("--floor-lower-bound", help="The lower end of the 95 % interval has to clear the floor.")
    ] = False,
    task: Annotated[str, typer.Option(help="race-h or multiple-choice.")] = "race-h",
    data: Annotated[
        str | None,
        typer.Option(
            help="Questions to search on; without --held-out-data divided by article. race-h without it searches on the "
            "validation set and confirms on the test.",
            show_default=False,
        ),
    ] = None,
    held_out_data: Annotated[
        str | None, typer.Option(help="Questions the winner is confirmed on.", show_default=False)
    ] = None,
    search_share: Annotated[float, typer.Option(help="Share of --data to search on, where it is divided.")] = 0.5,
    leave_out_shared: Annotated[
        bool, typer.Option("--leave-out-shared", help="Leave out search questions whose article is in the final test.")
    ] = False,
    protocol: Annotated[str | None, typer.Option(help="As for evaluate.", show_default=False)] = None,
    template: Annotated[str | None, typer.Option(help="As for evaluate.", show_default=False)] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first N questions to search on only.", show_default=False)
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
    calibration: Annotated[
        str, typer.Option(help=".txt, .jsonl, a RACE folder, or c4 | wikitext2 from the hub.", metavar="NAME|FILE")
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens a window (at most the model's context).")] = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Find how far a recipe can go with the accuracy of MODEL above a floor: the smallest, or fastest, such model.

    One varied option is bisected, several are searched by Optuna. The winner, in OUT/winner, is confirmed on questions
    no trial has seen. The same command goes on with an interrupted search, and run twice at once shares the work.
    """
    from halve import show
    from halve.searching import search as run

    record = run(
        model,
        out,
        step,
        vary,
        floor=floor,
        minimise=minimise,
        task=task,
        data=data,
        held_out_data=held_out_data,
        search_share=search_share,
        leave_out_shared=leave_out_shared,
        protocol=protocol,
        template=template,
        limit=limit,
        floor_lower_bound=floor_lower_bound,
        resolution=resolution,
        trials=trials,
        storage=storage,
        keep_checkpoints=keep_checkpoints,
        calibration=calibration,
        samples=samples,
        window=window,
        seed=seed,
        device=device,
        dtype=_dtype(dtype),
        overwrite=overwrite,
        on_trial=show.trial,
    )
    show.search(record, out)


@app.command()
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
    from halve.page import write_page

    print(f"wrote {write_page(folder, out, title=title)}")


@app.command()
def fetch(model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id (owner/name).")]) -> None:
    """Download MODEL from the Hugging Face hub once; every command then takes its id, without a network.

    Takes safetensors, config and tokenizer. It lands in the hub's own cache (set HF_HOME to move it).
    """
    from halve.hub import fetch as run

    folder = run(model)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{model}: {size / 1e9:.2f} GB in {folder}")


@app.command()
def convert(model: Model, out: Out, overwrite: Overwrite = False) -> None:
    """Turn a folder of pickled .bin weights into safetensors (most OPT checkpoints need it)."""
    from halve.conversion import convert as run

    print(f"wrote {run(model, out, overwrite=overwrite)}")


@app.command()
def steps() -> None:
    """List the steps a recipe may have, with their options and defaults."""
    from halve import show
    from halve.methods import METHODS

    show.steps(METHODS)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(halve.__version__)
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
