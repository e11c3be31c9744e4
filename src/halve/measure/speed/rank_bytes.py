"""What a rank holds, reads and adds up, from the plan of its tensors: no weight is needed, nor the machine."""

from __future__ import annotations

from dataclasses import dataclass

from halve.checkpoint.reader import Checkpoint
from halve.checkpoint.shares import SharedTensors
from halve.checkpoint.stored import PACKED_SHAPE
from halve.measure.speed.timing import cache_bytes
from halve.model.wiring import SUBLAYERS


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank. held: its tensors, as stored; read: of the files, to load them; step: of the tensors that a decode
    step reads; cache: keys and values it reads beside; added: of the vectors that ranks add up in a step, each sum counted
    once; sums: how many these are."""

    held: int
    read: int
    step: int
    cache: int
    added: int
    sums: int


def rank_bytes(own: Checkpoint, live_tokens: int) -> RankBytes:
    """The bytes of one of `Checkpoint.shares`, in the model's dtype, with so many tokens in the cache."""
    assert isinstance(own.tensors, SharedTensors)
    config, size, names = own.config, own.dtype.itemsize, own.family.names
    # the shape of a packed weight is checked and not kept
    sizes = {n: share.nbytes for n, share in own.tensors.plan.items() if not n.endswith(f".{PACKED_SHAPE}")}
    held = sum(sizes.values())
    step = held
    rows = {"embed": len(own.tensors.plan[f"{names['embed']}.weight"].rows)} if not config.tied else {}
    if not config.ropes:
        rows["positions"] = config.max_positions + config.position_offset
    for table, count in rows.items():  # of a table one row is read
        step -= sizes[f"{names[table]}.weight"] // count * (count - 1)
    if config.tied:
        step += (config.embed_size or config.hidden_size) * size  # as the embedding, beside all of it as the head
    sums = sum(bool(sublayer.units(layer)) for layer in config.layers for sublayer in SUBLAYERS.values())
    added = sums * config.hidden_size * size + (config.embed_size or config.hidden_size) * size
    read = sum(share.read_bytes for share in own.tensors.plan.values())
    return RankBytes(held, read, step, cache_bytes(config, size, live_tokens), added, sums + 1)
