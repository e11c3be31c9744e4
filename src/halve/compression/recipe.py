"""A recipe: the ordered steps, written as `NAME:key=value,...` or in YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halve.compression.methods import METHODS, Method
from halve.errors import RecipeError


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
            raise RecipeError(f"step {text!r}: {item!r} is not of the form key=value")
        if key.strip() in options:
            raise RecipeError(f"step {text!r}: option {key.strip()!r} is given twice")
        options[key.strip()] = value.strip()
    return make_step(name.strip(), options)


def make_step(name: str, options: dict[str, Any]) -> Method:
    """The method `name` with `options` (strings, or values as YAML gives them)."""
    if name not in METHODS:
        raise RecipeError(f"unknown step {name!r}: use one of {', '.join(METHODS)}")
    method = METHODS[name]
    hints = typing.get_type_hints(method)
    known = [f.name for f in dataclasses.fields(method)]
    values = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"step {name}: unknown option {key!r}: it takes {', '.join(known)}")
        values[key] = _convert(name, key, value, hints[key])
    return method(**values)


def _convert(step: str, key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        members = [t for t in typing.get_args(hint) if t is not type(None)]
        if value is None or value == "none":
            return None
        hint = members[0]
    fail = RecipeError(f"step {step}: {key}={value!r} is not {_HUMAN.get(hint, 'a list of patterns')}")
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
            return hint(value)
        except (TypeError, ValueError):
            raise fail from None
    if hint is str:
        return _unquoted(str(value))
    if isinstance(value, str):
        return tuple(_unquoted(part) for part in _split(value, "|") if part)
    if isinstance(value, list):
        return tuple(str(part) for part in value)
    raise fail


_HUMAN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _places(text: str) -> Iterator[tuple[str, str]]:
    """Each character with where it stands: a "quote" itself, "inside" of quotes or brackets, or "outside"."""
    quote, escaped, closing = "", False, []
    for character in text:
        place = "inside"
        if escaped:
            escaped = False
        elif quote:
            place = "quote" if character == quote else place
            quote = "" if character == quote else quote
        elif character == "\\":
            escaped = True
        elif closing and character == closing[-1]:
            closing.pop()
        elif closing[-1:] == ["]"]:
            pass  # a class of characters ends with ] alone
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif not closing:
            place = "outside"
            if character in "\"'":
                place, quote = "quote", character
        yield character, place
    if quote or closing:
        raise RecipeError(
            f"{text!r}: its {quote or closing[-1]} is missing: put a pattern that is to have none in quotes"
        )


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
        plain = "outside" not in {place for c, place in _places(pattern) if c in ",|"} and _unquoted(pattern) == pattern
    except RecipeError:
        plain = False
    if plain and pattern and pattern == pattern.strip() and not pattern.endswith("\\"):
        return pattern
    return '"' + pattern.replace('"', '"\'"\'"') + '"'


def option_text(value: Any) -> str:
    """The value of an option as one would write it."""
    return "|".join(map(_quoted, value)) if isinstance(value, tuple) else str(value).lower()


def read_recipe(path: Path) -> list[Method]:
    """Steps of a YAML file: a list (or a `steps:` list) of `NAME:key=value` strings or `NAME: {key: value}` mappings."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not readable ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from error
    steps = data.get("steps") if isinstance(data, dict) else data
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"recipe {path}: must be a list of steps, or a mapping with a `steps` list")
    return [_read_step(path, step) for step in steps]


def _read_step(path: Path, step: Any) -> Method:
    if isinstance(step, str):
        return parse_step(step)
    if isinstance(step, dict) and len(step) == 1:
        ((name, options),) = step.items()
        if options is None or isinstance(options, dict):
            return make_step(str(name), options or {})
    raise RecipeError(f"recipe {path}: {step!r} is not NAME:key=value text nor a NAME: {{key: value}} mapping")


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
