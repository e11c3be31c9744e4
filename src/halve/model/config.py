"""What a decoder is: the widths of its layers and everything else that changes the maths, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from halve.model.rotary import RopeConfig


@dataclass(frozen=True)
class LayerConfig:
    """Widths of one layer; 0 heads means no attention sublayer, 0 intermediate size no MLP."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    sliding_window: int | None = None  # a query sees itself and the window - 1 tokens before it
    rope: int | None = 0  # which of the model's rotary embeddings turns queries and keys; None: none

    @property
    def has_attention(self) -> bool:
        return self.num_heads > 0

    @property
    def has_mlp(self) -> bool:
        return self.intermediate_size > 0


@dataclass(frozen=True)
class ModelConfig:
    """Everything that changes the maths, independent of how a family names it."""

    vocab_size: int
    hidden_size: int
    head_dim: int
    max_positions: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    activation: str
    tied: bool
    ropes: tuple[RopeConfig, ...] = ()  # none: learned positions
    position_offset: int = 0  # learned positions: rows of the table before position 0
    norm: str = "rms"  # or "layer" (with bias)
    norm_affine: bool = True
    norm_offset: float = 0.0  # added to the weights of norms as they are stored
    norm_input: bool = True  # what a sublayer reads is normalised
    norm_output: bool = False  # what it writes, before it is added to the stream
    norm_sum: bool = False  # the stream after that (OPT-350m)
    final_norm: bool = True
    gated: bool = True
    qk_norm: bool = False  # queries and keys are normalised, head by head
    qk_norm_whole: bool = False  # or all heads together
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_size: int = 0  # 0: hidden_size; otherwise projected in and out (OPT-350m)
    embed_scale: float = 1.0  # of embeddings
    embed_scale_rounded: bool = False  # to the dtype of the model
    residual_scale: float = 1.0  # of what a sublayer adds to the stream
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head size)
    attention_cap: float | None = None  # scores become cap * tanh(score / cap)
    logit_divisor: float = 1.0
    logit_cap: float | None = None  # as attention_cap, of logits that are divided

    @property
    def length_limit(self) -> float | None:
        """Tokens of a text beyond which queries and keys are turned otherwise, those before it too; None: never."""
        return next((rope.limit for rope in self.ropes if rope.limit is not None), None)
