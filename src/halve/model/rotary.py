"""Rotary position embedding: frequencies of every kind that configs name, and the tables made from them.

Shape legend: h head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind`: default, linear, llama3 or yarn; `options`: its parameters, named as in Hugging Face configs.
    """

    theta: float
    kind: str = "default"
    options: dict[str, float] = field(default_factory=dict)


class Rotary:
    """cos and sin tables, float32, grown as far as the longest context seen."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device | str) -> None:
        self.inv_freq, self.scale = rope_frequencies(config, head_dim, max_positions)
        self.inv_freq = self.inv_freq.to(device)
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [>= length, h] in `dtype`."""
        tables = self._tables.get(dtype)
        if tables is None or tables[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            angles = torch.outer(torch.arange(size, device=self.inv_freq.device).float(), self.inv_freq)
            angles = torch.cat((angles, angles), dim=-1)
            tables = (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)
            self._tables[dtype] = tables
        return tables


def rope_frequencies(config: RopeConfig, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies [h/2] (float32) and the factor on cos and sin.

    llama3: frequency bands as in Meta's Llama 3.1 code; yarn: Peng et al. 2023 (arXiv 2309.00071), equations 17-22.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / config.theta**exponent
    options = config.options
    if config.kind == "default":
        return inv_freq, 1.0
    factor = options["factor"]
    if config.kind == "linear":
        return inv_freq / factor, 1.0
    original = options.get("original_max_position_embeddings", max_positions)
    if config.kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        wavelength = 2 * math.pi / inv_freq
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inv_freq / factor + smooth * inv_freq, 1.0
    assert config.kind == "yarn", config.kind

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    scale = options.get("attention_factor")
    if scale is None:
        mscale, mscale_all = options.get("mscale"), options.get("mscale_all_dim")

        def amplitude(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        scale = amplitude(mscale) / amplitude(mscale_all) if mscale and mscale_all else amplitude(1.0)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(scale)
