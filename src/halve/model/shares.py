"""How ranks share a model: which heads, channels and tokens each of them computes, as numbers, before there is a weight.

Column parallel where a linear reads the stream, row parallel where it writes it (Shoeybi et al. 2019, arXiv 1909.08053,
section 3): a rank computes some units of each sublayer from the whole stream, and the stream is the sum over ranks. What a
linear's rows and columns belong to is read from the wiring, so no linear is named here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from halve.errors import HalveError
from halve.model.config import LayerConfig, ModelConfig
from halve.model.inventory import TABLE, LinearShape, NormShape
from halve.model.vocabulary_share import vocabulary_bounds
from halve.model.wiring import HEAD_NORMS, SPACES, STREAM, WIRES

# what the width of a space is counted in: fields of a LayerConfig
_UNITS = {
    "queries": "num_heads",
    "heads": "num_heads",
    "keys": "num_kv_heads",
    "values": "num_kv_heads",
    "gate": "intermediate_size",
    "up": "intermediate_size",
    "hidden": "intermediate_size",
}
_HEADS_OF_NORM = dict(zip(HEAD_NORMS, ("queries", "keys"), strict=True))


@dataclass(frozen=True)
class LinearShare:
    """The outputs and the inputs of a linear that a rank computes with, of all that the layer has, kept or not.

    adds_bias: not where ranks add up what they compute, and another one adds it.
    """

    rows: range
    columns: range
    adds_bias: bool = True


@dataclass(frozen=True)
class Share:
    """What one rank has of a model. layers: by field of a LayerConfig, the units of each layer."""

    rank: int
    ranks: int
    whole: ModelConfig
    vocabulary: range
    layers: tuple[dict[str, range], ...]

    @property
    def config(self) -> ModelConfig:
        """The model of narrower layers and fewer tokens that this rank holds."""
        layers = tuple(
            replace(layer, **{name: len(units) for name, units in own.items()})
            for layer, own in zip(self.whole.layers, self.layers, strict=True)
        )
        return replace(self.whole, layers=layers, vocab_size=len(self.vocabulary))

    def linear(self, shape: LinearShape) -> LinearShare:
        """What this rank has of a linear; all of one that neither belongs to a block nor to the vocabulary."""
        whole = range(shape.out_features), range(shape.in_features)
        if shape.layer is None:
            return LinearShare(self.vocabulary if shape.role in ("head", TABLE) else whole[0], whole[1])
        wire = WIRES[shape.role]
        added_up = wire.writes == STREAM
        return LinearShare(
            self._run(wire.writes, shape.layer), self._run(wire.reads, shape.layer), self.rank == 0 or not added_up
        )

    def norm(self, layer: int, shape: NormShape) -> range:
        """The numbers of a block's norm that this rank has: of one over all heads those of its own."""
        if shape.role in _HEADS_OF_NORM and self.whole.qk_norm_whole:
            return self._run(_HEADS_OF_NORM[shape.role], layer)
        return range(shape.size)

    def _run(self, space: str, index: int) -> range:
        """The part of a space of a layer that this rank has."""
        layer = self.whole.layers[index]
        width = SPACES[space].width(self.whole, layer)
        if space == STREAM:
            return range(width)
        units = self.layers[index][_UNITS[space]]
        each = width // getattr(layer, _UNITS[space])
        return range(units.start * each, units.stop * each)


def split(config: ModelConfig, ranks: int) -> list[Share]:
    """The shares of all ranks. Raises HalveError, with the layer and the nearest widths that fit, where there are none."""
    if ranks < 1:
        raise HalveError(f"tp={ranks} must be at least 1 rank")
    if ranks > config.vocab_size:
        raise HalveError(f"tp={ranks}: a vocabulary of {config.vocab_size} tokens has no token for every rank")
    refuse_uneven(config, ranks)
    bounds = vocabulary_bounds(config.vocab_size, ranks)
    return [
        Share(
            rank,
            ranks,
            config,
            range(bounds[rank], bounds[rank + 1]),
            tuple(_layer_share(layer, rank, ranks) for layer in config.layers),
        )
        for rank in range(ranks)
    ]


def refuse_uneven(config: ModelConfig, ranks: int) -> None:
    """Raise HalveError for the first layer whose heads `ranks` ranks cannot share evenly, or that has no channel for each.

    Channels are many and need not be even; a head more or less would be felt.
    """
    for index, layer in enumerate(config.layers):
        if layer.has_attention and not heads_fit(layer.num_heads, layer.num_kv_heads, ranks):
            each = layer.num_heads // layer.num_kv_heads
            fit = _nearest(layer.num_kv_heads, ranks, lambda kv, each=each: heads_fit(kv * each, kv, ranks))
            has = f"{_count(layer.num_heads, 'query head')} on {_count(layer.num_kv_heads, 'key/value head')}"
            raise HalveError(
                f"layer {index} has {has}, which {ranks} ranks cannot share evenly: {fit} key/value heads of "
                f"{_count(each, 'query head')} each fit (prune-heads:multiple_of={ranks}), or use another number of ranks"
            )
        if 0 < layer.intermediate_size < ranks:
            width = _count(layer.intermediate_size, "channel")
            raise HalveError(
                f"layer {index} has an MLP of {width}, none for some of {ranks} ranks: {ranks} or more fit; use fewer ranks"
            )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def heads_fit(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether ranks can share heads evenly: some key/value heads each, or one of them on several ranks."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _nearest(width: int, ranks: int, fits: Callable[[int], bool]) -> str:
    """The nearest widths that fit, below and above."""
    below = next((w for w in range(width - 1, 0, -1) if fits(w)), None)
    above = next(w for w in range(width + 1, width + ranks + 1) if fits(w))
    return " or ".join(str(w) for w in (below, above) if w is not None)


def _layer_share(layer: LayerConfig, rank: int, ranks: int) -> dict[str, range]:
    """Units of one layer by field: even runs, and of key/value heads those that the query heads read."""
    kv_heads = layer.num_kv_heads
    shares = {
        name: range(getattr(layer, name) * rank // ranks, getattr(layer, name) * (rank + 1) // ranks)
        for name in ("num_heads", "num_kv_heads", "intermediate_size")
    }
    if 0 < kv_heads < ranks:
        own = kv_heads * rank // ranks
        shares["num_kv_heads"] = range(own, own + 1)
    return shares
