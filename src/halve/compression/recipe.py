"""A recipe: the ordered steps, written as `NAME:key=value,...` or in YAML."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halve.compression.methods import METHODS, Method
from halve.errors import RecipeError, reading, refuse_pipe, shown

_LARGEST_RECIPE, _DEEPEST_RECIPE = 1 << 18, 20


def parse_step(text: str) -> Method:
    """`rtn:bits=4,group_size=32` -> the method. Several patterns in one option are separated by `|`.

    What stands in quotes, or in brackets of a pattern (`re:.*\\.(1|2)\\..*`), is not divided. Raises RecipeError for an unknown
    step, an unknown option or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in _split(rest, ",") if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"step {shown(text)}: {shown(item)} is not of the form key=value")
        if key.strip() in options:
            raise RecipeError(f"step {shown(text)}: option {shown(key.strip())} is given twice")
        options[key.strip()] = value.strip()
    return make_step(name.strip(), options)


def make_step(name: str, options: dict[str, Any]) -> Method:
    """The method `name` with `options` (strings, or values as YAML gives them)."""
    if name not in METHODS:
        raise RecipeError(f"unknown step {shown(name)}: use one of {', '.join(METHODS)}")
    method = METHODS[name]
    hints = typing.get_type_hints(method)
    known = [f.name for f in dataclasses.fields(method)]
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"step {name}: unknown option {shown(key)}: it takes {', '.join(known)}")
        values[key] = _convert(name, key, value, hints[key])
    return method(**values)


def _convert(step: str, key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        members = [t for t in typing.get_args(hint) if t is not type(None)]
        if value is None or value == "none":
            return None
        hint = members[0]
    fail = RecipeError(f"step {step}: {key}={shown(value)} is not {_HUMAN.get(hint, 'a list of patterns')}")
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise fail
        return words[str(value).lower()]
    if hint in (int, float):
        try:
            if isinstance(value, bool) or (hint is int and isinstance(value, float)):
                raise ValueError
            number = hint(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        except (TypeError, ValueError, OverflowError):
            raise fail from None
    parts = value if hint is not str and isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) for part in parts):
        raise fail
    if hint is str:
        return _unquoted(str(value))
    if isinstance(value, str):
        return tuple(_unquoted(part) for part in _split(value, "|") if part)
    if isinstance(value, list):
        return tuple(str(part) for part in value)
    raise fail


_HUMAN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _scan(text: str, plain: set[int]) -> tuple[list[str], int | None]:
    """Where each character stands: a "quote" itself, "inside" of quotes or brackets, or "outside"; and which bracket is not
    closed. Those at `plain` are no brackets."""
    places, quote, escaped, brackets = [], "", False, []
    for index, character in enumerate(text):
        place = "inside" if brackets or quote or escaped else "outside"
        if escaped:
            escaped = False
        elif quote:
            if character == quote:
                place, quote = "quote", ""
        elif character == "\\":
            escaped = True
        elif brackets and character == brackets[-1][0]:
            brackets.pop()
        elif brackets and brackets[-1][0] == "]":
            pass  # a class of characters ends with ] alone
        elif character in _CLOSING and index not in plain:
            brackets.append((_CLOSING[character], index))
        elif character in "\"'" and not brackets:
            place, quote = "quote", character
        places.append(place)
    if quote:
        raise RecipeError(
            f"{shown(text)}: its {quote} is not closed: close it, or put a pattern that holds one in the other quotes"
        )
    return places, brackets[0][1] if brackets else None


def _places(text: str) -> list[tuple[str, str]]:
    """Each character with where it stands; a bracket that is not closed is a character like others."""
    plain: set[int] = set()
    while True:
        places, unclosed = _scan(text, plain)
        if unclosed is None:
            return list(zip(text, places, strict=True))
        plain.add(unclosed)


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators outside of quotes and brackets, quotes and all."""
    parts = [""]
    for character, place in _places(text):
        if character == separator and place == "outside":
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _unquoted(text: str) -> str:
    return "".join(character for character, place in _places(text) if place != "quote")


def _quoted(pattern: str) -> str:
    """A pattern so that it is read as it is."""
    try:
        places, unclosed = _scan(pattern, set())
    except RecipeError:
        places, unclosed = ["quote"], None
    divided = any(c in ",|" and place == "outside" for c, place in zip(pattern, places, strict=False))
    odd = "quote" in places or unclosed is not None or pattern.endswith("\\") or pattern != pattern.strip()
    if pattern and not divided and not odd:
        return pattern
    return '"' + pattern.replace('"', '"\'"\'"') + '"'


def option_text(value: Any) -> str:
    """The value of an option as one would write it."""
    return "|".join(map(_quoted, value)) if isinstance(value, tuple) else str(value).lower()


def read_recipe(path: Path) -> list[Method]:
    """Steps of a YAML file: a list (or a `steps:` list) of `NAME:key=value` strings or `NAME: {key: value}` mappings."""
    data = _parse_yaml(path)
    steps = data.get("steps") if isinstance(data, dict) else data
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"recipe {path}: must be a list of steps, or a mapping with a `steps` list")
    return [_read_step(path, step) for step in steps]


def _parse_yaml(path: Path) -> Any:
    """What a small YAML file holds. Its anchors are not followed: a few lines of them can stand for more than any memory."""
    import yaml

    with reading(f"recipe {path}", RecipeError):
        refuse_pipe(path, RecipeError)
    with reading(f"recipe {path}", RecipeError), path.open("rb") as file:
        content = file.read(_LARGEST_RECIPE + 1)
    if len(content) > _LARGEST_RECIPE:
        raise RecipeError(f"recipe {path}: longer than {_LARGEST_RECIPE:,} bytes: name a file of steps")
    try:
        text = content.decode("utf-8")
        level = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(f"recipe {path}: uses an alias (*{event.anchor}): write out what it stands for")
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > _DEEPEST_RECIPE:
                raise RecipeError(f"recipe {path}: nested deeper than {_DEEPEST_RECIPE} levels: name a file of steps")
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 text ({error}): convert the file to UTF-8") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not YAML ({' '.join(str(error).split())}): correct it") from error
    except RecipeError:
        raise
    except ValueError as error:  # a date or a number that there is not
        raise RecipeError(f"recipe {path}: not YAML ({error}): correct it") from error


def _read_step(path: Path, step: Any) -> Method:
    if isinstance(step, str):
        return parse_step(step)
    if isinstance(step, dict) and len(step) == 1:
        ((name, options),) = step.items()
        if options is None or isinstance(options, dict):
            return make_step(str(name), options or {})
    raise RecipeError(f"recipe {path}: {shown(step)} is not NAME:key=value text nor a NAME: {{key: value}} mapping")


def step_json(method: Method) -> dict[str, Any]:
    """A step with all its options, for manifests and records."""
    assert dataclasses.is_dataclass(method) and not isinstance(method, type)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(method).items()}
    return {"step": method.name, **options}


def step_text(method: Method, **instead: str) -> str:
    """A step as one would write it: the options that are not the defaults; `instead` stands for the values of some."""
    assert dataclasses.is_dataclass(method) and not isinstance(method, type)
    parts = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in instead:
            parts.append(f"{field.name}={instead[field.name]}")
        elif value != field.default:
            parts.append(f"{field.name}={option_text(value)}")
    return method.name + (":" if parts else "") + ",".join(parts)


def as_steps(steps: Sequence[str | Method]) -> list[Method]:
    """Methods, those given as text parsed."""
    parsed = [parse_step(s) if isinstance(s, str) else s for s in steps]
    if not parsed:
        raise RecipeError("no step given: name at least one with --step NAME:key=value,... or --recipe FILE.yaml")
    return parsed
