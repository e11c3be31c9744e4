"""JSON files read through the type that says what is in them: what is wrong is found here and named, nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Set
from functools import cache
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from halve.errors import DataError, HalveError, first_line, reading

_DEEPEST = 100  # levels of a JSON file: a handful
_LONGEST = 64 << 20  # bytes of one
_LARGEST = 2**64  # a seed, or bytes
_NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null",
    list: "a list", tuple: "a list", dict: "an object",
}  # fmt: skip
_Fault = tuple[str, str]  # where, and what is wrong there
_REMEDY = "make it again, or move it elsewhere"


def parse_json(path: Path) -> Any:
    """The JSON in a file.

    Raises OSError when it cannot be read and ValueError, whose one line says why, when it is not JSON, longer than 64 MiB or
    nested deeper than 100 levels, which no program that writes such files comes near.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a pipe or a device")  # it may never end
    with path.open("rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST:,} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from None
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def parsed(path: Path, failure: type[HalveError], missing: str, remedy: str) -> Any:
    """The JSON in a file, or `failure`: `missing` where there is none, and with this remedy where it is no JSON."""
    with reading(path, failure):
        if not path.exists():
            raise failure(missing)
        try:
            return parse_json(path)
        except ValueError as error:
            raise failure(f"{path} is not valid JSON ({first_line(error)}): {remedy}") from error


def read_value(path: Path) -> Any:
    """What a JSON file of ours holds, of any type.

    Raises DataError when it is missing or not JSON, and for what JSON allows and no program of ours writes: NaN and
    infinities, numbers beyond 64 bits.
    """
    value = parsed(path, DataError, f"{path} does not exist: name a file that is there", _REMEDY)
    fault = _odd(value)
    if fault is not None:
        raise _malformed(path, fault)
    return value


def check_type(value: Any, kind: Any, source: str | Path, optional: Set[str] = frozenset()) -> None:
    """Raise DataError unless `value`, out of JSON, is of the type `kind`: a TypedDict, and what its annotations may say.

    A tuple is a list of that length, a float may be written as a whole number, Annotated[float, (low, high)] has limits.
    Keys that the type does not name are free, and those in `optional` may be missing.
    """
    fault = _fault_in_object(value, kind, "", optional) if is_typeddict(kind) else _fault(value, kind, "")
    if fault is not None:
        raise _malformed(source, fault)


def check_has(place: Any, key: str, where: str, source: str | Path) -> None:
    """Raise DataError when the object at `where` lacks a key; what is no object is left to `check_type`."""
    if isinstance(place, Mapping) and key not in place:
        raise _malformed(source, (where, f'lacks "{key}"'))


def finite(value: Any, lost: dict[str, str] | None = None, where: str = "") -> Any:
    """A value for JSON, which knows no infinity: such a number becomes null, and `lost` gets its place and its name."""
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost[where] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v, lost, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v, lost, f"{where}.{i}") for i, v in enumerate(value)]
    return value


def _malformed(source: str | Path, fault: _Fault) -> DataError:
    where, what = fault
    named = f'"{where}"' if where else "it"
    return DataError(f"{source} is malformed, {named} {what}: {_REMEDY}")


def _odd(value: Any) -> _Fault | None:
    left = [(value, "")]
    while left:
        one, where = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return where, f"is {one}"
        if isinstance(one, int) and abs(one) > _LARGEST:
            return where, f"is a number of {len(str(one))} digits"
        inner = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        left += [(v, f"{where}.{key}" if where else str(key)) for key, v in inner]
    return None


def _fault(value: Any, kind: Any, where: str) -> _Fault | None:
    """The first thing about `value` that is not as `kind` says."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is NotRequired:
        return _fault(value, arguments[0], where)
    if origin is Annotated:
        fault, (low, high) = _fault(value, arguments[0], where), arguments[1]
        if fault is None and not low <= value <= high:
            fault = where, f"is {value:g}, expected {low:g} to {high:g}"
        return fault
    if origin in (Union, UnionType):
        like = [one for one in arguments if _is_like(value, one)]
        return _fault(value, like[0], where) if like else _unlike(value, kind, where)
    if is_typeddict(kind):
        return _fault_in_object(value, kind, where)
    if not _is_like(value, kind):
        return _unlike(value, kind, where)
    if origin is tuple and len(value) != len(arguments):
        return where, f"is not a list of {len(arguments)}"
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    kinds = arguments if origin is tuple else repeat(arguments[-1] if arguments else Any)
    return _first(((key, one, inner) for (key, one), inner in zip(entries, kinds, strict=False)), where)


def _is_like(value: Any, kind: Any) -> bool:
    """Whether the value is of that type, whatever is inside it."""
    like = _outer(kind)
    held = {float: (int, float), tuple: list}.get(like, like)
    return like is Any or (isinstance(value, held) and not (isinstance(value, bool) and like is not bool))


def _outer(kind: Any) -> Any:
    """The type without what it says of its inside and of limits."""
    if get_origin(kind) in (Annotated, NotRequired):
        return _outer(get_args(kind)[0])
    return dict if is_typeddict(kind) else get_origin(kind) or kind


def _fault_in_object(value: Any, kind: Any, where: str, optional: Set[str] = frozenset()) -> _Fault | None:
    if not isinstance(value, Mapping):
        return _unlike(value, dict, where)
    hints = _hints(kind)
    for key, hint in hints.items() if kind.__total__ else ():
        if key not in value and key not in optional and get_origin(hint) is not NotRequired:
            return where, f'lacks "{key}"'
    return _first(((key, value[key], hint) for key, hint in hints.items() if key in value), where)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _first(entries: Iterable[tuple[Any, Any, Any]], where: str) -> _Fault | None:
    """The first fault of (key, value, type) among the entries of a list or an object."""
    faults = (_fault(value, kind, f"{where}.{key}" if where else str(key)) for key, value, kind in entries)
    return next((fault for fault in faults if fault is not None), None)


def _unlike(value: Any, kind: Any, where: str) -> _Fault:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return where, f"is {_NAMES[type(value)]}, expected {' or '.join(_NAMES[_outer(one)] for one in kinds)}"
