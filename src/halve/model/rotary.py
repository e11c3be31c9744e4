"""Rotary position embedding: frequencies of every kind that configs name, and the tables made from them.

Shape legend: h head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind`: default, linear, llama3, yarn or longrope; `options`: its parameters, named as in Hugging Face configs, tuples
    where those are lists; `share`: of the channels of a head, the first, that are turned; `neighbours`: those that are
    turned together are neighbours, not half of them apart; `growth`: queries at position p are multiplied by
    1 + growth[0] ln(1 + floor(p / growth[1])).
    """

    theta: float
    kind: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    neighbours: bool = False
    growth: tuple[float, float] | None = None

    @property
    def limit(self) -> float | None:
        """Tokens of a text beyond which all of it is turned by other frequencies; None where its length changes nothing."""
        return self.options["original_max_position_embeddings"] if self.kind == "longrope" else None

    def turned(self, head_dim: int) -> int:
        """How many channels of a head are turned."""
        return int(head_dim * self.share)


class Rotary:
    """cos and sin tables, float32, grown as far as the longest context seen.

    Of a longrope there are two: `long` ones are those of texts longer than its `limit`.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device | str) -> None:
        self.config, self.turned = config, config.turned(head_dim)
        self._frequencies = [rope_frequencies(config, head_dim, max_positions, long) for long in (False, True)]
        self._device = device
        self._tables: dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def long(self, length: int) -> bool:
        """Whether a text of this many tokens is beyond the limit."""
        return self.config.limit is not None and length > self.config.limit

    def tables(self, length: int, dtype: torch.dtype, long: bool = False) -> tuple[Tensor, Tensor]:
        """cos, sin [>= length, channels that are turned] in `dtype`."""
        tables = self._tables.get((dtype, long))
        if tables is None or tables[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            inv_freq, scale = self._frequencies[long]
            angles = torch.outer(torch.arange(size, device=self._device).float(), inv_freq.to(self._device))
            angles = torch.cat((angles, angles), dim=-1)
            tables = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
            self._tables[dtype, long] = tables
        return tables


def query_growth(config: RopeConfig, positions: Tensor) -> Tensor | None:
    """What queries at `positions` are multiplied by, float32; None where nothing."""
    if config.growth is None:
        return None
    beta, length = config.growth
    return 1 + beta * torch.log(1 + torch.floor(positions / length))


def rope_frequencies(config: RopeConfig, head_dim: int, max_positions: int, long: bool = False) -> tuple[Tensor, float]:
    """Inverse frequencies [h/2] (float32) and the factor on cos and sin; `long`: of a text beyond the `limit` of config.

    llama3: frequency bands as in Meta's Llama 3.1 code; yarn: Peng et al. 2023 (arXiv 2309.00071), equations 17-22;
    longrope: Ding et al. 2024 (arXiv 2402.13753), equation 3, the factor as in Microsoft's Phi-3.
    """
    head_dim = config.turned(head_dim)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / config.theta**exponent
    options = config.options
    if config.kind == "default":
        return inv_freq, 1.0
    if config.kind == "linear":
        return inv_freq / options["factor"], 1.0
    original = options.get("original_max_position_embeddings", max_positions)
    factor = options.get("factor", max_positions / original)
    if config.kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        wavelength = 2 * math.pi / inv_freq
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inv_freq / factor + smooth * inv_freq, 1.0
    if config.kind == "longrope":
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        spread = torch.tensor(options["long_factor" if long else "short_factor"], dtype=torch.float32)
        return 1.0 / (spread * config.theta**exponent), float(options.get("attention_factor", scale))
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
