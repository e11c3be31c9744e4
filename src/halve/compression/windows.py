"""Calibration text: documents and the token windows cut from them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.tokenizer import Tokenizer
from halve.errors import DataError
from halve.files.identity import hash_files, hash_text
from halve.model.vocabulary import check_ids
from halve.texts import text_files

HELD_OUT_SHARE = 32  # calibration windows to one that is held out


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on: text (file, RACE folder, or c4 | wikitext2 from the hub), number of windows, tokens a window
    (at most the model's context), seed of the draw. Raises DataError."""

    source: str = "c4"
    samples: int = 128
    window: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.window < 2:
            raise DataError(
                f"samples={self.samples}, window={self.window}: need at least 1 sample and 2 tokens a window"
            )


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens int64 [N, T] to calibrate on, others [M, T] to judge by, and where they came from."""

    windows: Tensor
    held_out: Tensor
    origin: dict[str, object]


def text_identity(source: str, documents: Sequence[str]) -> dict[str, str]:
    """What tells a calibration text from another: the SHA-256 of each of its files, or of the documents of a named set or of
    what can be read only once."""
    path = Path(os.path.expanduser(source))
    if not (path.is_file() or path.is_dir()):
        return {path.name: hash_text(*documents)}
    root = path if path.is_dir() else path.parent
    return hash_files({file.relative_to(root).as_posix(): file for file in text_files(path)})


def make_windows(
    documents: list[str], tokenizer: Tokenizer, options: CalibrationOptions, vocab_size: int
) -> Calibration:
    """Documents shuffled by the seed, packed end to end, cut into windows that each begin as the tokenizer begins a text.

    One window more for every HELD_OUT_SHARE (at least one) is held out for judging. Too little text gives fewer windows, and
    `origin` says so. Raises DataError when there is not enough for one window and one held out, or for a token outside of
    the vocabulary.
    """
    samples, window = options.samples, options.window
    order = list(range(len(documents)))
    random.Random(options.seed).shuffle(order)
    held_out = max(1, samples // HELD_OUT_SHARE)
    bos = list(tokenizer.bos_ids)
    body = window - len(bos)
    stream: list[int] = []
    used = 0
    for index in order:
        if len(stream) >= (samples + held_out) * body:
            break
        stream += bos * (used > 0) + tokenizer.encode(documents[index], bos=False)
        used += 1
    rows = [bos + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)][: samples + held_out]
    if len(rows) < 2:
        raise DataError(
            f"calibration text {options.source!r} has {len(stream)} tokens: two windows of {window} need {2 * body}; "
            "use more text or a smaller --window"
        )
    check_ids(vocab_size, rows, tokenizer)
    if len(rows) < samples + held_out:
        held_out = min(held_out, max(1, len(rows) // HELD_OUT_SHARE))
    calibration, judging = torch.tensor(rows).split((len(rows) - held_out, held_out))
    origin = {
        "source": Path(options.source).name,
        "documents_available": len(documents),
        "documents_used": used,
        "windows_asked": samples,
        "windows": calibration.shape[0],
        "window_tokens": window,
        "tokens": calibration.numel(),
        "held_out_tokens": judging.numel(),
        "seed": options.seed,
    }
    return Calibration(calibration, judging, origin)
