"""Folders that hold something else than a language model under its own names: what is harmless is seen through."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from halve.checkpoint.tensors import RenamedTensors, TensorsOfRows, TensorSource
from halve.errors import CheckpointError, shown
from halve.files import read_object
from halve.model.config import ModelConfig
from halve.model.families import Family
from halve.model.wiring import SUBLAYERS, wires

# parts of names that wrappers of a module add: data parallel, torch.compile, FSDP, checkpointing, models of several kinds
# of input; no part of any family is called so
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "language_model",
    "text_model",
}
_ADAPTER = "adapter_config.json"
_MERGE = "merge it first (peft's merge_and_unload, then save_pretrained) and give the folder of the merged model"


def under_own_names(tensors: TensorSource, family: Family, origin: str) -> TensorSource:
    """The tensors under the names of the architecture: without the parts that wrappers add, and with the `model.` that is
    not there when a model was saved without its head. Raises CheckpointError, which names `origin`, where two get one name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in tensors.shapes}
    prefix = "" if any(name.startswith("model.") for name in bare.values()) else "model."
    stored: dict[str, str] = {}
    for theirs, name in bare.items():
        own = name if name.startswith(family.names["head"]) else prefix + name
        if own in stored:
            raise CheckpointError(
                f"{origin}: {stored[own]!r} and {theirs!r} are both {own!r} without what wrappers add: leave one of them out"
            )
        stored[own] = theirs
    return tensors if all(own == theirs for own, theirs in stored.items()) else RenamedTensors(tensors, stored)


def split_merged(tensors: TensorSource, family: Family, config: ModelConfig) -> TensorSource:
    """The weights and biases of linears that read one input, where a file holds them as one tensor, under their own names."""
    rows: dict[str, tuple[str, int, int]] = {}
    for index, layer in enumerate(config.layers):
        for sublayer in SUBLAYERS.values():
            there = [wire for wire in wires(config, layer) if wire.role in sublayer.readers]
            ends = list(accumulate(wire.outputs(config, layer) for wire in there))
            for part in ("weight", "bias") if there else ():
                names = [f"{family.block_name(index, wire.role)}.{part}" for wire in there]
                merged = f"{names[0].rsplit('.', 2)[0]}.{sublayer.merged}.{part}"
                if tensors.shapes.get(merged, ())[:1] == (ends[-1],):
                    rows |= {name: (merged, *bounds) for name, bounds in zip(names, pairwise([0, *ends]), strict=True)}
    return TensorsOfRows(tensors, rows) if rows else tensors


def check_parts(tensors: TensorSource, family: Family, config: ModelConfig, raw: dict[str, Any], origin: str) -> None:
    """Raise CheckpointError, which names `origin`, for a model of another task, and for one without its head."""
    names = raw.get("architectures")
    called = (
        f"config.json calls it {', '.join(map(str, names))}" if isinstance(names, list) and names else "a base model"
    )
    head = family.names["head"]
    roots = {name.split(".")[0] for name in (family.names["embed"], family.names["block"], head)}
    other = [name for name in tensors.shapes if name.split(".")[0] not in roots]
    if other:
        raise CheckpointError(
            f"{origin}: holds {min(other)!r}, which is no part of a causal language model ({called}): give the language "
            "model it was made from, or that part of it alone"
        )
    if not config.tied and not any(name.startswith(f"{head}.") for name in tensors.shapes):
        raise CheckpointError(
            f"{origin}: was saved without its output head, {f'{head}.weight'!r} ({called}), and tie_word_embeddings is false: "
            "give the causal language model it was made from, or set tie_word_embeddings to true in config.json if its head "
            "is the embedding"
        )


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter, which transformers would apply and nothing here does."""
    path = folder / _ADAPTER
    if not path.exists():
        return
    base = shown((read_object(path) or {}).get("base_model_name_or_path", "unknown"))
    weights = [p for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern)]
    if all(p.name.startswith("adapter_") for p in weights):
        raise CheckpointError(f"{folder}: is an adapter of {base} ({_ADAPTER}), not a model: {_MERGE}")
    raise CheckpointError(
        f"{folder}: holds an adapter of {base} ({_ADAPTER}) beside the weights, which would not be applied: {_MERGE}, or "
        f"move {_ADAPTER} elsewhere to use the weights alone"
    )
