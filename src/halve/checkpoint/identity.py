"""What of a model folder decides bytes and figures, told by content."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from halve._version import __version__
from halve.checkpoint.foreign import OLD_GPTQ
from halve.checkpoint.tensors import INDEX, SINGLE, read_weight_map
from halve.files.contents import companions, is_terms
from halve.files.identity import hash_files, hash_text

_READ = ("config.json", "halve.json", OLD_GPTQ)  # beside the weights, and what goes with them


def model_identity(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """The SHA-256 of every file of a model folder that is read or copied, by name; of a hub model its commit as well.

    weights: False for a config whose weights are random.
    """
    files = [folder / name for name in _READ] + companions(folder)
    if weights:
        files += _weight_files(folder)
    named = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    commit = {"hub commit": folder.name} if folder.parent.name == "snapshots" else {}
    return commit | hash_files(named)


def model_sha256(folder: Path) -> str:
    """One hash of the files of a model that decide what it computes: weights, their names, config, tokenizer. What was
    written about them does not count, nor where they lie."""
    files = model_identity(folder)
    told = [name for name in files if name not in ("halve.json", "hub commit") and not is_terms(name)]
    return hash_text(*(part for name in sorted(told) for part in (name, files[name])))


def _weight_files(folder: Path) -> list[Path]:
    """As they are read: a single file before an index, and that before a file of any name."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return [folder / INDEX, *(folder / name for name in sorted(set(read_weight_map(folder / INDEX).values())))]
    return sorted(folder.glob("*.safetensors"))


def versions() -> dict[str, str]:
    """What computes and what makes tokens, by version; builds for other devices are one version."""
    packages = ("torch", "transformers", "tokenizers")
    return {"halve": __version__} | {name: metadata.version(name).split("+")[0] for name in packages}
