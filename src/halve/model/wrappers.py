"""Models that hold one of a family here, or are one under another name: the config of that, and which tensors are its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from halve.model.fields import Fields, Json

_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


@dataclass(frozen=True)
class Wrapper:
    """A `model_type` whose `text_config` is that of another.

    text: the type of that; architecture: what transformers calls a model of it; others: prefixes of the tensors of other
    parts; left_out: fields of the text part that the wrapper does not read, and what it computes by instead.
    """

    text: str
    architecture: str
    left_out: Json
    tied: bool = True  # where the config does not say
    others: tuple[str, ...] = tuple(
        f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
    )


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text", "Gemma3ForCausalLM", left_out={"final_logit_softcapping": None}),
}


@dataclass(frozen=True)
class Alias:
    """A `model_type` that computes what another does, its siblings' weights in one tensor (see `naming.split_merged`).

    other, architecture: as of a Wrapper the text; defaults: where those of the fields differ; left_out: fields that it does
    not read and the other does; longropes: its names for rotary type longrope.
    """

    other: str
    architecture: str
    defaults: Json
    left_out: tuple[str, ...]
    longropes: tuple[str, ...] = ()


ALIASES: dict[str, Alias] = {
    "phi3": Alias(
        "mistral",
        "MistralForCausalLM",
        {
            **{"rms_norm_eps": 1e-5, "sliding_window": None, "num_key_value_heads": None},
            **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 4096),
        },
        left_out=("layer_types", "auto_map"),  # the code it names is the model that transformers has by now
        longropes=("longrope", "su", "yarn"),
    )
}


def own_config(raw: Json, origin: str) -> Json:
    """The config of the family that a model is one of: of its text part, or under that family's name; most as they are.

    Raises UnsupportedModelError where there is no such config to read.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        return raw
    if kind in WRAPPERS:
        return _text_config(raw, WRAPPERS[kind], origin)
    return _renamed_config(raw, ALIASES[kind], origin) if kind in ALIASES else raw


def _renamed_config(raw: Json, alias: Alias, origin: str) -> Json:
    fields = Fields(raw, origin)
    config = {key: value for key, value in (alias.defaults | raw).items() if key not in alias.left_out}
    shares = [raw.get("partial_rotary_factor")]
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if not isinstance(rope, dict) or not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", *alias.longropes):
            raise fields.fail(key, f"must name one of default, {', '.join(alias.longropes)}", "use another model")
        config[key] = {k: v for k, v in rope.items() if k != "type"} | {
            "rope_type": "default" if kind == "default" else "longrope"
        }
        shares.append(rope.get("partial_rotary_factor"))
    if config["num_key_value_heads"] is None and "num_attention_heads" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if any(share not in (None, 1) for share in shares):
        return config  # none that transformers has under another name turns a part of a head
    return config | {"model_type": alias.other, "architectures": [alias.architecture]}


def _text_config(raw: Json, wrapper: Wrapper, origin: str) -> Json:
    fields, text = Fields(raw, origin), raw.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", wrapper.text) != wrapper.text:
        raise fields.fail("text_config", f"must be the config of a {wrapper.text}", "get the model's own config.json")
    if raw.get("quantization_config"):
        raise fields.fail(
            "quantization_config",
            "of a model with a vision tower is not handled",
            "quantize the original model with halve, which takes its text part",
        )
    shared = {key: raw[key] for key in _SHARED if key in raw}
    tied = raw.get("tie_word_embeddings", wrapper.tied)
    own = {"model_type": wrapper.text, "architectures": [wrapper.architecture], "tie_word_embeddings": tied}
    return shared | text | own | wrapper.left_out


def own_tensors(raw: Json, names: Iterable[str]) -> list[str]:
    """Those of `names` that belong to the model of `own_config`; `raw`: the config that came with them."""
    wrapper = WRAPPERS.get(raw.get("model_type", ""))
    return [name for name in names if wrapper is None or not name.startswith(wrapper.others)]
