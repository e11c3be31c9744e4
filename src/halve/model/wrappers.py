"""Models that hold one of a family here, or are one under another name: the config of that, and which tensors are its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from halve.model.fields import Fields, Json

_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
_PICTURES = {"mrope_section", "mrope_interleaved"}


@dataclass(frozen=True)
class TextPart:
    """The text part of a model: the family it is one of, and what transformers calls a model of that.

    defaults: where those of the fields differ; left_out: fields that the wrapper does not read, and what it computes by
    instead; unread: those that it does not read and the family does.
    """

    family: str
    architecture: str
    defaults: Json = field(default_factory=dict)
    left_out: Json = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def _prefixes(*parts: str) -> tuple[str, ...]:
    return tuple(model + part for model in ("", "model.") for part in parts)


@dataclass(frozen=True)
class Wrapper:
    """A `model_type` that holds another in its `text_config`.

    texts: by the type that is named there, the first where none is; others: prefixes of the tensors of other parts; tied:
    where the config does not say; text_ties: the text part may say it too; flat: in older configs the fields of the text
    part, those of these names, are the config's own.
    """

    texts: dict[str, TextPart]
    tied: bool = False
    text_ties: bool = False
    others: tuple[str, ...] = _prefixes("vision_tower.", "multi_modal_projector.", "image_newline")
    flat: tuple[str, ...] = ()


_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_TEXTS = {
    "llama": TextPart("llama", "LlamaForCausalLM", _SIZES | {"intermediate_size": 11008}),
    "mistral": TextPart("mistral", "MistralForCausalLM", _SIZES | {"intermediate_size": 14336}),
    "ministral3": TextPart("ministral3", "Ministral3ForCausalLM"),
    "qwen2": TextPart("qwen2", "Qwen2ForCausalLM"),
    "qwen3": TextPart("qwen3", "Qwen3ForCausalLM"),
}
_QWEN2_VL = TextPart(
    "qwen2",
    "Qwen2ForCausalLM",
    {
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80, "num_key_value_heads": 8},
        **{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568},
        **{"num_hidden_layers": 80, "num_attention_heads": 64},
    },
)
_QWEN3_VL = TextPart(
    "qwen3",
    "Qwen3ForCausalLM",
    {
        **{"rope_theta": 5e5, "max_position_embeddings": 128000, "vocab_size": 151936, "hidden_size": 4096},
        **{"intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
    unread=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
_FLAT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "attention_dropout"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
)
_VISUAL = _prefixes("visual.")
_IDEFICS = _prefixes("vision_model.", "connector.")


def _as(kind: str, **texts: TextPart) -> dict[str, TextPart]:
    """`texts`, that called `kind` first."""
    return {kind: texts[kind]} | texts


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        {"gemma3_text": TextPart("gemma3_text", "Gemma3ForCausalLM", left_out={"final_logit_softcapping": None})},
        tied=True,
    ),
    "qwen2_vl": Wrapper({"qwen2_vl_text": _QWEN2_VL}, text_ties=True, others=_VISUAL, flat=_FLAT),
    "qwen2_5_vl": Wrapper({"qwen2_5_vl_text": _QWEN2_VL}, text_ties=True, others=_VISUAL, flat=_FLAT),
    "qwen3_vl": Wrapper({"qwen3_vl_text": _QWEN3_VL}, others=_VISUAL),
    "mistral3": Wrapper(_as("mistral", **_TEXTS), tied=True),
    "internvl": Wrapper(_as("qwen2", **_TEXTS), tied=True),
    "llava": Wrapper(_as("llama", **_TEXTS), text_ties=True),
    "llava_next": Wrapper(_as("llama", **_TEXTS)),
    "llava_onevision": Wrapper(_as("qwen2", **_TEXTS), text_ties=True),
    "idefics3": Wrapper(_as("llama", **_TEXTS), others=_IDEFICS),
    "smolvlm": Wrapper(_as("llama", **_TEXTS), others=_IDEFICS),
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
    fields.integer("original_max_position_embeddings", 4096)
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
    if text is None and wrapper.flat:
        text = {key: raw[key] for key in wrapper.flat if key in raw}
    kind = text.get("model_type", next(iter(wrapper.texts))) if isinstance(text, dict) else None
    if not isinstance(text, dict) or not isinstance(kind, str) or kind not in wrapper.texts:
        known = " or ".join(wrapper.texts)
        raise fields.fail("text_config", f"must be the config of a {known}", "get the model's own config.json")
    if raw.get("quantization_config"):
        raise fields.fail(
            "quantization_config",
            "of a model with a vision tower is not handled",
            "quantize the original model with halve, which takes its text part",
        )
    part = wrapper.texts[kind]
    shared = {key: raw[key] for key in _SHARED if key in raw}
    tied = raw.get("tie_word_embeddings", wrapper.tied) or (
        wrapper.text_ties and text.get("tie_word_embeddings", False)
    )
    own = {"model_type": part.family, "architectures": [part.architecture], "tie_word_embeddings": tied}
    text = {key: value for key, value in text.items() if key not in part.unread}
    return part.defaults | shared | _plain_ropes(text) | own | part.left_out


def _plain_ropes(text: Json) -> Json:
    """The config with rotary parameters of text alone: what a token's place in a picture would choose between is one."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if not isinstance(rope, dict):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "mrope" or _PICTURES & set(rope):
            rest = {name: value for name, value in rope.items() if name not in _PICTURES | {"type"}}
            text = text | {key: rest | {"rope_type": "default" if kind == "mrope" else kind}}
    return text


def own_tensors(raw: Json, names: Iterable[str]) -> list[str]:
    """Those of `names` that belong to the model of `own_config`; `raw`: the config that came with them."""
    wrapper = WRAPPERS.get(raw.get("model_type", ""))
    return [name for name in names if wrapper is None or not name.startswith(wrapper.others)]
