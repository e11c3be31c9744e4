"""Results of a long run kept line by line, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from halve.errors import OutputError
from halve.files import write_text
from halve.files.identity import differences
from halve.model.decoder import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressFile:
    """Where the finished parts of a run are kept, and the identity of what it is made from besides its options and data."""

    path: Path
    made_from: dict[str, Any]


def fingerprint(model: Model) -> str:
    """SHA-256 over the config and the logits of a fixed probe of up to 64 tokens: tells kernels and dtypes apart, which the
    files of a model do not."""
    config = model.config
    count = min(64, config.max_positions)
    tokens = (torch.arange(count, device=model.device) * 7919 + 1) % config.vocab_size
    with torch.inference_mode():
        logits = model(tokens.unsqueeze(0)).float().cpu().contiguous()
    return hashlib.sha256(repr(config).encode() + logits.numpy().tobytes()).hexdigest()


class Progress:
    """Results by key, read back from a file when its first line names the same run, appended to as they come.

    The file is JSON lines: {"run": identity}, then {"key": ..., "result": ...}. A line cut off in the middle is dropped;
    the file of another run is replaced, and what is another in it is said. With None nothing is kept on disk. Raises
    OutputError.
    """

    def __init__(self, file: ProgressFile | None, model: Model, asked: dict[str, Any]) -> None:
        self.path = path = None if file is None else file.path
        self.results: dict[str, Any] = {}
        self._file: TextIO | None = None
        if file is None or path is None:
            return
        run = json.loads(json.dumps(file.made_from | asked | {"logits of a probe": fingerprint(model)}))
        lines = [json.dumps({"run": run}, sort_keys=True)]
        try:
            kept = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
            if any(kept) and not kept[0].startswith('{"run": '):
                raise OutputError(
                    f"{path}: is not the progress of an evaluation: move it elsewhere, it would be replaced"
                )
            if kept and kept[0] == lines[0]:
                lines += self._restore(kept[1:-1])
            elif any(kept):
                changed = differences(_run(kept[0]), run)
                logger.warning("%s: is of another run (%s), so this one begins anew", path, changed)
            # the file is replaced in one step: a kill at this moment loses nothing either
            write_text(path, "".join(line + "\n" for line in lines))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error

    def _restore(self, lines: list[str]) -> list[str]:
        good = []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break
            self.results[entry["key"]] = entry["result"]
            good.append(line)
        return good

    def add(self, results: dict[str, Any]) -> None:
        """Keep finished results; they survive the end of this process."""
        self.results.update(results)
        if self._file is None:
            return
        try:
            for key, result in results.items():
                self._file.write(json.dumps({"key": key, "result": result}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}; free some space and rerun") from error

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop writing and leave the file for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """The run is complete: remove the file."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _run(line: str) -> Any:
    try:
        return json.loads(line)["run"]
    except (ValueError, KeyError):  # cut off in the middle
        return {}
