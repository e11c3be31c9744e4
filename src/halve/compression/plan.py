"""What a recipe will do to which linear, and how many bytes that leaves: decided from shapes alone, before any work."""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass, replace

import torch

from halve.checkpoint.reader import Checkpoint
from halve.checkpoint.stored import StoredLinear
from halve.errors import RecipeError, shown
from halve.model import inventory
from halve.model.config import ModelConfig
from halve.model.families import Family
from halve.model.inventory import LinearShape
from halve.model.wiring import SUBLAYERS
from halve.quantization import QuantSpec

Key = tuple[int | None, str]  # (layer, role); HEAD and TABLE belong to no layer
HEAD: Key = (None, "head")  # the output head
TABLE: Key = (None, inventory.TABLE)  # the embedding, which is no linear


@dataclass(frozen=True)
class ModelState:
    """The model as it stands between two steps. A tied head is among `linears` as what it shares with `table`."""

    family: Family
    config: ModelConfig
    table: StoredLinear
    linears: dict[Key, StoredLinear]
    others: dict[str, int]  # bytes of each tensor that is part of none of them, by its name
    dtype: torch.dtype  # of the model: what a linear that does not say otherwise is stored in

    @property
    def linear_bytes(self) -> int:
        """Bytes of all linears, a tied head not counted (it is the embedding)."""
        return sum(s.nbytes(self.dtype) for s in self._own)

    @property
    def _own(self) -> list[StoredLinear]:
        """The linears that have tensors of their own."""
        return [linear for key, linear in self.linears.items() if not (key == HEAD and self.config.tied)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.linear_bytes + self.table.nbytes(self.dtype) + sum(self.others.values())

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self._own)

    @property
    def schemes(self) -> dict[str, QuantSpec]:
        return {s.name: s.spec for s in (*self._own, self.table) if s.spec is not None}

    @property
    def plain(self) -> bool:
        """True when the stock architecture of the family can hold this model."""
        irregular = not self.family.stock or any(s.ragged or not s.whole for s in self.linears.values())
        first = self.config.layers[0]
        widths = {replace(layer, sliding_window=None, rope=None) for layer in self.config.layers}
        if irregular or len(widths) > 1 or not (first.has_attention and first.has_mlp):
            return False
        if self.family.heads_divide_hidden and self.config.hidden_size % first.num_heads:
            return False
        square = first.num_heads * self.config.head_dim == self.config.hidden_size
        return "head_dim" in self.family.width_fields or square


def state_of(checkpoint: Checkpoint, dtype: torch.dtype | None) -> ModelState:
    """The state of a folder, from its headers; `dtype`: what floating tensors but scales are written in (None: their own)."""
    family, config, dtypes = checkpoint.family, checkpoint.config, checkpoint.tensors.dtypes

    def stored(shape: LinearShape) -> StoredLinear:
        linear = checkpoint.stored(shape)
        if dtype is None:
            return linear
        return replace(linear, dtype=dtype if linear.spec is None else linear.dtype, bias_dtype=dtype)

    table = stored(checkpoint.table_shape)
    linears: dict[Key, StoredLinear] = {}
    for shape in checkpoint.linear_shapes():
        key = shape.layer, shape.role
        linears[key] = replace(table, shape=shape) if key == HEAD and config.tied else stored(shape)
    vectors = inventory.vector_shapes(family, config)
    vectors |= {
        f"{s.name}.weight": (s.out_features, s.in_features) for s in inventory.projection_linears(family, config)
    }
    others = {name: math.prod(shape) * (dtype or dtypes[name]).itemsize for name, shape in vectors.items()}
    return ModelState(family, config, table, linears, others, dtype or checkpoint.dtype)


@dataclass(frozen=True)
class DenseTable:
    """What a model keeps dense of its vocabulary, embedding and head: bytes now, and after the step that would shrink it."""

    names: tuple[str, ...]
    nbytes: int
    step: str
    nbytes_after: int


def dense_table(state: ModelState) -> DenseTable | None:
    """The embedding, and a head of its own, as far as they are dense; None where neither is."""
    head = state.linears[HEAD]
    parts = [part for part in (state.table, *(() if state.config.tied else (head,))) if part.spec is None]
    if not parts:
        return None
    spec = QuantSpec(8, 128)
    fits = all(spec.divides(part.kept_in) for part in parts)
    spec = spec if fits else QuantSpec(8, -1)
    targets = "|".join(part.name.rpartition(".")[2] for part in parts)
    step = f"rtn:bits=8{',group_size=128' if fits else ''},targets={targets}"
    before, after = (sum(p.nbytes(state.dtype) for p in some) for some in (parts, [p.quantized(spec) for p in parts]))
    return DenseTable(tuple(part.name for part in parts), before, step, after)


@dataclass(frozen=True)
class Row:
    """One linear's line in the plan."""

    name: str
    action: str  # what will be done, "skipped" when nothing
    reason: str
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class StepPlan:
    """What one step does: the linears it touches, the state it leaves, a line for every linear.

    `touched` and `rows` speak of the model before; `sources` gives the layer there of each layer that is left.
    """

    before: ModelState
    after: ModelState
    touched: frozenset[Key]
    rows: list[Row]
    sources: tuple[int, ...]

    def left(self, key: Key) -> StoredLinear | None:
        """What becomes of a linear or the embedding of the model before, None when it goes."""
        if key == TABLE:
            return self.after.table
        layer, role = key
        if layer is not None:
            if layer not in self.sources:
                return None
            layer = self.sources.index(layer)
        return self.after.linears.get((layer, role))

    def kept_sublayers(self) -> list[tuple[int, str]]:
        """The sublayers that stay, in the order they run, as (layer of the model before, name)."""
        return [(source, name) for layer, source in enumerate(self.sources) for name in self.sublayers(layer)]

    def sublayers(self, layer: int) -> list[str]:
        """Names of the sublayers that a layer of the model after has."""
        return [name for name, part in SUBLAYERS.items() if part.units(self.after.config.layers[layer])]


def matches(pattern: str, name: str) -> bool:
    """`re:...` is a regular expression on the whole name, otherwise a glob on the name or on its last part."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def select(
    state: ModelState, targets: tuple[str, ...], ignore: tuple[str, ...], *, table: bool = False
) -> tuple[list[StoredLinear], dict[Key, str]]:
    """The linears a step names, and for each other one the reason why it is skipped.

    `targets`: patterns (see `matches`); `Linear` stands for every linear but the head. `table`: the embedding may be named
    too, also as `Embedding`. Raises RecipeError for a pattern that matches nothing.
    """
    there = state.linears | ({TABLE: state.table} if table else {})
    classes = {"Linear": set(state.linears) - {HEAD}} | ({"Embedding": {TABLE}} if table else {})
    chosen, skipped = [], {}
    for pattern in (*(t for t in targets if t not in classes), *ignore):
        try:
            matched = any(matches(pattern, s.name) for s in there.values())
        except re.error as error:
            raise RecipeError(f"pattern {shown(pattern)} is not a regular expression ({error})") from error
        if not matched:
            names = [s.name for s in there.values()]
            examples = ", ".join([*names[:2], "...", *names[len(state.linears) - 1 :]])
            raise RecipeError(f"pattern {shown(pattern)} matches no linear: names are {examples}")
    for key, linear in there.items():
        wanted = any(key in classes.get(t, ()) or matches(t, linear.name) for t in targets)
        if any(matches(pattern, linear.name) for pattern in ignore):
            skipped[key] = "ignored"
        elif wanted:
            chosen.append(linear)
        elif key == HEAD:
            skipped[key] = "the head is left alone unless targets names lm_head"
        else:
            skipped[key] = "not among the targets"
    return chosen, skipped


def finish(
    method: str,
    state: ModelState,
    changed: dict[Key, tuple[StoredLinear, str]],
    skipped: dict[Key, str],
    config: ModelConfig | None = None,
    sources: tuple[int, ...] | None = None,
    removal: str = "removed",
) -> StepPlan:
    """The plan of a step that turns each linear in `changed` into (its new state, what was done).

    A tied head that is changed becomes a tensor of its own; one that is not goes with the embedding. `config`: that of the
    model after (its layers may be narrower, or lack a sublayer); `sources`: the layer of `state`
    behind each of its layers, when some go; `removal`: what is said of a linear that goes.
    """
    after_config = config or state.config
    sources = tuple(range(len(state.config.layers))) if sources is None else sources
    if HEAD in changed:
        after_config = replace(after_config, tied=False)
    table = changed[TABLE][0] if TABLE in changed else state.table
    linears = _renumbered(state, changed, after_config, sources)
    if after_config.tied:
        linears[HEAD] = replace(table, shape=linears[HEAD].shape)
    others = _others(state, after_config, sources)
    after = replace(state, config=after_config, table=table, linears=linears, others=others)
    plan = StepPlan(state, after, frozenset(changed), [], sources)
    removed = {key for key in state.linears if plan.left(key) is None}
    if not changed and not removed:
        reasons = "; ".join(sorted(set(skipped.values()))) or "no linear left"
        raise RecipeError(f"step {method} matched nothing to do ({reasons}): check targets and ignore")
    # the embedding has a line where a step does something to it
    for key, linear in (state.linears | ({TABLE: state.table} if TABLE in changed else {})).items():
        new, action = changed.get(key, (linear, "skipped"))
        sizes = [(s.nbytes(state.dtype), s.parameters) for s in (linear, new)]
        if key == HEAD and state.config.tied:
            sizes = [(0, 0), sizes[1] if key in changed else (0, 0)]  # a tied head is the embedding
        reason = skipped.get(key, "")
        if key in removed:
            sizes, action, reason = [sizes[0], (0, 0)], removal, ""
        (bytes_before, before), (bytes_after, after_it) = sizes
        plan.rows.append(Row(linear.name, action, reason, bytes_before, bytes_after, before, after_it))
    return plan


def _renumbered(
    state: ModelState, changed: dict[Key, tuple[StoredLinear, str]], config: ModelConfig, sources: tuple[int, ...]
) -> dict[Key, StoredLinear]:
    """The linears of the model after, under their new names."""
    linears: dict[Key, StoredLinear] = {}
    for layer, source in enumerate(sources):
        for shape in inventory.block_linears(state.family, config, layer):
            key = (source, shape.role)
            kept = changed[key][0] if key in changed else state.linears[key]
            linears[layer, shape.role] = replace(kept, shape=replace(kept.shape, name=shape.name, layer=layer))
    linears[HEAD] = changed[HEAD][0] if HEAD in changed else state.linears[HEAD]
    return linears


def _others(state: ModelState, config: ModelConfig, sources: tuple[int, ...]) -> dict[str, int]:
    """What is part of no linear in the model after, under its new names."""
    block = state.family.names["block"]
    there = {block.format(layer): block.format(source) for layer, source in enumerate(sources)}
    others = {name: size for name, size in state.others.items() if not name.startswith(block.split("{")[0])}
    for name in inventory.vector_shapes(state.family, config):
        if name not in others:
            place = next(place for place in there if name.startswith(f"{place}."))
            others[name] = state.others[there[place] + name.removeprefix(place)]
    return others


def describe(spec: QuantSpec) -> str:
    """`int4 g128`, `int8 per channel asymmetric`, ..."""
    size = "per channel" if spec.group_size == -1 else f"g{spec.group_size}"
    return f"int{spec.bits} {size}" + ("" if spec.symmetric else " asymmetric")
