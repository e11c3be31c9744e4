"""A config.json read field by field: defaults, checks, and the refusal of whatever nobody read."""

from __future__ import annotations

from typing import Any

from halve.errors import UnsupportedModelError
from halve.model.decoder import ACTIVATIONS
from halve.model.rotary import RopeConfig

Json = dict[str, Any]

# Fields of a config.json that do not change what the decoder computes.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range init_std
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id prefix
    attention_dropout dropout activation_dropout layerdrop hidden_dropout resid_pdrop
    pretraining_tp output_attentions output_hidden_states return_dict torchscript gradient_checkpointing
    quantization_config is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward id2label label2id
    problem_type finetuning_task task_specific_params tokenizer_class cross_attention_hidden_size forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens min_length max_length do_sample temperature top_k top_p
    num_beams num_beam_groups repetition_penalty length_penalty early_stopping no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values exponential_decay_length_penalty diversity_penalty typical_p tie_encoder_decoder
    pruned_heads use_bfloat16 tf_legacy_loss is_llama_config rope_interleaved transformers.js_config
    halve_model_type halve_layers model_name name unsloth_version unsloth_fixed""".split()
)

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ROPE_NEEDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


class Fields:
    """A config.json that remembers which fields were read, so that the rest can be refused rather than ignored."""

    def __init__(self, raw: Json, origin: str) -> None:
        self.raw, self.origin = raw, origin
        self.read: set[str] = set()

    def fail(self, key: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.origin}: {key}={self.raw.get(key)!r} {why}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.optional(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def optional(self, key: str, default: Any = None) -> Any:
        """The value; `default` where the field is missing or null."""
        self.read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def activation(self, key: str, default: str) -> str:
        value = self.optional(key, default)
        if value not in ACTIVATIONS:
            raise self.fail(key, f"is not an activation this decoder computes ({', '.join(ACTIVATIONS)})")
        return value

    def refuse_unread(self) -> None:
        """Any other field may change the maths: refused unless it is harmless or switched off."""
        for key, value in self.raw.items():
            if key in self.read or key in HARMLESS or key.startswith("_") or value is None or value is False:
                continue
            raise self.fail(
                key, "is not a field this decoder handles: delete it from config.json if it does not change the maths"
            )


def read_rope(f: Fields) -> RopeConfig:
    """Rotary parameters, in the older (`rope_theta`, `rope_scaling`) and the newer (`rope_parameters`) spelling."""
    theta = f.number("rope_theta", 10000.0)
    f.read |= {"rope_parameters", "rope_scaling"}
    options = dict(f.raw.get("rope_parameters") or f.raw.get("rope_scaling") or {})
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    where = "rope_parameters" if f.raw.get("rope_parameters") else "rope_scaling"
    theta = float(options.pop("rope_theta", None) or theta)
    if kind not in ROPE_KINDS:
        raise f.fail(where, f"has rotary type {kind!r}: this decoder computes {', '.join(ROPE_KINDS)}")
    partial = options.pop("partial_rotary_factor", None)
    if partial not in (None, 1, 1.0) or f.optional("partial_rotary_factor", 1.0) != 1.0:
        raise f.fail("partial_rotary_factor" if partial is None else where, "rotates part of a head: not handled")
    missing = [k for k in ROPE_NEEDS.get(kind, ()) if not isinstance(options.get(k), int | float)]
    if missing:
        raise f.fail(where, f"lacks the number {missing[0]!r} that rotary type {kind!r} needs")
    if kind == "default":
        options = {}
    return RopeConfig(theta, kind, options)
