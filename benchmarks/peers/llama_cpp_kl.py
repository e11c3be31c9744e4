"""KL divergence by llama.cpp's own tool and by halve, on the same two GGUF files and the same positions.

    python benchmarks/peers/llama_cpp_kl.py --tools BUILD/bin --base F16.gguf --model Q8_0.gguf --text TEXT --out RECORD.json

In halve's environment; BUILD/bin holds llama-perplexity and llama-quantize. llama.cpp counts the second half of every window,
whose first token it replaces by BOS; the windows are read from the file in which it keeps the base's log-probabilities, and
halve is asked exactly these positions of the folders that `halve convert` makes of the two files. Four rows:

- halve, float32;
- halve with the base's log-probabilities rounded as that file keeps them: 16 bit between the largest logit and 16 below it;
- llama.cpp with both files turned into F32, which takes the rounding of activations out of its products, and an F32 cache;
- llama.cpp on the files as they are: it multiplies Q8_0 weights with activations rounded to 8 bit.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve import convert, load_model, load_tokenizer
from halve.measure.quality.divergence import Distribution, diverge, log_softmax
from halve.measure.records import check_record_path, new_record, write_record
from halve.model.decoder import Model

_POSITIONS = 64  # compared at a time
_RANGE = 16.0  # nats below the largest logit that the file tells apart
_LEVELS = 65535
_PRINTED = 5e-7  # half of the last digit that the tool prints
_FLAGS = ["-t", "1"]
_TRIES = 10
_FLOAT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
_NUMBER = r"\s*:\s*(-?[\d.]+|nan|inf)"
_FIGURES = {
    "kl_nats_per_token": r"Mean\s+KLD",
    "kl_50": r"Median\s+KLD",
    "kl_90": r"90\.0%\s+KLD",
    "kl_95": r"95\.0%\s+KLD",
    "kl_99": r"99\.0%\s+KLD",
    "kl_99.9": r"99\.9%\s+KLD",
    "kl_100": r"Maximum KLD",
    "perplexity": r"Mean PPL\(Q\)",
    "base_perplexity": r"Mean PPL\(base\)",
    "perplexity_ratio": r"Mean PPL\(Q\)/PPL\(base\)",
}
_PER_CENT = {
    "same_top": "Same top p",
    "probability_change_mean": "Mean    Δp",
    "probability_change_rms": "RMS Δp ",
}
PERCENTS = (50, 90, 95, 99, 99.9, 100)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def llama_cpp(tools: Path, base: Path, model: Path, kept: Path, flags: list[str], text: list[str]) -> dict[str, float]:
    """The tool's figures; `kept` is the file in which it keeps the base's log-probabilities."""
    run(tools / "llama-perplexity", "-m", base, "--kl-divergence-base", kept, *flags, *text)
    for _ in range(_TRIES):  # a thread writes what it prints, and the end of the program may cut that off
        printed = run(
            tools / "llama-perplexity", "-m", model, "--kl-divergence", "--kl-divergence-base", kept, *flags, *text
        )
        if "Same top p:" in printed:
            break

    def figure(name: str) -> float:
        found = re.search(name + _NUMBER, printed)
        if found is None:
            raise SystemExit(f"llama-perplexity printed no {name}:\n{printed[-2000:]}")
        return float(found[1])

    return {key: figure(name) for key, name in _FIGURES.items()} | {
        key: figure(re.sub(r"\s+", r"\\s+", name)) / 100 for key, name in _PER_CENT.items()
    }


class Kept:
    """The file of the base's log-probabilities: windows of tokens int32 [chunks, n_ctx], and per window a row of 16-bit
    words for every position of its second half that predicts: step and lowest log-probability (float32), then levels."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(8) != b"_logits_":
                raise SystemExit(f"{path}: is not a file of log-probabilities")
            window, vocabulary, chunks = struct.unpack("<3i", file.read(12))
            self.tokens = np.fromfile(file, "<i4", window * chunks).reshape(chunks, window)
            start = file.tell()
        self.first, self.vocabulary = window // 2, vocabulary
        words = 2 * ((vocabulary + 1) // 2) + 4
        shape = (chunks, window - 1 - self.first, words)
        self._rows = np.memmap(path, "<u2", "r", start, shape)

    def log_probs(self, chunk: int, part: slice) -> tuple[Tensor, Tensor]:
        """What is kept of some positions of a window [N, V], and half a step of each [N]."""
        rows = np.ascontiguousarray(self._rows[chunk, part])
        step, lowest = torch.from_numpy(rows[:, :4].copy().view("<f4")).unbind(1)
        levels = torch.from_numpy(rows[:, 4 : 4 + self.vocabulary].astype(np.float32))
        return step.unsqueeze(1) * levels + lowest.unsqueeze(1), step / 2


def rounded(logits: Tensor) -> Tensor:
    """Log-probabilities of float32 logits [N, V] as the file keeps them."""
    highest = logits.amax(1, keepdim=True)
    lowest = torch.maximum(logits.amin(1, keepdim=True), highest - _RANGE)
    step = (highest - lowest) / _LEVELS
    levels = ((logits - lowest).clamp_(min=0) / step).round_()
    return step * levels + (lowest - logits.logsumexp(1, keepdim=True))


def theirs(base: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """KL as llama.cpp sums it from what is kept of the base, which adds up to 1 only nearly, and whether the first token is
    the same, float64 [N]."""
    terms = torch.where(base > -_RANGE, base.exp() * (base - model), 0.0)
    return terms.sum(1, dtype=torch.float64), (base.argmax(1) == model.argmax(1)).double()


def blocks(
    kept: Kept, models: tuple[Model, Model], bos: int | None
) -> Iterator[tuple[int, slice, Tensor, list[Tensor]]]:
    """(window, positions of its second half, the tokens that follow, both models' float32 logits)."""
    for chunk, words in enumerate(kept.tokens):
        tokens = torch.from_numpy(words.astype(np.int64))
        following = tokens[kept.first + 1 :]
        asked = tokens.clone()
        if bos is not None:
            asked[0] = bos
        hidden = [model.hidden(asked[None])[0, kept.first : -1] for model in models]
        for begin in range(0, len(following), _POSITIONS):
            part = slice(begin, begin + _POSITIONS)
            logits = [model.logits(states[part]).float() for model, states in zip(models, hidden, strict=True)]
            yield chunk, part, following[part], logits


@torch.inference_mode()
def halve(kept: Kept, folders: tuple[Path, Path]) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """halve's figures, the same with the base rounded as in the file, and by how much the two programs' base differs."""
    models = tuple(load_model(folder, dtype=torch.float32) for folder in folders)
    bos = next(iter(load_tokenizer(folders[0]).bos_ids), None)
    exact: dict[str, list[Tensor]] = {key: [] for key in ("kl", "same", "nll", "base_nll")}
    as_kept: dict[str, list[Tensor]] = {key: [] for key in exact}
    logit_error, weight = 0.0, []
    for chunk, part, following, (base_logits, logits) in blocks(kept, (models[0], models[1]), bos):
        base, model, coarse = log_softmax(base_logits), log_softmax(logits), rounded(base_logits)
        divergence = diverge(Distribution(base), model)
        kl, same = theirs(coarse, model)
        for rows, p, values in ((exact, base, (divergence.kl, divergence.same_top)), (as_kept, coarse, (kl, same))):
            nll = [-x.gather(1, following[:, None])[:, 0].double() for x in (model, p)]
            for key, value in zip(rows, (*values, *nll), strict=True):
                rows[key].append(value)
        told, half_step = kept.log_probs(chunk, part)
        within = base_logits > base_logits.amax(1, keepdim=True) - _RANGE
        apart = ((told - base).abs() - half_step[:, None])[within]
        logit_error = max(logit_error, float(apart.max()))
        p, q = base.exp(), model.exp()
        weight.append(((p - q).abs() + p * (base - model).abs()).sum(1, dtype=torch.float64))
    sensitivity = float(torch.cat(weight).mean())
    allowed = _PRINTED + logit_error * sensitivity
    rounding = {"log_prob_error": logit_error, "sensitivity": sensitivity, "allowed": allowed}
    return figures(exact), figures(as_kept), rounding


def figures(rows: dict[str, list[Tensor]]) -> dict[str, float]:
    kl, same, nll, base_nll = (torch.cat(rows[key]).numpy() for key in ("kl", "same", "nll", "base_nll"))
    change = np.exp(-nll) - np.exp(-base_nll)
    return {
        "kl_nats_per_token": float(kl.mean()),
        **{f"kl_{percent:g}": float(np.percentile(kl, percent)) for percent in PERCENTS},
        "perplexity": float(np.exp(nll.mean())),
        "base_perplexity": float(np.exp(base_nll.mean())),
        "perplexity_ratio": float(np.exp((nll - base_nll).mean())),
        "same_top": float(same.mean()),
        "probability_change_mean": float(change.mean()),
        "probability_change_rms": float(np.sqrt((change**2).mean())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-perplexity and llama-quantize")
    parser.add_argument("--base", type=Path, required=True, help="GGUF of the base, F16 or F32")
    parser.add_argument("--model", type=Path, required=True, help="GGUF of the model that is compared with it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=-1, help="windows; -1 is all of the text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = check_record_path(args.out)
    window = str(args.window)
    text = ["-f", str(args.text), "-c", window, "-b", window, "--chunks", str(args.chunks)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        floats = [work / f"{path.stem}-F32.gguf" for path in (args.base, args.model)]
        for path, target in zip((args.base, args.model), floats, strict=True):
            told = run(args.tools / "llama-quantize", "--allow-requantize", path, target, "F32")
        folders = work / "base", work / "model"
        for path, folder in zip((args.base, args.model), folders, strict=True):
            convert(path, folder, dtype=torch.float32)
        as_it_is = llama_cpp(args.tools, args.base, args.model, work / "kept", _FLAGS, text)
        in_floats = llama_cpp(args.tools, floats[0], floats[1], work / "kept", _FLAGS + _FLOAT, text)
        kept = Kept(work / "kept")
        exact, as_kept, rounding = halve(kept, folders)
    version = re.search(r"version: (.*)", told)
    programs: list[dict[str, Any]] = [
        {"program": "halve"} | exact,
        {"program": "halve, base rounded to 16 bit"} | as_kept,
        {"program": "llama.cpp, weights as F32"} | in_floats,
        {"program": "llama.cpp"} | as_it_is,
    ]
    rounding["difference"] = abs(in_floats["kl_nats_per_token"] - as_kept["kl_nats_per_token"])
    record = new_record(
        "llama-cpp-kl",
        args.model.name,
        command=f"llama_cpp_kl.py --base {args.base.name} --model {args.model.name} --text {args.text.name} "
        f"--window {args.window} --chunks {args.chunks}",
        recipe=[],
        base=args.base.name,
        text=args.text.name,
        window=args.window,
        windows=len(kept.tokens),
        positions=kept.tokens.shape[0] * (args.window - 1 - kept.first),
        llama_cpp=version[1] if version else None,
        programs=programs,
        rounding=rounding,
    )
    for row in programs:
        print({key: value if isinstance(value, str) else round(value, 7) for key, value in row.items()})
    print(rounding)
    write_record(out, record)
    if rounding["difference"] > rounding["allowed"]:
        raise SystemExit("the two programs' means differ by more than rounding allows")


if __name__ == "__main__":
    main()
