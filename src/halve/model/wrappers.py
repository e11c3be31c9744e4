"""The text part of a model that has more parts: its config, and which tensors are its own."""

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


def text_config(raw: Json, origin: str) -> Json:
    """The config of the text part alone, of a model that has others; any other config as it is.

    Raises UnsupportedModelError where there is no text part to read.
    """
    kind = raw.get("model_type")
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    if wrapper is None:
        return raw
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


def text_tensors(raw: Json, names: Iterable[str]) -> list[str]:
    """Those of `names` that belong to the text part; `raw`: the config that came with them."""
    wrapper = WRAPPERS.get(raw.get("model_type", ""))
    return [name for name in names if wrapper is None or not name.startswith(wrapper.others)]
