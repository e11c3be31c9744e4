"""`quantization_config` of config.json <-> the scheme of each linear (compressed-tensors `pack-quantized`)."""

from __future__ import annotations

import re
from typing import Any

from halve.errors import RecipeError, UnsupportedModelError, shown
from halve.quantization import QuantSpec

Json = dict[str, Any]
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_PATTERNS = 1000, 4, 1000


def _patterns(config: Json, key: str, names: list[str], origin: str) -> set[str]:
    """Those of `names` that a list of exact names and regular expressions (`re:...`) names, and its class names."""
    targets = config.get(key) or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _malformed(origin, key, targets, "a list of names")
    patterns = [_compile(target[3:], origin, key) for target in targets if target.startswith("re:")]
    if len(patterns) > _MOST_PATTERNS:
        raise _malformed(origin, key, targets, f"at most {_MOST_PATTERNS} regular expressions")
    exact = set(targets) & {*names, "Linear", "Embedding"}
    return exact | {name for name in names if any(pattern.match(name) for pattern in patterns)}


def _compile(pattern: str, origin: str, key: str) -> re.Pattern[str]:
    """A regular expression that takes no more than moments on a name."""
    # a group that repeats, or many things that do, may take longer than anybody waits
    repeats = len(re.findall(r"[*+]|\{\d*,", pattern))
    if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        raise _malformed(origin, key, pattern, "a list of names or of patterns without groups that repeat")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _malformed(origin, key, pattern, f"regular expressions ({error})") from error


def _malformed(origin: str, key: str, value: Any, wanted: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{origin}: quantization_config: {key}={shown(value)} is not handled, it must be {wanted}: get the model's own "
        "config.json, or quantize the original model with halve"
    )


def _object(parent: Json, key: str, origin: str) -> Json:
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise _malformed(origin, key, value, "an object")
    return value


def _read_spec(group: Json, origin: str) -> QuantSpec:
    weights = _object(group, "weights", origin)
    if group.get("input_activations") or group.get("output_activations"):
        raise UnsupportedModelError(f"{origin}: quantized activations are not handled: only weight-only schemes are")
    strategy, kind = weights.get("strategy"), weights.get("type", "int")
    if kind != "int" or strategy not in ("group", "channel") or weights.get("dynamic"):
        raise UnsupportedModelError(
            f"{origin}: weight scheme type={shown(kind)} strategy={shown(strategy)} is not handled: use int with group "
            "or channel"
        )
    if weights.get("actorder") == "group":
        raise UnsupportedModelError(f"{origin}: actorder='group' (a g_idx per column) is not handled: use 'weight'")
    size = weights.get("group_size") if strategy == "group" else -1
    return checked_spec(weights.get("num_bits"), size, weights.get("symmetric", True), origin)


def checked_spec(bits: Any, group_size: Any, symmetric: Any, origin: str) -> QuantSpec:
    """The scheme that three values of a config stand for; UnsupportedModelError where they stand for none."""
    for key, value, kind in (("bits", bits, int), ("group_size", group_size, int), ("symmetric", symmetric, bool)):
        if type(value) is not kind:
            raise _malformed(origin, key, value, "a whole number" if kind is int else "true or false")
    try:
        return QuantSpec(bits, group_size, symmetric)
    except RecipeError as error:
        raise UnsupportedModelError(f"{origin}: quantization_config: {error}") from error


def read_schemes(config: Json, names: list[str], origin: str, table: str | None = None) -> dict[str, QuantSpec]:
    """The scheme of every linear in `names`, and of the embedding `table`, that a compressed-tensors config quantizes.

    Exact names and regular expressions win over the class names `Linear` and `Embedding`; `ignore` wins over both.
    """
    kinds = dict.fromkeys(names, "Linear") | ({} if table is None else {table: "Embedding"})
    names = list(kinds)
    if config.get("format") not in ("pack-quantized", None) or config.get("kv_cache_scheme"):
        raise UnsupportedModelError(
            f"{origin}: quantization format {shown(config.get('format'))} is not handled: only pack-quantized is"
        )
    named = _object(config, "config_groups", origin)
    groups = [_object(named, key, origin) for key in named]
    read = [(_patterns(group, "targets", names, origin), _read_spec(group, origin)) for group in groups]
    ignored = _patterns(config, "ignore", names, origin)
    schemes: dict[str, QuantSpec] = {}
    for name, kind in kinds.items():
        found = [spec for wanted in (name, kind) for targets, spec in read if wanted in targets]
        if found and not {name, kind} & ignored:
            schemes[name] = found[0]
    return schemes


def write_schemes(schemes: dict[str, QuantSpec], names: list[str], table: str | None = None) -> Json:
    """The `quantization_config` of a model whose linears `names` and embedding `table` have `schemes` (those absent stay
    dense).

    One scheme is written as the class target `Linear` with the dense ones ignored; several as exact names, the way
    that loads with exact logits in transformers and vLLM. The embedding is always named: a class may be other tables' too.
    """
    by_spec: dict[QuantSpec, list[str]] = {}
    for name in (*names, *([] if table is None else [table])):
        if name in schemes:
            by_spec.setdefault(schemes[name], []).append(name)
    if len(by_spec) == 1:
        (spec,) = by_spec
        linears = ["Linear"] if any(name in schemes for name in names) else []
        by_spec[spec] = linears + ([table] if table in schemes else [])
    groups: Json = {}
    for position, (spec, members) in enumerate(by_spec.items()):
        weights = {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if spec.group_size == -1 else "group",
            "group_size": None if spec.group_size == -1 else spec.group_size,
            "actorder": None,
            "dynamic": False,
        }
        groups[f"group_{position}"] = {
            "targets": members,
            "input_activations": None,
            "output_activations": None,
            "weights": weights,
        }
    # transformers 5.23 has no packed embeddings, but one scheme it expands while it loads, of an embedding too
    expanded = {"dequantize": True} if table in schemes and len(by_spec) == 1 else {}
    return {
        "quant_method": "compressed-tensors",
        **expanded,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in names if name not in schemes],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }
