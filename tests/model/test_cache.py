"""Where a pass's keys and values land."""

from __future__ import annotations

import pytest
import torch

from halve.model.cache import KVCache
from halve.model.config import LayerConfig, ModelConfig

CONFIG = ModelConfig(
    vocab_size=10, hidden_size=8, head_dim=2, max_positions=16, layers=(LayerConfig(4, 3, 8), LayerConfig(0, 0, 8)),
    norm_eps=1e-6, activation="silu", tied=False,
)  # fmt: skip


def passes(*tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 3, n, 2, generator=generator) for _ in range(2)) for n in tokens]  # type: ignore[misc]


def test_passes_follow_one_another() -> None:
    cache = KVCache(CONFIG, 2, 5, torch.float32, "cpu")
    (k1, v1), (k2, v2) = passes(3, 2)
    cache.store(0, k1, v1, torch.arange(3), 3)
    cache.lengths = 3
    keys, values = cache.store(0, k2, v2, torch.arange(3, 5), 5)
    assert torch.equal(keys, torch.cat((k1, k2), 2)) and torch.equal(values, torch.cat((v1, v2), 2))
    assert cache.lengths == 3  # the model counts, once all layers have stored


def test_rows_of_unequal_length_keep_their_places() -> None:
    cache = KVCache(CONFIG, 2, 5, torch.float32, "cpu")
    (k1, v1), (k2, v2) = passes(3, 1)
    cache.store(0, k1, v1, torch.arange(3), 3)
    cache.lengths = torch.tensor([3, 1])
    keys, values = cache.store(0, k2, v2, torch.tensor([[3], [1]]), 4)
    assert keys.shape == values.shape == (2, 3, 4, 2)
    assert torch.equal(keys[0], torch.cat((k1[0], k2[0]), 1))
    assert torch.equal(values[1, :, :2], torch.cat((v1[1, :, :1], v2[1]), 1))


def test_a_full_cache_refuses() -> None:
    cache = KVCache(CONFIG, 2, 2, torch.float32, "cpu")
    ((k, v),) = passes(3)
    with pytest.raises(AssertionError):
        cache.store(0, k, v, torch.arange(3), 3)


def test_layers_without_attention_take_no_memory() -> None:
    cache = KVCache(CONFIG, 2, 5, torch.float32, "cpu")
    assert cache.layers[1] is None
    assert cache.nbytes == 2 * (2 * 3 * 5 * 2) * 4
