"""`quantization_config` of config.json <-> the scheme of each linear (compressed-tensors `pack-quantized`)."""

from __future__ import annotations

import re
from typing import Any

from halve.errors import UnsupportedModelError
from halve.quantization import QuantSpec

Json = dict[str, Any]


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _read_spec(group: Json, origin: str) -> QuantSpec:
    weights = group.get("weights") or {}
    if group.get("input_activations") or group.get("output_activations"):
        raise UnsupportedModelError(f"{origin}: quantized activations are not handled: only weight-only schemes are")
    strategy, kind = weights.get("strategy"), weights.get("type", "int")
    if kind != "int" or strategy not in ("group", "channel") or weights.get("dynamic"):
        raise UnsupportedModelError(
            f"{origin}: weight scheme type={kind!r} strategy={strategy!r} is not handled: use int with group or channel"
        )
    if weights.get("actorder") == "group":
        raise UnsupportedModelError(f"{origin}: actorder='group' (a g_idx per column) is not handled: use 'weight'")
    size = weights["group_size"] if strategy == "group" else -1
    return QuantSpec(weights["num_bits"], size, bool(weights.get("symmetric", True)))


def read_schemes(config: Json, names: list[str], origin: str) -> dict[str, QuantSpec]:
    """The scheme of every linear in `names` that a compressed-tensors config quantizes.

    Exact names and regular expressions win over the class name `Linear`; `ignore` wins over both.
    """
    if config.get("format") not in ("pack-quantized", None) or config.get("kv_cache_scheme"):
        raise UnsupportedModelError(
            f"{origin}: quantization format {config.get('format')!r} is not handled: only pack-quantized is"
        )
    groups = [(g.get("targets") or [], _read_spec(g, origin)) for g in (config.get("config_groups") or {}).values()]
    ignore = config.get("ignore") or []
    schemes: dict[str, QuantSpec] = {}
    for name in names:
        if any(_matches(target, name) or target == "Linear" for target in ignore):
            continue
        named = [spec for targets, spec in groups if any(_matches(t, name) for t in targets)]
        by_class = [spec for targets, spec in groups if "Linear" in targets]
        if named or by_class:
            schemes[name] = (named or by_class)[0]
    return schemes


def write_schemes(schemes: dict[str, QuantSpec], names: list[str]) -> Json:
    """The `quantization_config` of a model whose linears `names` have `schemes` (those absent stay dense).

    One scheme is written as the class target `Linear` with the dense ones ignored; several as exact names, the way
    that loads with exact logits in transformers and vLLM.
    """
    by_spec: dict[QuantSpec, list[str]] = {}
    for name in names:
        if name in schemes:
            by_spec.setdefault(schemes[name], []).append(name)
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
            "targets": ["Linear"] if len(by_spec) == 1 else members,
            "input_activations": None,
            "output_activations": None,
            "weights": weights,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in names if name not in schemes],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }
