"""The compression methods. One file each, one entry in METHODS.

A method is a frozen dataclass whose fields are the options of its step. `plan` decides from shapes alone what it will
do and raises RecipeError for what cannot work; `edit` changes the linears of one block and returns what it measured.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from halve.calibrate import BlockView
from halve.methods.gptq import Gptq
from halve.methods.rtn import Rtn
from halve.plan import ModelState, StepPlan


class Method(Protocol):
    """One step of a recipe."""

    name: ClassVar[str]
    calibrates: ClassVar[bool]  # whether `edit` needs the inputs of the block

    def plan(self, state: ModelState) -> StepPlan:
        """What this step will do to a model in `state`."""
        ...

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        """Change the linears of one block in place; one report row per linear touched."""
        ...


METHODS: dict[str, type[Any]] = {method.name: method for method in (Rtn, Gptq)}
