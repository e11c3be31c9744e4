"""A whole model folder from a config alone: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path

from halve.checkpoint.reader import Checkpoint
from halve.checkpoint.writer import CheckpointWriter
from halve.files.work import WorkFolder


def write_random_model(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `checkpoint`, opened with random weights, to `folder`, a shard a block; finished shards and folders stay."""
    if folder.exists():
        return folder
    layers = len(checkpoint.config.layers)
    prefixes = [checkpoint.family.names["block"].format(layer) + "." for layer in range(layers)]
    left = set(checkpoint.tensors.shapes)
    work = WorkFolder(folder, keep={"the config's own folder": checkpoint.folder})
    with work.claim({"random weights": checkpoint.raw}) as scratch:
        made = scratch / "model"
        writer = CheckpointWriter(made, layers + 1)
        for part, prefix in enumerate([*prefixes, ""]):
            names = sorted(name for name in left if name.startswith(prefix))
            left -= set(names)
            if not writer.done(part):
                writer.write(part, {name: checkpoint.tensor(name) for name in names}, [])
        writer.finish(checkpoint.raw, {}, checkpoint.folder)
        work.publish(made)
    return folder
