"""How a block is wired: every linear in it, the vector it reads and the vector it writes.

This table is the only place that says so. Which linears are siblings, in what order they run, whose rows go when a
channel goes, how wide each is: the decoder, the compression methods and the compiled decode steps all ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from halve.model.config import LayerConfig, ModelConfig

STREAM = "stream"


@dataclass(frozen=True)
class Space:
    """A vector inside a block. `made_of`: the spaces it is computed from, unit by unit (see `Sublayer.units`): a unit that
    is no longer read here need not be written there."""

    width: Callable[[ModelConfig, LayerConfig], int]
    made_of: tuple[str, ...] = ()


def _query_width(config: ModelConfig, layer: LayerConfig) -> int:
    return layer.num_heads * config.head_dim


def _key_width(config: ModelConfig, layer: LayerConfig) -> int:
    return layer.num_kv_heads * config.head_dim


def _mlp_width(config: ModelConfig, layer: LayerConfig) -> int:
    return layer.intermediate_size


SPACES: dict[str, Space] = {
    # the residual stream, read behind a norm, written by adding
    STREAM: Space(lambda config, layer: config.hidden_size),
    "queries": Space(_query_width),
    "keys": Space(_key_width),
    "values": Space(_key_width),
    # the values that attention mixed, by query head
    "heads": Space(_query_width, made_of=("queries", "keys", "values")),
    "gate": Space(_mlp_width),
    "up": Space(_mlp_width),
    "hidden": Space(_mlp_width, made_of=("gate", "up")),  # behind the activation
}


@dataclass(frozen=True)
class Sublayer:
    """One of the two parts of a block that add to the residual stream."""

    name: str
    norm: str  # role of the norm it reads the stream behind, or of that of the sum
    output_norm: str  # role of the norm of what it writes
    merged: str  # role of the one linear that those which read the stream become when they are merged
    sizes: tuple[str, ...]  # the fields of a LayerConfig that shrink when units go; the first counts them

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Roles of the linears that read the stream."""
        return tuple(wire.role for wire in BLOCK if wire.sublayer is self and wire.reads == STREAM)

    @cached_property
    def writer(self) -> str:
        """Role of the linear that writes the stream."""
        return next(wire.role for wire in BLOCK if wire.sublayer is self and wire.writes == STREAM)

    def running_readers(self, linears: Container[str]) -> list[str]:
        """`readers` as a block holds them: those of its `linears`, or the one they are merged into."""
        return [role for role in (self.merged, *self.readers) if role in linears]

    def units(self, layer: LayerConfig) -> int:
        """What can be removed one by one: key/value heads with their query heads, channels of the MLP. 0: not there."""
        return getattr(layer, self.sizes[0])

    def resized(self, layer: LayerConfig, units: int) -> LayerConfig:
        """The layer with `units` left in this sublayer; without the sublayer for 0."""
        before = max(1, self.units(layer))
        return replace(layer, **{size: getattr(layer, size) // before * units for size in self.sizes})


ATTENTION = Sublayer("attention", "attn_norm", "attn_output_norm", "qkv_proj", ("num_kv_heads", "num_heads"))
MLP = Sublayer("mlp", "mlp_norm", "mlp_output_norm", "gate_up_proj", ("intermediate_size",))
SUBLAYERS: dict[str, Sublayer] = {sublayer.name: sublayer for sublayer in (ATTENTION, MLP)}  # in the order they run
HEAD_NORMS = ("q_norm", "k_norm")  # over each head of queries and keys, where a model has them (`qk_norm`)


@dataclass(frozen=True)
class Wire:
    """One linear of a block: the spaces it reads and writes, and the field of a ModelConfig that says whether it has a
    bias. `gate`: only there where the MLP is gated."""

    role: str
    sublayer: Sublayer
    reads: str
    writes: str
    bias: str
    gate: bool = False

    def inputs(self, config: ModelConfig, layer: LayerConfig) -> int:
        return SPACES[self.reads].width(config, layer)

    def outputs(self, config: ModelConfig, layer: LayerConfig) -> int:
        return SPACES[self.writes].width(config, layer)


BLOCK = (  # in the order they run
    Wire("q_proj", ATTENTION, STREAM, "queries", "qkv_bias"),
    Wire("k_proj", ATTENTION, STREAM, "keys", "qkv_bias"),
    Wire("v_proj", ATTENTION, STREAM, "values", "qkv_bias"),
    Wire("o_proj", ATTENTION, "heads", STREAM, "o_bias"),
    Wire("gate_proj", MLP, STREAM, "gate", "mlp_bias", gate=True),
    Wire("up_proj", MLP, STREAM, "up", "mlp_bias"),
    Wire("down_proj", MLP, "hidden", STREAM, "mlp_bias"),
)
WIRES: dict[str, Wire] = {wire.role: wire for wire in BLOCK}


def wires(config: ModelConfig, layer: LayerConfig) -> list[Wire]:
    """The linears that a layer has, in the order they run."""
    return [wire for wire in BLOCK if wire.sublayer.units(layer) and (config.gated or not wire.gate)]


def stages(config: ModelConfig, layer: LayerConfig) -> list[tuple[str, ...]]:
    """Roles of the linears of a layer that read one input together, in the order they run."""
    groups = groupby(wires(config, layer), key=lambda wire: (wire.sublayer, wire.reads))
    return [tuple(wire.role for wire in group) for _, group in groups]


def siblings(role: str) -> tuple[str, ...]:
    """Roles of the linears that read what `role` reads, itself included; the output head has none in a block."""
    wire = WIRES.get(role)
    if wire is None:
        return (role,)
    return tuple(other.role for other in BLOCK if (other.sublayer, other.reads) == (wire.sublayer, wire.reads))


def producers(role: str) -> tuple[str, ...]:
    """Roles of the linears that write what the input of `role` is made of; none for what reads the stream."""
    return tuple(other.role for other in BLOCK if other.writes in SPACES[WIRES[role].reads].made_of)
