"""A folder of pickled .bin weights, or a GGUF file -> safetensors. The only place that unpickles, and only tensors."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.gguf import convert_gguf
from halve.checkpoint.reader import find_model, open_checkpoint
from halve.checkpoint.tensors import INDEX, SINGLE, SafetensorsFolder, read_json, read_weight_map
from halve.checkpoint.writer import save_shard
from halve.errors import CheckpointError, HalveError, first_line, reading, shown
from halve.files import write_json
from halve.files.contents import companions, copy_companions
from halve.files.work import WorkFolder
from halve.model.families import parse_config
from halve.model.wrappers import own_config
from halve.progress import track


def convert(model: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write the weights of a `.bin` model folder, or of a GGUF file, as safetensors into the new folder `out`.

    Of a folder one file at a time is in memory. Tensors that share storage (tied weights) are stored once each under the
    name that the architecture reads. `dtype`: of what a GGUF file becomes, default bfloat16. Raises CheckpointError for files
    that are not plain tensors or no GGUF.
    """
    file = Path(model).expanduser()
    if file.is_file() and file.suffix != ".json":
        return convert_gguf(file, out, dtype or torch.bfloat16, overwrite=overwrite)
    if dtype is not None:
        raise HalveError(
            f"{model}: a dtype is asked for, and a folder of .bin weights keeps its own: leave out --dtype"
        )
    folder = find_model(model)
    files = _listing(folder)
    origin = str(folder / "config.json")
    tied = parse_config(own_config(read_json(folder / "config.json"), origin), origin)[1].tied
    companions(folder)
    needed = sum(file.stat().st_size for file in files)
    work = WorkFolder(out, keep={"the model's own folder": folder}, overwrite=overwrite, needs_bytes=needed)
    with work.claim({"convert": str(folder.resolve())}, resume=False) as scratch:
        made = scratch / "model"
        made.mkdir()
        try:
            _write(folder, files, tied, made)
            open_checkpoint(made)  # whatever is wrong with the weights is found before the folder has its name
        except CheckpointError:
            work.empty()
            raise
        work.publish(made)
    return work.out


def _write(folder: Path, files: dict[Path, set[str] | None], tied: bool, made: Path) -> None:
    weight_map, total = {}, 0
    beside = SafetensorsFolder(folder) if any((folder / name).exists() for name in (SINGLE, INDEX)) else None
    for number, path in enumerate(track(list(files), description="convert"), 1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = _load(path)
        names = files[path]
        if names is not None:
            if names - tensors.keys():
                missing = min(names - tensors.keys())
                raise CheckpointError(
                    f"{path}: the index promises {shown(missing)} and the file does not hold it: download it again"
                )
            tensors = {name: tensors[name] for name in sorted(names)}
        if beside is not None:
            _check_same(path, tensors, beside)
        if tied:
            tensors.pop("lm_head.weight", None)
        # clones: tensors that are views of one storage cannot be saved as they are
        save_shard({k: v.clone().contiguous() for k, v in tensors.items()}, made / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(t.nbytes for t in tensors.values())
    copy_companions(folder, made)
    shutil.copyfile(folder / "config.json", made / "config.json")
    write_json(
        made / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _check_same(path: Path, tensors: dict[str, Tensor], beside: SafetensorsFolder) -> None:
    """CheckpointError unless the folder's safetensors, which every program reads first, hold what the .bin file holds."""
    common = tensors.keys() & beside.shapes.keys()
    if not common or any(not torch.equal(beside.get(name), tensors[name]) for name in common):
        raise CheckpointError(
            f"{path}: other weights than in the {SINGLE} or shards beside it, which are what is read there: move those "
            "that are meant into a folder of their own"
        )


def _listing(folder: Path) -> dict[Path, set[str] | None]:
    """The .bin files, each with the names it is to give; None: all it holds. A single file goes before an index."""
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    files: dict[Path, set[str] | None] = {single: None}
    if index.exists() and not single.exists():
        files = {}
        for name, file in read_weight_map(index).items():
            names = files.setdefault(folder / file, set())
            assert names is not None
            names.add(name)
    for path in files:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file: convert needs a folder with pytorch_model.bin weights, or a GGUF file"
            )
    return files


def _load(path: Path) -> dict[str, Tensor]:
    with reading(path, CheckpointError):
        path.open("rb").close()  # what is raised below does not tell a file that may not be opened
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a plain file of tensors ({first_line(error)}): it is not opened any other way"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds something other than named tensors")
    return state
