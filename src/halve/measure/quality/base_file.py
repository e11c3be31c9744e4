"""A base as a file: what a model predicted at every position of an evaluation, so that it need not be loaded again.

A zip archive without compression: `base.json` (what was asked, of which model), and per item (a sequence of text, a
question) a safetensors file of N positions, K tokens each, and T targets:
    tokens            int32  [N, K]  the most probable tokens, the first one first
    levels            uint16 [N, K]  log p = highest - level * step
    highest, step     float32 [N]
    tail              float32 [N]    logarithm of the mass of all other tokens
    targets           int32  [T, 2]  position within the item, predicted token
    target_log_probs  float64 [T]    not rounded
A level is at most 2^-17 of a position's range away from its value, so that a probability changes by 1e-4 of itself at most.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from halve.errors import DataError
from halve.measure.quality.divergence import Distribution

_FORMAT = "halve base 1"
BASE_TOKENS = 1024
_LEVELS = 2**16 - 1
_DTYPES = {
    "tokens": torch.int32,
    "levels": torch.uint16,
    "highest": torch.float32,
    "step": torch.float32,
    "tail": torch.float32,
    "targets": torch.int32,
    "target_log_probs": torch.float64,
}


@dataclass(frozen=True)
class KeptItem:
    """The predictions for one item: top: distributions of its positions; log_probs: float64 [T] of its targets."""

    top: Distribution
    log_probs: Tensor


class BaseWriter:
    """Writes a base item by item; `finish` makes it complete. `count`: K."""

    def __init__(self, path: Path, count: int) -> None:
        self.count = count
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def add(self, item: str, kept: KeptItem, targets: Sequence[tuple[int, int]]) -> None:
        """Keep an item; targets: (position within the item, token)."""
        top = kept.top
        assert top.tokens is not None and top.tail is not None
        highest = top.log_probs.amax(dim=1)
        step = ((highest - top.log_probs.amin(dim=1)) / _LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
        levels = ((highest.unsqueeze(1) - top.log_probs) / step.unsqueeze(1)).round_().clamp_(0, _LEVELS)
        tensors = {
            "tokens": top.tokens,
            "levels": levels.to(torch.int32),
            "highest": highest,
            "step": step,
            "tail": top.tail,
            "targets": torch.tensor(targets).reshape(-1, 2),
            "target_log_probs": kept.log_probs,
        }
        content = save({name: tensor.to(_DTYPES[name]).cpu().contiguous() for name, tensor in tensors.items()})
        self._archive.writestr(_member(item), content)

    def finish(self, asked: dict[str, Any], about: dict[str, Any]) -> None:
        whole = self.count >= asked["vocabulary"]
        about = about | {"kept": None if whole else self.count}
        self._archive.writestr("base.json", json.dumps({"format": _FORMAT, "asked": asked, "model": about}))
        self._archive.close()

    def close(self) -> None:
        """Stop, complete or not."""
        self._archive.close()


class BaseFile:
    """A base read item by item. Raises DataError when the file is none, is cut off, or holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            content = json.loads(self._archive.read(self._member("base.json")))
            self.asked, self.about = dict(content["asked"]), dict(content["model"])
            known = content["format"] == _FORMAT
        except (OSError, KeyError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: is no base, or cut off ({error}): make it again with --save-base") from error
        if not known:
            raise DataError(f"{path}: format {content['format']!r}, this version reads {_FORMAT!r}: make it again")

    def _member(self, name: str) -> zipfile.ZipInfo:
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.path.stat().st_size:
            raise ValueError(f"{name} is compressed")  # it may unpack to any size
        return info

    def read(self, item: str, targets: Sequence[tuple[int, int]], vocabulary: int) -> KeptItem:
        """The predictions for an item, whose targets have to be these: (position within the item, token)."""
        try:
            tensors = load(self._archive.read(self._member(_member(item))))
            if {name: tensor.dtype for name, tensor in tensors.items()} != _DTYPES:
                raise ValueError("not the tensors of a base")
            positions, count = tensors["tokens"].shape
            expected = [(positions, count)] * 2 + [(positions,)] * 3 + [(len(targets), 2), (len(targets),)]
            if [tuple(tensors[name].shape) for name in _DTYPES] != expected:
                raise ValueError("tensors of other shapes")
            if tensors["targets"].tolist() != [list(target) for target in targets]:
                raise ValueError("other tokens were predicted")
            tokens = tensors["tokens"].long()
            if count < 1 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
                raise ValueError("token ids outside the vocabulary")
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: item {item}: damaged ({error}): make it again with --save-base") from error
        levels = tensors["levels"].float()
        log_probs = tensors["highest"].unsqueeze(1) - levels * tensors["step"].unsqueeze(1)
        return KeptItem(Distribution(log_probs, tokens, tensors["tail"]), tensors["target_log_probs"])


def is_base(path: Path) -> bool:
    """Whether a file is a base of halve's."""
    try:
        return bool(BaseFile(path).about)
    except DataError:
        return False


def _member(item: str) -> str:
    return f"{item}.safetensors"
