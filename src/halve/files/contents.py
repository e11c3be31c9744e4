"""What an output folder holds: what halve made, and may replace, and what has to stay."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from halve.errors import CheckpointError, reading, refuse_pipe
from halve.files import read_object

TEMPLATES = "additional_chat_templates/"  # the only folder of a model that is read
# what goes with the weights wherever they go, fetched and copied: tokenizer, chat templates, terms of use
_TERMS = "LICENSE* LICENCE* License* NOTICE* Notice* USE_POLICY*".split()
COMPANIONS = (
    "generation_config.json tokenizer.* tokenizer_config.json special_tokens_map.json added_tokens.json vocab.* merges.txt "
    f"chat_template.* {TEMPLATES} tekken.json spiece.model"
).split() + _TERMS
CHECK = "halve-check.json"  # of a model made by halve: the record of what it was compared with
CARD = "README.md"  # of a model: what it is, for people and for the hub
_SEAL = re.compile(rb"\n<!-- halve card ([0-9a-f]{64}) -->\n\Z")
# what `--overwrite` may delete: names that programs write, none that a person would give to notes or adapters
MODEL_FILES = [
    *"config.json quantize_config.json halve.json halve-log.jsonl model.safetensors model-?????-of-?????.safetensors".split(),
    CHECK,
    *"model.safetensors.index.json pytorch_model.bin pytorch_model-?????-of-?????.bin pytorch_model.bin.index.json".split(),
    *COMPANIONS,
]
OWNER = "owner"  # of a scratch folder: its mark OWNER.json and its lock OWNER.lock
_SCRATCH_FILES = [*MODEL_FILES, *"*/ *.json *.jinja *.tmp owner.lock *.safetensors *.bin".split()]
# what is read of a model's folder, by halve and by the tokenizer's library
_READ_FILES = [*_SCRATCH_FILES, *"*.txt *.model additional_chat_templates".split()]
# what does not make a folder hold something: of file systems, and of workers that begin at this moment
PASSED_OVER = re.compile(
    r"lost\+found|\.request\.lock|\.worker-[0-9a-f]+\.(json|lock)|\.halve-[0-9a-f]{32}|\.[0-9a-f]{32}\.tmp"
)
OTHERWISE = "choose another folder"


def real_places(keep: Mapping[str, str | os.PathLike[str] | None]) -> dict[Path, str]:
    """What must stay, by where it really lies: what is named, what its files link to, and the working directory."""
    places: dict[Path, str] = {}
    for what, name in {**keep, "the working directory": "."}.items():
        with suppress(OSError, RuntimeError):  # a hub id, a named set, or a working directory that is gone
            path = Path("" if name is None else name).expanduser()
            if name is None or not path.exists():
                continue
            inner = path.iterdir() if path.is_dir() and name != "." else ()
            for place in (path.resolve(), path.parent.resolve() / path.name, *(p.resolve() for p in inner)):
                places.setdefault(place, what)
    return places


def holds_one_of(places: dict[Path, str], folder: Path) -> str | None:
    """What of `places` would go with `folder`, in words."""
    for place, what in places.items():
        if place == folder or folder in place.parents:
            return f"{'is' if place == folder else 'holds'} {what}"
    return None


def leads_outside(name: str | Path, folder: Path) -> bool:
    """Whether a name in a model's folder stands for what lies elsewhere: by `..`, from the root, or through links.

    The blobs beside a snapshot in the hub's cache are its own.
    """
    try:
        real, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, or no name of a file
        return True
    blobs = home.parent.parent / "blobs"
    return not (real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs)))


def link_outside(folder: Path) -> Path | None:
    """The first file of a model that is a link to something outside its folder; None without one.

    Raises CheckpointError for a pipe or a device among them.
    """
    inner = folder / "additional_chat_templates"
    entries = [*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]
    named = sorted(entry for entry in entries if any(fnmatch(entry.name, name) for name in _READ_FILES))
    for entry in named:
        refuse_pipe(entry, CheckpointError)
    return next((entry for entry in named if entry.is_symlink() and leads_outside(entry, folder)), None)


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model: what `--overwrite` may replace."""
    if "recipe" in (read_object(folder / "halve.json") or {}):
        return True
    weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    return weights and "model_type" in (read_object(folder / "config.json") or {})


def is_scratch(folder: Path) -> bool:
    """Whether a folder is a scratch folder of halve: by its mark, not by its name."""
    mark = None if folder.is_symlink() else read_object(folder / f"{OWNER}.json")
    return mark is not None and str(mark.get("program", "")).startswith("halve ")


def all_ours(scratch: Path) -> bool:
    """Whether nothing has been put into a scratch folder by anybody else."""
    return first_foreign(scratch, _SCRATCH_FILES) is None


def first_foreign(folder: Path, names: Sequence[str], below: Sequence[str] = (), top: bool = True) -> Path | None:
    """The first entry that halve did not make; None when it made all of them.

    Ours is a file named in `names` or, in the folders named there ("trials/"), in `below`; a record, by what it holds; and
    unfinished work, by its mark.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            known = not top or any(fnmatch(f"{entry.name}/", name) for name in names)
            wanted = _SCRATCH_FILES if is_scratch(entry) else below or names
            if f"{entry.name}/" == TEMPLATES:
                wanted = ["*.jinja"]
            foreign = first_foreign(entry, wanted, top=False) if known else entry
            if foreign is not None:
                return foreign
        elif not entry.is_file() or not (any(fnmatch(entry.name, name) for name in names) or _is_result(entry)):
            return entry
    return None


def _is_result(file: Path) -> bool:
    """Whether a file is a record, a card, or the progress of an evaluation."""
    if file.name == CARD:
        return is_card(file)
    if file.name.endswith(".progress.jsonl"):
        return is_progress(file)
    return file.suffix == ".json" and is_record(file)


def is_record(file: Path) -> bool:
    return {"halve_version", "kind"} <= (read_object(file) or {}).keys()


def sealed_card(text: str) -> str:
    """A card with what tells it from one that somebody has written, or changed since."""
    return f"{text}\n<!-- halve card {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_card(file: Path) -> bool:
    """Whether a file is a card as halve wrote it."""
    content = file.read_bytes() if file.is_file() else b""
    seal = _SEAL.search(content)
    return seal is not None and hashlib.sha256(content[: seal.start()]).hexdigest() == seal[1].decode()


def is_progress(file: Path) -> bool:
    with file.open("rb") as lines:
        return lines.readline().startswith(b'{"run": ')


def why_not_a_model(folder: Path) -> str | None:
    """Why a folder is more than a model, the one thing that `--overwrite` replaces; None when it is that alone."""
    if not _is_model(folder):
        return f"exists and is not empty, and holds no model but {min((e.name for e in folder.iterdir()), default='nothing')}"
    foreign = first_foreign(folder, MODEL_FILES)
    return None if foreign is None else holding(folder, foreign)


def holding(folder: Path, foreign: Path) -> str:
    return f"exists and is not empty, and holds {foreign.relative_to(folder)}, which halve did not write"


def is_terms(name: str) -> bool:
    """Whether a file says under which terms a model may be used, and nothing that a program reads."""
    return any(fnmatch(name, pattern) for pattern in _TERMS)


def companions(folder: Path) -> list[Path]:
    """The files that go with the weights of a model. Raises CheckpointError for one that cannot be read."""
    with reading(folder, CheckpointError):
        files = [path for path in folder.iterdir() if any(fnmatch(path.name, name) for name in COMPANIONS)]
        if (folder / TEMPLATES).is_dir():
            files += [path for path in (folder / TEMPLATES).iterdir() if path.suffix == ".jinja"]
        files = sorted(path for path in files if path.is_file() and path.suffix != ".safetensors")
        for path in files:
            path.open("rb").close()
    return files


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what goes with the weights of a model into another folder."""
    for path in companions(source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
