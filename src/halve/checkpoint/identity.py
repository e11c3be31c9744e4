"""What of a model folder decides bytes and figures, told by content."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from halve._version import __version__
from halve.checkpoint.writer import companions
from halve.files.identity import hash_files

INDEX = "model.safetensors.index.json"
_READ = ("config.json", "halve.json", INDEX)  # beside the weights, and the tokenizer's files


def model_identity(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """The SHA-256 of every file of a model folder that is read or copied, by name; of a hub model its commit as well.

    weights: False for a config whose weights are random.
    """
    names = {*_READ, *(path.name for path in companions(folder))}
    if weights:
        index = folder / INDEX
        names |= set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    files = {name: folder / name for name in names if (folder / name).is_file()}
    commit = {"hub commit": folder.name} if folder.parent.name == "snapshots" else {}
    return commit | hash_files(files)


def versions() -> dict[str, str]:
    """What computes and what makes tokens, by version; builds for other devices are one version."""
    packages = ("torch", "transformers", "tokenizers")
    return {"halve": __version__} | {name: metadata.version(name).split("+")[0] for name in packages}
