"""What a rank holds, reads and adds up, from the plan of its tensors: no weight is needed, nor the machine."""

from __future__ import annotations

from dataclasses import dataclass

from halve.checkpoint.reader import Checkpoint
from halve.checkpoint.shares import SharedTensors, TensorShare
from halve.checkpoint.stored import PACKED_SHAPE, tensor_names
from halve.measure.speed.timing import cache_bytes
from halve.model.wiring import SUBLAYERS


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank. held: its tensors, as stored but for zero points, one a byte; read: of the files, to load them; step:
    of the tensors that a decode step reads; cache: keys and values it reads beside; added: of the vectors that ranks add up
    in a step, each sum counted once; sums: how many these are."""

    held: int
    read: int
    step: int
    cache: int
    added: int
    sums: int


def rank_bytes(own: Checkpoint, live_tokens: int) -> RankBytes:
    """The bytes of one of `Checkpoint.shares`, in the model's dtype, with so many tokens in the cache."""
    assert isinstance(own.tensors, SharedTensors)
    config, size = own.config, own.dtype.itemsize
    # the shape of a packed weight is checked and not kept
    sizes = {n: _held(share) for n, share in own.tensors.plan.items() if not n.endswith(f".{PACKED_SHAPE}")}
    held = sum(sizes.values())
    # of a table one row is read; of a tied one it is read beside all of it, which the head reads
    table = sum(sizes.get(name, 0) for name in tensor_names(own.table_shape))
    step = held - (0 if config.tied else table) + table // config.vocab_size
    if not config.ropes:
        rows = config.max_positions + config.position_offset
        step -= sizes[f"{own.family.names['positions']}.weight"] // rows * (rows - 1)
    sums = sum(bool(sublayer.units(layer)) for layer in config.layers for sublayer in SUBLAYERS.values())
    added = sums * config.hidden_size * size + (config.embed_size or config.hidden_size) * size
    read = sum(share.read_bytes for share in own.tensors.plan.values())
    return RankBytes(held, read, step, cache_bytes(config, size, live_tokens), added, sums + 1)


def _held(share: TensorShare) -> int:
    """Bytes in memory, where zero points, which are packed down the rows, are not packed."""
    if share.run is not None and share.axis == 0:
        return share.run.count * share.shape[1]
    return share.nbytes
