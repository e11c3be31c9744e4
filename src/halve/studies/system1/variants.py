"""The models behind the two tables, as recipes, and the two procedures that fill them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from halve.compression.methods import Method
from halve.compression.recipe import make_step
from halve.measure.units import show_fraction
from halve.studies.system1 import published

# what is tried for the largest fraction, every published one among them
FRACTIONS = (published.SMALLEST, 0.01, 0.02, 0.05, 0.10, 0.20, 0.35, 0.50, 0.65, 0.80)
PRUNERS = {"inputs": "l1-inputs", "outputs": "l1-outputs"}
HEAD, EVERYTHING = ("lm_head",), ("Linear", "lm_head")


@dataclass(frozen=True)
class Procedure:
    """How a table is filled. `quantized` and `dense`: the linears that are pruned in a quantized model and in bf16."""

    key: str
    title: str
    quantized: tuple[str, ...]
    dense: tuple[str, ...]

    def targets(self, bits: int | None) -> tuple[str, ...]:
        return self.dense if bits is None else self.quantized


# The first system prunes what is an `nn.Linear`: all 197 matrices in bf16, the head alone once the others are packed.
OWN = Procedure("own", "its own way", HEAD, EVERYTHING)
RIGHT = Procedure("right", "the right way", EVERYTHING, EVERYTHING)
PROCEDURES = (OWN, RIGHT)


@dataclass(frozen=True)
class Variant:
    """One model: quantized to `bits` (None: not at all), then `fraction` of the inputs or outputs of `targets` pruned."""

    bits: int | None
    side: str = "inputs"
    fraction: float = 0.0
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        kind = "bf16" if self.bits is None else f"{self.bits}bit"
        if not self.fraction:
            return kind
        scope = "head" if self.targets == HEAD else "all"
        return f"{kind}-{self.side}-{100 * self.fraction:g}-{scope}"

    @property
    def base(self) -> Variant:
        """The same before it was pruned."""
        return Variant(self.bits)

    def with_fraction(self, fraction: float) -> Variant:
        return replace(self, fraction=fraction)

    def quantizer(self, random_weights: bool) -> list[Method]:
        """The step from the dense model. Random weights are rounded: same bytes and kernels, no text needed."""
        if self.bits is None:
            return []
        if random_weights:
            rounding = {"group_size": published.QUANTIZER["group_size"]}
            return [make_step("rtn", {"bits": self.bits, **rounding, "fallback": "channel"})]
        return [make_step("gptq", {"bits": self.bits, **published.QUANTIZER, "fallback": "channel"})]

    def pruner(self) -> list[Method]:
        """The step from `base`."""
        if not self.fraction:
            return []
        return [make_step(PRUNERS[self.side], {"fraction": self.fraction, "targets": list(self.targets)})]


def of_row(row: published.PublishedModel, procedure: Procedure) -> Variant:
    """The model that a row of the first table stands for, by one procedure."""
    return Variant(row.bits, "inputs", row.pruned, procedure.targets(row.bits) if row.pruned else ())


def of_cell(cell: published.PublishedFraction, procedure: Procedure) -> Variant:
    """What is pruned, more and more of it, for a cell of the second table."""
    return Variant(cell.bits, cell.side, 0.0, procedure.targets(cell.bits))


def kept() -> list[Variant]:
    """Every model of the first table, unpruned ones first, so that pruned ones find theirs."""
    models = dict.fromkeys(of_row(row, procedure) for row in published.MODELS for procedure in PROCEDURES)
    return sorted(models, key=lambda v: (v.fraction > 0, v.name))


def label(bits: int | None, pruned: float = 0.0) -> str:
    """`4 bit, pruned 10 %`."""
    return ("bf16" if bits is None else f"{bits} bit") + (f", pruned {show_fraction(pruned)}" if pruned else "")


def settings_json() -> dict[str, Any]:
    """What the models were made with, for the record."""
    return {"quantizer": published.QUANTIZER, "fractions_tried": list(FRACTIONS)}
