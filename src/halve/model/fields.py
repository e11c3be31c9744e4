"""A config.json read field by field as transformers reads it: defaults, checks, and the refusal of what is not handled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from halve.errors import UnsupportedModelError, shown
from halve.model.decoder import ACTIVATIONS
from halve.model.rotary import RopeConfig

Json = dict[str, Any]

Kinds = dict[str, tuple[type | None, ...]]
# Fields that transformers checks in every config and that change nothing here: what their value may be.
CHECKED: Kinds = {
    "architectures": (list, None),
    "transformers_version": (str, None),
    "use_cache": (bool,),
    "bos_token_id": (int, None),
    "eos_token_id": (int, list, None),
    "output_hidden_states": (bool, None),
    "return_dict": (bool, None),
    "chunk_size_feed_forward": (int,),
    "is_encoder_decoder": (bool,),
    "id2label": (dict, None),
    "label2id": (dict, None),
    "problem_type": (str, None),
}
# Fields of no family that the code of transformers common to all reads and computes something else by, unless they have
# this value. Whatever neither this table nor a family names, transformers does not read: it changes nothing.
NOT_HANDLED: dict[str, Any] = {
    "is_causal": True,
    "per_layer_config": None,
    "kv_sharing_modes": None,
    "fusion_config": None,
    "transformers_weights": None,
    "_heterogeneity_spec": None,
    "_rope_type_labels": None,
}
LARGEST = 2**31 - 1
MAX_LAYERS = 10_000
_OWN = "correct it, or get the model's own config.json"
_WORDS = {bool: "true or false", int: "a whole number", float: "a decimal number", str: "text", None: "null"}
_WORDS |= {list: "a list", dict: "an object"}

# For each rotary type, its numbers: the least each may be, whether it has to be there.
_LEAST = 1e-6
_FACTOR = {"factor": (_LEAST, True)}
ROPE_NUMBERS: dict[str, dict[str, tuple[float, bool]]] = {
    "default": {},
    "linear": _FACTOR,
    "llama3": {**_FACTOR, "low_freq_factor": (_LEAST, True), "high_freq_factor": (_LEAST, True)},
    "yarn": {
        **_FACTOR,
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), (0.0, False)),
    },
    "longrope": {"factor": (_LEAST, False), "attention_factor": (0.0, False)},
}
_BY_LENGTH = ("llama3", "yarn", "longrope")  # those that compute with the length of text they were trained on
_SPREADS = ("short_factor", "long_factor")  # what longrope divides each frequency by


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether a JSON value is a number that float32 can hold, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e30 and value >= least  # neither true of NaN


def is_whole(value: Any, least: int, most: int = LARGEST) -> bool:
    """Whether a JSON value is an integer between two bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class Fields:
    """The fields of a config.json; each is checked as it is read."""

    def __init__(self, raw: Json, origin: str, defaults: Mapping[str, Any] | None = None) -> None:
        """`defaults`: of fields that the config leaves out, before those that a reader asks with."""
        self.raw, self.origin, self.defaults = raw, origin, defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        """A field as it stands in the config, or its default."""
        return self.raw.get(key, self.defaults.get(key, default))

    def fail(self, key: str, why: str, remedy: str = _OWN) -> UnsupportedModelError:
        if key not in self.raw:
            return UnsupportedModelError(f"{self.origin}: {key} is missing and {why}: {remedy}")
        return UnsupportedModelError(f"{self.origin}: {key}={shown(self.raw[key])} {why}: {remedy}")

    def integer(
        self, key: str, default: int | None = None, null: int | None = None, *, least: int = 1, most: int = LARGEST
    ) -> int:
        """A whole number; `default` where it is missing, `null` where it is null (None: it must not be)."""
        value = self.get(key, default)
        if value is None and key in self.raw:
            value = null
        if not is_whole(value, least, most):
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise self.fail(key, f"must be {kind}, at most {most}")
        assert value is not None
        return value

    def epsilon(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not is_number(value, 0.0):
            raise self.fail(key, "must be a decimal number, not negative, at most 1e30", "write a number like 1e-6")
        return value

    def cap(self, key: str) -> float | None:
        """A decimal number above 0; null means none."""
        value = self.get(key)
        if value is not None and not (isinstance(value, float) and is_number(value, _LEAST)):
            raise self.fail(key, f"must be a decimal number of at least {_LEAST}, or null", "write a number like 30.0")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not is_number(value, _LEAST):
            raise self.fail(key, f"must be a number of at least {_LEAST}, at most 1e30")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise self.fail(key, "is not an activation this decoder computes", f"use a model with one of {known}")
        return value

    def window(self, default: int = 4096) -> int | None:
        """`sliding_window`: null means none, missing the default of the classes that have it."""
        return None if self.get("sliding_window", default) is None else self.integer("sliding_window", default)

    def layer_kinds(self, layers: int) -> list[str] | None:
        """`layer_types`: full_attention or sliding_attention for each layer."""
        kinds = self.raw.get("layer_types")
        if kinds is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise self.fail("layer_types", f"must name full_attention or sliding_attention for each of {layers} layers")
        return kinds

    def check_kinds(self, table: Kinds) -> None:
        """Refuse a value of a kind that its field does not take, of fields that nothing else is read of."""
        for key, kinds in table.items():
            if key in self.raw and not any(_is_a(self.raw[key], kind) for kind in kinds):
                wanted = " or ".join(_WORDS[kind] for kind in kinds)
                raise self.fail(key, f"must be {wanted}", "correct it, or delete it from config.json")

    def refuse_unhandled(self, vocab_size: int, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse what makes transformers compute something else, or refuse the config it would be shipped with.

        `neutral`: fields of the family, and the values with which they change nothing.
        """
        unhandled = {key: (value,) for key, value in NOT_HANDLED.items()} | dict(neutral)
        for key, allowed in unhandled.items():
            if key in self.raw and not any(self.raw[key] is value for value in allowed):
                raise self.fail(
                    key,
                    "changes what transformers computes and is not handled by this decoder",
                    "delete it from config.json if the model was trained without it",
                )
        self.check_kinds(CHECKED)
        if self.raw.get("pad_token_id") is not None:
            self.integer("pad_token_id", least=-vocab_size, most=vocab_size - 1)
        for key in ("dtype", "torch_dtype"):
            name = self.raw.get(key)
            if name is not None and not (isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)):
                raise self.fail(key, "is not a type of numbers", "write float32, bfloat16 or float16")


def _is_a(value: Any, kind: type | None) -> bool:
    if kind is None or value is None:
        return kind is value
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_rope(f: Fields, max_positions: int, partial: bool = False) -> RopeConfig:
    """Rotary parameters; `partial`: the architecture can turn a part of a head.

    As in transformers `rope_scaling`, where it holds anything, is taken whole and `rope_parameters` not at all; what the one
    taken does not say of `rope_theta` the config's own field does.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(f.raw.get(key), dict | None):
            raise f.fail(key, "must be an object or null")
    where = _rope_field(f)
    # transformers lets a field of the config itself win over that among the parameters
    key = "original_max_position_embeddings"
    own = {key: f.raw[key]} if key in f.raw else {}
    given = {**_given(f, where), **own}
    return _read_rope(f, where, given, ("rope_theta", 10000.0), max_positions, partial)


def _given(f: Fields, where: str) -> Json:
    """The parameters in a field, those that the family has where it is null or missing."""
    given = f.raw.get(where)
    return (f.defaults.get(where) or {}) if given is None else given


def read_growth(f: Fields, max_positions: int) -> tuple[float, float]:
    """How the queries of Ministral 3 grow with their position: `llama_4_scaling_beta`, and the length of a step."""
    where = _rope_field(f)
    given, name = _given(f, where), "original_max_position_embeddings"
    kind = given.get("rope_type", given.get("type", "default"))
    length = given.get(name, max_positions if kind in _BY_LENGTH else None)
    if kind in _BY_LENGTH and name in f.raw:
        length = f.raw[name]
    beta = given.get("llama_4_scaling_beta")
    for value, key, least in ((beta, "llama_4_scaling_beta", 0.0), (length, name, _LEAST)):
        if not is_number(value, least):
            raise f.fail(where, f"must give {key} as a number of at least {least}")
    assert beta is not None and length is not None
    return float(beta), float(length)


def read_ropes_of_kinds(
    f: Fields, max_positions: int, bases: tuple[tuple[str, float], tuple[str, float]]
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary parameters of layers with full attention and of those with a window.

    As in transformers `rope_parameters` holds an object for each kind, and the older `rope_scaling` is put over that of
    full attention; `bases`: fields that say `rope_theta` where those do not, and their defaults.
    """
    kinds = ("full_attention", "sliding_attention")
    given, scaling = f.raw.get("rope_parameters"), f.raw.get("rope_scaling")
    if not isinstance(scaling, dict | None):
        raise f.fail("rope_scaling", "must be an object or null")
    if given is None:
        given = {kind: {"rope_type": "default"} for kind in kinds}
    if (
        not isinstance(given, dict)
        or not set(given) <= set(kinds)
        or not all(isinstance(part, dict | None) for part in given.values())
    ):
        raise f.fail("rope_parameters", f"must hold an object for each of {' and '.join(kinds)}, or be null")
    if scaling is not None and given.get("full_attention") is None:
        raise f.fail("rope_parameters", "says nothing of full_attention, which rope_scaling changes")
    full, sliding = (given.get(kind) or {} for kind in kinds)
    where = "rope_parameters"
    if "longrope" in (part.get("rope_type", part.get("type")) for part in (full, sliding, scaling or {})):
        raise f.fail("rope_scaling" if scaling else where, "has longrope for some layers", "use another model")
    return (
        _read_rope(f, "rope_scaling" if scaling else where, {**full, **(scaling or {})}, bases[0], max_positions),
        _read_rope(f, where, sliding, bases[1], max_positions),
    )


def _read_rope(
    f: Fields, where: str, given: Mapping[str, Any], base: tuple[str, float], max_positions: int, partial: bool = False
) -> RopeConfig:
    """The parameters `given` in the field `where`; `base`: the field that says theta where they do not, its default."""
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS or any(isinstance(v, dict) for v in given.values()):
        known = ", ".join(ROPE_NUMBERS)
        raise f.fail(
            where, f"has rotary type {shown(kind)}, one for all layers is computed, of {known}", "use another model"
        )
    own = f.get(*base)
    theta = given.get("rope_theta", own)
    for value, key in ((theta, where if "rope_theta" in given else base[0]), (theta if own is None else own, base[0])):
        if not is_number(value) or value <= 1:
            raise f.fail(key, "must give rope_theta as a number greater than 1, at most 1e30")
    shares = []
    for key, part in ((where, given), ("partial_rotary_factor", f.raw)):
        share = part.get("partial_rotary_factor")
        if share is None:
            continue
        if not is_number(share, _LEAST) or share > 1:
            raise f.fail(key, "must give partial_rotary_factor as a number above 0, at most 1")
        if share != 1 and not partial:
            raise f.fail(key, "rotates part of a head, which is not handled for this type", "use another model")
        shares.append(float(share))
    options = _rope_options(f, where, kind, given, max_positions)
    shares.append(f.defaults.get("partial_rotary_factor", 1.0))
    return RopeConfig(float(theta), kind, options, shares[0])


def check_rope_sizes(f: Fields, ropes: tuple[RopeConfig, ...], head_dim: int) -> None:
    """Refuse rotary embeddings that do not fit the size of a head."""
    for rope in ropes:
        turned = rope.turned(head_dim)
        if turned < 2 or turned % 2:
            raise f.fail(
                "partial_rotary_factor" if "partial_rotary_factor" in f.raw else _rope_field(f),
                f"turns {turned} of {head_dim} channels, which is no number of pairs",
            )
        for name in _SPREADS if rope.kind == "longrope" else ():
            if len(rope.options[name]) != turned // 2:
                raise f.fail(
                    _rope_field(f), f"must give {turned // 2} numbers in {name}, one for two channels of a head"
                )


def _rope_field(f: Fields) -> str:
    return "rope_scaling" if f.raw.get("rope_scaling") else "rope_parameters"


def _rope_options(f: Fields, where: str, kind: str, given: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The numbers that a rotary type computes with, all that it reads and no other."""
    options: dict[str, Any] = {}
    for name, (least, needed) in ROPE_NUMBERS[kind].items():
        value = given.get(name)
        if value is None and not needed:
            continue
        if value is None:
            raise f.fail(where, f"lacks the number {name!r} that rotary type {kind!r} needs")
        if not is_number(value, least):
            raise f.fail(where, f"has {name}={shown(value)}, which must be a number of at least {least}, at most 1e30")
        options[name] = float(value)
    if kind not in _BY_LENGTH:
        return options
    name = "original_max_position_embeddings"
    original = given.get(name, max_positions)
    if not is_number(original, _LEAST) or (kind == "longrope" and original <= 1):
        least = "1, whose logarithm is divided by" if kind == "longrope" else "0"
        raise f.fail(name if name in f.raw else where, f"must give {name} as a number above {least}")
    options[name] = float(original)
    for name in _SPREADS if kind == "longrope" else ():
        spread = given.get(name)
        if not isinstance(spread, list) or not all(is_number(value, _LEAST) for value in spread):
            raise f.fail(
                where, f"must list in {name} what the frequencies are divided by, numbers of at least {_LEAST}"
            )
        options[name] = tuple(map(float, spread))
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise f.fail(where, "must have a high_freq_factor greater than low_freq_factor")
    if kind == "yarn" and "truncate" in given:
        if not isinstance(given["truncate"], bool | None):
            raise f.fail(where, f"has truncate={shown(given['truncate'])}, which must be true or false")
        options["truncate"] = bool(given["truncate"])
    return options
