"""Commands that make models and run them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.options import (
    Calibration,
    Device,
    Dtype,
    Model,
    Out,
    Overwrite,
    Samples,
    Seed,
    Temperature,
    TopK,
    TopP,
    Window,
    dtype_of,
)
from halve.cli.output import complain, say, stream
from halve.errors import HalveError, OutputError
from halve.files import resolve_out
from halve.files.contents import CHECK, OTHERWISE
from halve.measure.units import show_bytes

if TYPE_CHECKING:
    from halve.measure.quality.options import EvaluationOptions


def compress(
    model: Model,
    out: Out,
    step: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:key=value,... One step; repeat for several, they run in order. Patterns are separated by |; a comma "
            "or | in brackets or quotes is the pattern's own.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The same steps as a YAML list.", show_default=False)] = None,
    calibration: Calibration = "c4",
    samples: Samples = 128,
    window: Window = 2048,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Text (.txt, .raw, .jsonl) on which the result is compared with MODEL at the end: KL divergence, same top "
            f"token, perplexity; the record is {CHECK} in OUT.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop before any weight is read.")
    ] = False,
) -> None:
    """Quantize or prune MODEL by a recipe of steps and write the result to OUT.

    For example `--step rtn:bits=8` (int8 weight-only); `halve steps` lists all steps and their options. Every linear is
    listed as done or skipped with its reason. An interrupted run is continued by the same command.
    """
    from halve.cli import terminal
    from halve.compression.compress import Request, plan_recipe
    from halve.compression.compress import compress as run
    from halve.compression.recipe import as_steps, read_recipe
    from halve.compression.windows import CalibrationOptions
    from halve.report.card import write_card

    if step and recipe:
        raise HalveError("--step and --recipe were both given: use one of them")
    steps = read_recipe(recipe) if recipe else as_steps(step or [])
    question = None if check is None else _check_question(check, model, out)
    if dry_run:
        options = CalibrationOptions(calibration, samples, window, seed)
        terminal.plan(plan_recipe(Request(model, out, steps, options, device, dtype_of(dtype))), steps)
        return
    result = run(
        model,
        out,
        steps,
        calibration=calibration,
        samples=samples,
        window=window,
        seed=seed,
        device=device,
        dtype=dtype_of(dtype),
        overwrite=overwrite,
        on_plan=lambda plan: terminal.plan(plan, steps),
    )
    terminal.result(result)
    if question is not None:
        _compare_with_source(out, model, question, device, dtype)
    card = write_card(
        result.out, source=result.plan.checkpoint.folder, on_left_out=lambda why: complain(f"left out: {why}")
    )
    say(f"wrote {card}")


def _check_question(text: Path, model: str, out: Path) -> EvaluationOptions:
    """What --check asks of OUT and MODEL; all that can be wrong with the text is found here, before any weight is read."""
    from halve.checkpoint.reader import open_checkpoint
    from halve.checkpoint.tokenizer import load_tokenizer
    from halve.measure.quality.options import EvaluationOptions
    from halve.measure.quality.tasks.perplexity import asked_stretches, read_text

    protocol = "documents" if text.suffix == ".jsonl" else "windows"
    options = EvaluationOptions("perplexity", text, protocol)
    content = read_text(text, protocol)
    if text.resolve().is_relative_to(resolve_out(out)):
        raise OutputError(f"{out}: holds {text}, the text of --check: {OTHERWISE}")
    asked_stretches(content, options, open_checkpoint(model).config, load_tokenizer(model))
    return options


def _compare_with_source(out: Path, model: str, asked: EvaluationOptions, device: str, dtype: str | None) -> None:
    """Evaluate what was published against what it was made from; the record goes into its folder."""
    from halve.cli import terminal
    from halve.measure.quality.evaluate import evaluate
    from halve.measure.records import write_record

    record = evaluate(
        out, task=asked.task, data=asked.data, protocol=asked.protocol, device=device, dtype=dtype_of(dtype), base=model
    )
    terminal.evaluation(record)
    say(f"wrote {write_record(resolve_out(out) / CHECK, record)}")


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeat for several at once.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
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
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype_of(dtype), device=device)

    single = len(prompt) == 1
    if single:
        stream(prompt[0])
    results = generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, on_text=stream if single else None
    )
    stream("\n" if single else "\n\n".join(p + r.text for p, r in zip(prompt, results, strict=True)) + "\n")


def fetch(model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id (owner/name).")]) -> None:
    """Download MODEL from the Hugging Face hub once; every command then takes its id, without a network.

    Takes safetensors, config and tokenizer. It lands in the hub's own cache (set HF_HOME to move it).
    """
    from halve.checkpoint.hub import fetch as run

    folder = run(model)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{model}: {show_bytes(size, 2)} in {folder}")


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of .bin weights, or a GGUF file.")],
    out: Out,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16 or fp32: of what a GGUF file becomes (default: bf16).", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a folder of pickled .bin weights (most OPT checkpoints), or a GGUF file, into a folder of safetensors.

    Of GGUF files Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 and Phi-3, of the types F32 to Q8_0, Q2_K to Q6_K and IQ4_NL;
    quantized ones take `pip install 'halve[gguf]'`.
    """
    from halve.checkpoint.convert import convert as run

    say(f"wrote {run(model, out, dtype=dtype_of(dtype), overwrite=overwrite)}")


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    to: Annotated[str, typer.Option(help="gguf.")],
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32: of dense weights (default: as stored).", show_default=False)
    ] = None,
    requantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Round linears that GGUF has no place for again, to F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0; without "
            "it they are refused.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a GGUF file.")] = False,
) -> None:
    """Write MODEL as a GGUF file, for llama.cpp and other programs: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3.

    Codes are written as they are where GGUF has them (groups of a multiple of 32 columns: 4, 3 and 2 bits as Q4_0, with zero
    points as Q4_1, 8 bits as Q8_0); scales become float16. Tokenizer and chat template are included.
    """
    from halve.checkpoint.export import export as run

    made = run(model, out, to=to, dtype=dtype_of(dtype, "fp16"), requantize=requantize, overwrite=overwrite)
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.types.items())
    say(f"wrote {made.path}: {show_bytes(made.nbytes, 2)}, tensors: {kinds}; {made.rounding}")


def steps() -> None:
    """List the steps a recipe may have, with their options and defaults."""
    from halve.cli import terminal
    from halve.compression.methods import METHODS

    terminal.steps(METHODS)
