"""The compression methods. One file each, one entry in METHODS.

A method is a frozen dataclass whose fields are the options of its step. `plan` decides from shapes alone what it will
do and raises RecipeError for what cannot work; `edit` changes the linears of one block and returns what it measured.
A method whose choice depends on data is a `Resolvable` as well: asked once, before its pass, it answers with a method
of the same kind that names its choice, and that one is planned and run.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from halve.compression.methods.depth import DropAttention, DropLayers, DropMlp
from halve.compression.methods.gptq import Gptq
from halve.compression.methods.l1 import L1Inputs, L1Outputs
from halve.compression.methods.prune_units import PruneHeads, PruneMlp
from halve.compression.methods.rtn import Rtn
from halve.compression.plan import ModelState, StepPlan
from halve.compression.walk import BlockView, Walk


class Method(Protocol):
    """One step of a recipe."""

    name: ClassVar[str]

    @property
    def calibrates(self) -> bool:
        """Whether `edit` needs the inputs of the block."""
        ...

    def plan(self, state: ModelState) -> StepPlan:
        """What this step will do to a model in `state`."""
        ...

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        """Change the linears of one block in place; one report row per linear touched."""
        ...


@runtime_checkable
class Resolvable(Protocol):
    """A method that may have to see data before its plan is fixed."""

    @property
    def resolved(self) -> bool:
        """Whether the choice is made already."""
        ...

    def resolve(self, walk: Walk) -> Method:
        """The method with its choice made, from the inputs that `walk` (used up by it) takes through the model.

        `plan` of the unresolved method stands for any choice: the same counts, some layers.
        """
        ...


@runtime_checkable
class Aiming(Protocol):
    """A method that may need the dense model's stream beside the compressed one."""

    @property
    def aims(self) -> bool:
        """Whether `edit` does."""
        ...


def streams(method: Method) -> int:
    """How many streams of hidden states a step carries: none, the compressed model's, the dense one's beside it."""
    return int(method.calibrates) + (isinstance(method, Aiming) and method.aims)


_ALL = (Rtn, Gptq, L1Inputs, L1Outputs, PruneMlp, PruneHeads, DropLayers, DropAttention, DropMlp)
METHODS: dict[str, type[Any]] = {method.name: method for method in _ALL}
