"""Models of the Hugging Face hub: downloaded once into its cache, and read from there without a network."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

from halve.checkpoint.tensors import INDEX, SINGLE, read_weight_map
from halve.errors import CheckpointError, OutputError, first_line
from halve.files.contents import CARD, COMPANIONS, TEMPLATES

_ABOUT = ["*.json", CARD, *(f"{name}*.jinja" if name.endswith("/") else name for name in COMPANIONS)]
_WEIGHTS = ["*.safetensors"]
# of folders that of chat templates alone: some repositories keep the same weights a second time, in another layout
_OTHER_FOLDERS = [f"{TEMPLATES[:n]}[!{TEMPLATES[n]}]*/*" for n in range(len(TEMPLATES))]
_OTHER_FOLDERS += [f"{TEMPLATES[:n]}/*" for n in range(1, len(TEMPLATES) - 1)]
_IGNORED = [*_OTHER_FOLDERS, "consolidated*"]


def fetch(model: str, *, weights: bool = True) -> Path:
    """The local folder of a hub model `owner/name`: from the hub's cache when it is there whole, else downloaded.

    Takes safetensors, config and tokenizer; without `weights` the latter two alone. Raises CheckpointError for a name
    the hub does not have, a gated model, weights of another kind or a hub out of reach, OutputError for a full disk.
    """
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise CheckpointError(f"{model}: no such folder, and not a hub id of the form owner/name")
    return cached(model, weights=weights) or _download(model, weights)


def cached(model: str, *, weights: bool = True) -> Path | None:
    """The folder of a hub model in the hub's cache, None unless every file is there; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, local_files_only=True, **_patterns(weights)))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(f"{model}: not a hub id ({first_line(error)}): write owner/name") from error
    return folder if _whole(folder, weights) else None


def _patterns(weights: bool) -> dict[str, Any]:
    return {"allow_patterns": _ABOUT + (_WEIGHTS if weights else []), "ignore_patterns": _IGNORED}


def _whole(folder: Path, weights: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if not weights or (folder / SINGLE).is_file():
        return True
    index = folder / INDEX
    if not index.is_file():
        # one file of another name, as GPTQ folders have it, but no shard of a download that was cut off
        return any("-of-" not in file.name for file in folder.glob("*.safetensors"))
    try:
        return all((folder / name).is_file() for name in read_weight_map(index).values())
    except CheckpointError:
        return False


def _download(model: str, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cache = constants.HF_HUB_CACHE
    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]  # the HTTP library's own, which has changed its name
    try:
        files = snapshot_download(model, dry_run=True, **_patterns(weights))
        _check_files(model, files, weights, cache)
        return Path(snapshot_download(model, **_patterns(weights)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model}: is gated: accept its licence on https://huggingface.co/{model}, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such folder, and no such model on the hub, or a private one: check the spelling, or log in "
            "with `hf auth login`"
        ) from error
    except (DryRunError, LocalEntryNotFoundError, ConnectionError) as error:
        raise CheckpointError(
            f"{model}: no such folder, not in the hub's cache {cache}, and the hub cannot be reached: check the network, "
            "or give a local folder"
        ) from error
    except (transport_error, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{cache}: the disk is full: free some space and fetch {model} again") from error
        raise CheckpointError(
            f"{model}: the download failed ({first_line(error)}): run the same command again, finished files are kept"
        ) from error


def _check_files(model: str, files: list, weights: bool, cache: str) -> None:
    """Refuse before anything is downloaded: no weights that can be read, or no room for them."""
    if weights and not any(file.filename.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{model}: the hub has no safetensors of it: download it with `hf download {model} --local-dir FOLDER` and "
            "run `halve convert FOLDER OUT`"
        )
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = shutil.disk_usage(next(p for p in (Path(cache), *Path(cache).parents) if p.exists())).free
    if needed > free:
        raise OutputError(
            f"{model}: needs {needed:,} bytes and the disk of {cache} has {free:,} free: free some space, or set HF_HOME "
            "to a folder on another disk"
        )
