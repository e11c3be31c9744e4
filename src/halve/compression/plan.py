"""What a recipe will do to which linear, and how many bytes that leaves: decided from shapes alone, before any work."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace

from halve.checkpoint.reader import Checkpoint
from halve.errors import RecipeError
from halve.model import families
from halve.model.decoder import ModelConfig
from halve.model.families import Family, LinearShape
from halve.quantization import QuantSpec

Key = tuple[int | None, str]  # (layer, role); (None, "head") is the output head


@dataclass(frozen=True)
class LinearState:
    """One linear as it stands at some point of a recipe."""

    shape: LinearShape
    kept_out: int
    kept_in: int
    spec: QuantSpec | None = None
    groups: int = 0
    ragged: bool = False

    @property
    def key(self) -> Key:
        return self.shape.layer, self.shape.role

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def parameters(self) -> int:
        return self.kept_out * self.kept_in

    def nbytes(self, itemsize: int) -> int:
        """Stored bytes of weight, scales, zero points, indices and bias, floats being `itemsize` wide."""
        if self.spec is None:
            total = self.parameters * itemsize
        else:
            words = -(-self.kept_in * self.spec.bits // 32)
            total = 4 * self.kept_out * words + self.kept_out * self.groups * itemsize + 16
            if not self.spec.symmetric:
                total += 4 * -(-self.kept_out * self.spec.bits // 32) * self.groups
            total += 4 * self.kept_in if self.ragged else 0
        total += 4 * self.kept_in if self.kept_in < self.shape.in_features else 0
        total += 4 * self.kept_out if self.kept_out < self.shape.out_features else 0
        return total + (self.shape.out_features * itemsize if self.shape.bias else 0)

    def quantized(self, spec: QuantSpec) -> LinearState:
        """The same linear under `spec`."""
        return replace(self, spec=spec, groups=self.kept_in // spec.columns_per_group(self.kept_in), ragged=False)

    @property
    def whole(self) -> bool:
        """True when every input and output the layer has is stored."""
        return self.kept_in == self.shape.in_features and self.kept_out == self.shape.out_features

    def keeping(self, outputs: int | None = None, inputs: int | None = None) -> LinearState:
        """The same linear with so many of its rows or columns stored; what it reads and writes stays as wide."""
        columns = self.kept_in if inputs is None else inputs
        # removing columns of a quantized weight leaves groups of unequal size
        ragged = self.ragged or (self.spec is not None and self.spec.group_size != -1 and columns < self.kept_in)
        return replace(self, kept_out=self.kept_out if outputs is None else outputs, kept_in=columns, ragged=ragged)

    def narrowed(self, outputs: int | None = None, inputs: int | None = None) -> LinearState:
        """The same linear between narrower activations: neighbours change with it and no index is stored."""
        shape = self.shape
        rows = shape.out_features if outputs is None else outputs
        columns = shape.in_features if inputs is None else inputs
        return replace(self.keeping(outputs, inputs), shape=replace(shape, out_features=rows, in_features=columns))


@dataclass(frozen=True)
class ModelState:
    """The model as it stands between two steps."""

    family: Family
    config: ModelConfig
    linears: dict[Key, LinearState]
    itemsize: int

    @property
    def linear_bytes(self) -> int:
        """Bytes of all linears, a tied head not counted (it is the embedding)."""
        return sum(
            s.nbytes(self.itemsize) for k, s in self.linears.items() if not (k[1] == "head" and self.config.tied)
        )

    @property
    def parameters(self) -> int:
        return sum(s.parameters for k, s in self.linears.items() if not (k[1] == "head" and self.config.tied))

    @property
    def schemes(self) -> dict[str, QuantSpec]:
        return {s.name: s.spec for s in self.linears.values() if s.spec is not None}

    @property
    def plain(self) -> bool:
        """True when the stock architecture of the family can hold this model."""
        irregular = any(s.ragged or not s.whole for s in self.linears.values())
        first = self.config.layers[0]
        widths = {replace(layer, sliding_window=None) for layer in self.config.layers}
        if irregular or len(widths) > 1 or not (first.has_attention and first.has_mlp):
            return False
        if self.family.heads_divide_hidden and self.config.hidden_size % first.num_heads:
            return False
        square = first.num_heads * self.config.head_dim == self.config.hidden_size
        return "head_dim" in self.family.width_fields or square


def state_of(checkpoint: Checkpoint, itemsize: int) -> ModelState:
    """The state of a folder, from its headers."""
    linears: dict[Key, LinearState] = {}
    for shape in checkpoint.linear_shapes():
        tied_head = shape.role == "head" and checkpoint.config.tied
        kept_out, kept_in, spec = shape.out_features, shape.in_features, checkpoint.schemes.get(shape.name)
        groups, ragged = 0, False
        if not tied_head:
            if checkpoint.has(f"{shape.name}.kept_outputs"):
                (kept_out,) = checkpoint.stored_shape(f"{shape.name}.kept_outputs")
            if checkpoint.has(f"{shape.name}.kept_inputs"):
                (kept_in,) = checkpoint.stored_shape(f"{shape.name}.kept_inputs")
            if spec is not None:
                groups = checkpoint.stored_shape(f"{shape.name}.weight_scale")[1]
                ragged = checkpoint.has(f"{shape.name}.group_index")
        linears[shape.layer, shape.role] = LinearState(
            shape, kept_out, kept_in, None if tied_head else spec, groups, ragged
        )
    return ModelState(checkpoint.family, checkpoint.config, linears, itemsize)


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

    def left(self, key: Key) -> LinearState | None:
        """What becomes of a linear of the model before, None when it goes."""
        layer, role = key
        if layer is not None:
            if layer not in self.sources:
                return None
            layer = self.sources.index(layer)
        return self.after.linears.get((layer, role))


def matches(pattern: str, name: str) -> bool:
    """`re:...` is a regular expression on the whole name, otherwise a glob on the name or on its last part."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def select(
    state: ModelState, targets: tuple[str, ...], ignore: tuple[str, ...]
) -> tuple[list[LinearState], dict[Key, str]]:
    """The linears a step names, and for each other one the reason why it is skipped.

    `targets`: patterns (see `matches`); `Linear` stands for every linear but the head.
    Raises RecipeError for a pattern that matches no linear.
    """
    chosen, skipped = [], {}
    for pattern in (*(t for t in targets if t != "Linear"), *ignore):
        try:
            found = any(matches(pattern, s.name) for s in state.linears.values())
        except re.error as error:
            raise RecipeError(f"pattern {pattern!r} is not a regular expression ({error})") from error
        if not found:
            examples = ", ".join(s.name for s in list(state.linears.values())[:2])
            raise RecipeError(f"pattern {pattern!r} matches no linear: names are {examples}, ..., lm_head")
    for key, linear in state.linears.items():
        head = key[1] == "head"
        wanted = any((t == "Linear" and not head) or matches(t, linear.name) for t in targets)
        if any(matches(pattern, linear.name) for pattern in ignore):
            skipped[key] = "ignored"
        elif not wanted:
            skipped[key] = "the head is left alone unless targets names lm_head" if head else "not among the targets"
        else:
            chosen.append(linear)
    return chosen, skipped


def finish(
    method: str,
    state: ModelState,
    changed: dict[Key, tuple[LinearState, str]],
    skipped: dict[Key, str],
    config: ModelConfig | None = None,
    sources: tuple[int, ...] | None = None,
    removal: str = "removed",
) -> StepPlan:
    """The plan of a step that turns each linear in `changed` into (its new state, what was done).

    `config`: that of the model after (its layers may be narrower, or lack a sublayer); `sources`: the layer of `state`
    behind each of its layers, when some go; `removal`: what is said of a linear that goes.
    """
    after_config = config or state.config
    sources = tuple(range(len(state.config.layers))) if sources is None else sources
    if (None, "head") in changed:
        after_config = replace(after_config, tied=False)  # a head of its own; the embedding stays as it was
    after = replace(state, config=after_config, linears=_renumbered(state, changed, after_config, sources))
    plan = StepPlan(state, after, frozenset(changed), [], sources)
    removed = {key for key in state.linears if plan.left(key) is None}
    if not changed and not removed:
        reasons = "; ".join(sorted(set(skipped.values()))) or "no linear left"
        raise RecipeError(f"step {method} matched nothing to do ({reasons}): check targets and ignore")
    for key, linear in state.linears.items():
        new, action = changed.get(key, (linear, "skipped"))
        sizes = [(s.nbytes(state.itemsize), s.parameters) for s in (linear, new)]
        if key[1] == "head" and state.config.tied:
            sizes = [(0, 0), sizes[1] if key in changed else (0, 0)]  # a tied head is the embedding
        reason = skipped.get(key, "")
        if key in removed:
            sizes, action, reason = [sizes[0], (0, 0)], removal, ""
        (bytes_before, before), (bytes_after, after_it) = sizes
        plan.rows.append(Row(linear.name, action, reason, bytes_before, bytes_after, before, after_it))
    return plan


def _renumbered(
    state: ModelState, changed: dict[Key, tuple[LinearState, str]], config: ModelConfig, sources: tuple[int, ...]
) -> dict[Key, LinearState]:
    """The linears of the model after, under their new names."""
    linears: dict[Key, LinearState] = {}
    for layer, source in enumerate(sources):
        for shape in families.block_linears(state.family, config, layer):
            key = (source, shape.role)
            kept = changed[key][0] if key in changed else state.linears[key]
            linears[layer, shape.role] = replace(kept, shape=replace(kept.shape, name=shape.name, layer=layer))
    key = (None, "head")
    linears[key] = changed[key][0] if key in changed else state.linears[key]
    return linears


def describe(spec: QuantSpec) -> str:
    """`int4 g128`, `int8 per channel asymmetric`, ..."""
    size = "per channel" if spec.group_size == -1 else f"g{spec.group_size}"
    return f"int{spec.bits} {size}" + ("" if spec.symmetric else " asymmetric")
