"""What a search varies: `STEP.key=LOW..HIGH`, or `STEP.key=2|3|4|8`, as a grid of values of one option."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halve.compression.methods import Method
from halve.errors import RecipeError

Value = int | float
Point = tuple[Value, ...]  # one value for each varied option

DEFAULT_RESOLUTION = 0.01
_REQUEST = re.compile(r"(?P<step>[^.=\s]+)\.(?P<option>\w+)=(?P<range>\S+)")
_RANGE = re.compile(r"(?P<low>-?\d+(?:\.\d+)?(?:e-?\d+)?)\.\.(?P<high>-?\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True)
class Varied:
    """One option of the recipe's step number `step` (from 0) and the values it may take, in the order given."""

    name: str  # as the user wrote it: l1-inputs.fraction
    step: int
    option: str
    values: tuple[Value, ...]
    resolution: Value | None  # distance of the values, None for a list of them

    @property
    def text(self) -> str:
        """The values as in a request."""
        if self.resolution is None:
            return "|".join(f"{value:g}" for value in self.values)
        return f"{min(self.values):g}..{max(self.values):g}"

    def json(self, steps: Sequence[Method]) -> dict[str, Any]:
        """For records."""
        return {
            "name": self.name,
            "step": steps[self.step].name,
            "position": self.step + 1,
            "option": self.option,
            "low": min(self.values),
            "high": max(self.values),
            "resolution": self.resolution,
            "values": None if self.resolution else list(self.values),
        }


def parse_vary(texts: Sequence[str], steps: Sequence[Method], resolution: float | None = None) -> list[Varied]:
    """The varied options. STEP is a step's name, or its position from 1.

    `resolution` (0.01 by default) is the distance of the values of options that are not whole numbers. Raises
    RecipeError for an unknown step or option, one that is no number, and values the step does not take.
    """
    if not texts:
        raise RecipeError("nothing is varied: give --vary STEP.key=LOW..HIGH for at least one option")
    if resolution is not None and not (math.isfinite(resolution) and resolution > 0):
        raise RecipeError(f"resolution {resolution}: must be above 0")
    varied = [_parse(text, steps, DEFAULT_RESOLUTION if resolution is None else resolution) for text in texts]
    places = [(v.step, v.option) for v in varied]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise RecipeError(f"{texts[index]!r}: option {place[1]} of step {place[0] + 1} is varied twice")
    if resolution is not None and all(
        isinstance(value, int) or v.resolution is None for v in varied for value in v.values
    ):
        raise RecipeError(f"resolution {resolution}: nothing varied has one, whole numbers and lists are tried exactly")
    return varied


def _parse(text: str, steps: Sequence[Method], resolution: float) -> Varied:
    match = _REQUEST.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"{text!r}: is not STEP.key=LOW..HIGH or STEP.key=A|B|C")
    step, option = _find_step(match["step"], steps), match["option"]
    method = steps[step]
    hints = typing.get_type_hints(type(method))
    fields = [f.name for f in dataclasses.fields(typing.cast(Any, method))]
    if option not in fields:
        raise RecipeError(f"{text!r}: step {method.name} has no option {option!r}: it takes {', '.join(fields)}")
    kind = _number_type(hints[option])
    if kind is None:
        numbers = ", ".join(name for name in fields if _number_type(hints[name])) or "none"
        raise RecipeError(f"{text!r}: option {option} of {method.name} is no number; those that are: {numbers}")
    values, distance = _values(text, match["range"], kind, resolution)
    # whole numbers and lists may leave out what lies between; of a range of shares the ends decide
    for value in values if kind is int or distance is None else (values[0], values[-1]):
        try:
            dataclasses.replace(typing.cast(Any, method), **{option: value})
        except ValueError as error:  # RecipeError, or the number format's own
            raise RecipeError(f"{text!r}: {option}={value} is refused ({error}): name values the step takes") from error
    return Varied(text.split("=")[0].strip(), step, option, values, distance)


def _find_step(text: str, steps: Sequence[Method]) -> int:
    names = [method.name for method in steps]
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    if text.isdecimal():
        if not 1 <= int(text) <= len(names):
            raise RecipeError(f"step {text}: the recipe has steps 1 to {len(names)} ({listed})")
        return int(text) - 1
    if text not in names:
        raise RecipeError(f"step {text!r} is not in the recipe: it has {listed}")
    if names.count(text) > 1:
        places = " or ".join(str(number) for number, name in enumerate(names, 1) if name == text)
        raise RecipeError(f"step {text!r} occurs {names.count(text)} times: name its position, {places}")
    return names.index(text)


def _number_type(hint: Any) -> type | None:
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint if hint in (int, float) else None


def _values(text: str, asked: str, kind: type, resolution: float) -> tuple[tuple[Value, ...], Value | None]:
    try:
        if "|" in asked:
            values = tuple(kind(part) for part in asked.split("|"))
            if len(set(values)) < len(values):
                raise RecipeError(f"{text!r}: names a value twice")
            return values, None
        ends = _RANGE.fullmatch(asked)
        if ends is None:
            raise RecipeError(f"{text!r}: {asked!r} is neither LOW..HIGH nor A|B|C")
        low, high = kind(ends["low"]), kind(ends["high"])
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{text!r}: {asked!r} does not hold {'whole ' if kind is int else ''}numbers") from None
    if not low < high:
        raise RecipeError(f"{text!r}: the range is empty, {low:g} is not below {high:g}")
    if kind is int:
        return tuple(range(low, high + 1)), 1
    count = math.floor((high - low) / resolution + 1e-9)
    values = [round(low + index * resolution, 10) for index in range(count + 1)]
    if high - values[-1] > 1e-9:
        values.append(high)  # the end is always tried
    return tuple(values), resolution


def apply(steps: Sequence[Method], varied: Sequence[Varied], point: Point) -> list[Method]:
    """The recipe at one point. Raises RecipeError when the step refuses the value."""
    changed: list[Any] = list(steps)
    for one, value in zip(varied, point, strict=True):
        changed[one.step] = dataclasses.replace(changed[one.step], **{one.option: value})
    return changed


def parameters(varied: Sequence[Varied], point: Point) -> dict[str, Value]:
    """A point as names and values."""
    return {one.name: value for one, value in zip(varied, point, strict=True)}


def label(varied: Sequence[Varied], point: Point) -> str:
    """A point as text, good for a file name: `prune-mlp.fraction=0.2+gptq.bits=4`."""
    return "+".join(f"{name}={value:.10g}" for name, value in parameters(varied, point).items())
