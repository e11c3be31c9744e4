"""Model types that are known and not served: what they compute that this decoder does not."""

from __future__ import annotations

REFUSED: dict[str, tuple[str, ...]] = {
    "a mixture of experts: which weights a token meets depends on the token": (
        "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared", "phimoe", "olmoe", "gpt_oss", "deepseek_v2",
        "deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "llama4", "llama4_text", "dbrx", "jetmoe",
    ),
    "linear attention, or a state that is no cache of keys and values": (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "rwkv",
        "granitemoehybrid", "recurrent_gemma", "qwen3_next", "qwen3_5", "lfm2", "olmo_hybrid",
    ),
    "layers that share keys and values, or embeddings of their own in every layer": ("gemma3n", "gemma3n_text", "gemma4"),
    "attention and MLP that read the stream side by side": (
        "gpt_neox", "gptj", "phi", "falcon", "cohere", "cohere2", "codegen",
    ),
    "positions that are biases of scores": ("bloom", "mpt"),
    "a vision or audio tower, which the text part is not taken out of": (
        "mllama", "paligemma", "phi4_multimodal", "pixtral", "aya_vision", "glm4v", "qwen2_5_omni", "video_llava",
    ),
    "channels of a part of each head turned as neighbours, beside merged gate and up weights": ("glm", "glm4"),
    "norms of heads behind the rotary embedding, not before it": ("hunyuan_v1_dense", "nanochat"),
    "an activation with weights of its own": ("apertus",),
    "queries, keys and values that are clipped": ("olmo",),
    "an encoder: tokens see those behind them": ("bert", "roberta", "modernbert", "t5", "t5gemma", "bart"),
}  # fmt: skip


def reason(model_type: str) -> str | None:
    """Why a type is not served, None for one that is not known."""
    return next((why for why, types in REFUSED.items() if model_type in types), None)
