"""Distances between points of the residual stream: the traps of low precision, and what a walk measures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halve.checkpoint.reader import load_model, open_checkpoint
from halve.compression.distances import (
    angular_distance,
    angular_distances,
    best_start,
    drop_by_perplexity,
    influence,
    measure_every_run,
    measure_layers,
)
from halve.compression.walk import Walk
from halve.compression.windows import Calibration
from halve.model.decoder import Model

TOKENS = torch.randint(0, 97, (5, 20), generator=torch.Generator().manual_seed(3))


def turned(angle: float, size: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors of different lengths at a known angle, float64."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(size, 2, dtype=torch.float64, generator=generator)).Q
    return 3 * basis[:, 0], 40 * (math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 1])


@pytest.mark.parametrize("angle", [1e-4, 1e-3, 0.02, 0.3, math.pi / 2, 2.5])
def test_distance_of_known_angles(angle: float) -> None:
    a, b = (v.float() for v in turned(angle))
    # float32 unit vectors differ by 1e-7 or so, whatever the angle
    assert float(angular_distance(a, b)) == pytest.approx(angle / math.pi, rel=2e-3)
    pairs = angular_distances(torch.stack((a, b)).unsqueeze(0))[0]
    assert float(pairs[0, 1]) == float(pairs[1, 0]) == pytest.approx(angle / math.pi, rel=2e-3)
    assert float(pairs[0, 0]) == float(pairs[1, 1]) == 0


def test_small_distances_survive_where_a_bfloat16_cosine_loses_them() -> None:
    a, b = (v.bfloat16() for v in turned(0.02))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    assert float(cosine) == 1  # the trap: by this the layer does nothing at all
    # the vectors themselves are rounded to 8 bits here, which turns them by up to 0.4 % of a radian more
    assert float(angular_distance(a, b)) == pytest.approx(0.02 / math.pi, rel=0.1)


def test_small_distances_survive_where_a_float32_arccos_loses_them() -> None:
    a, b = (v.float() for v in turned(1e-4))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(max=1)
    assert abs(float(cosine.acos()) - 1e-4) > 5e-5
    assert float(angular_distance(a, b)) * math.pi == pytest.approx(1e-4, rel=2e-3)


def test_influence_is_one_minus_cosine() -> None:
    assert influence(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 1, 2])
    assert float(influence(torch.tensor([1 / 3]))) == pytest.approx(0.5)


def walk_of(folder: Path, held: int = 1) -> Walk:
    calibration = Calibration(TOKENS[:-held], TOKENS[-held:], {})
    return Walk(open_checkpoint(folder), calibration, torch.float32, "cpu")


def stream_of(model: Model) -> list[torch.Tensor]:
    """The stream before every layer and after the last, before the final norm, float64 [B, T, D]."""
    points: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, x, y: points.extend([x[0]] * (not points) + [y]))
    with torch.inference_mode():
        model(TOKENS[:-1])
    return [p.double() for p in points]


def expected(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.cosine_similarity(a, b, dim=-1)).acos() / math.pi


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_every_distance_of_a_model(make_hf, kind: str) -> None:
    folder = make_hf(kind)
    stream = stream_of(load_model(folder))
    turns, everything = measure_every_run(walk_of(folder))
    for start in range(4):
        for end in range(start + 1, 4):
            pair = expected(stream[start], stream[end])
            assert float(turns.pairs[start, end]) == pytest.approx(float(pair[:, -1].mean()), rel=1e-5)
            assert float(everything[start, end]) == pytest.approx(float(pair.mean()), rel=1e-5)
    for layer, turn in enumerate(turns.layers):
        pair = expected(stream[layer], stream[layer + 1])
        assert turn.last_token == pytest.approx(float(pair[:, -1].mean()), rel=1e-5)
        assert turn.all_tokens == pytest.approx(float(pair.mean()), rel=1e-5)
        assert turn.influence == pytest.approx(float(1 - (pair * math.pi).cos().mean()), rel=1e-5)


def test_the_last_point_lies_before_the_final_norm(make_hf) -> None:
    """transformers' last hidden state is the normed one: runs that reach the end would be measured against that."""
    folder = make_hf("llama")
    theirs, last = AutoModelForCausalLM.from_pretrained(folder), []
    theirs.model.layers[-1].register_forward_hook(lambda _m, _x, y: last.append(y))
    with torch.inference_mode():
        states = theirs(TOKENS[:-1], output_hidden_states=True).hidden_states
    pairs = measure_layers(walk_of(folder)).pairs
    for start in range(3):
        right, trap = (float(expected(states[start], end)[:, -1].mean()) for end in (last[0], states[-1]))
        assert float(pairs[start, 3]) == pytest.approx(right, rel=1e-4)
        assert abs(trap - right) > 1e-3


def test_one_block_in_memory_measures_what_the_whole_model_measures(make_hf) -> None:
    folder = make_hf("llama")
    one, whole = measure_layers(walk_of(folder)), measure_every_run(walk_of(folder))[0]
    assert torch.allclose(one.pairs, whole.pairs, rtol=1e-6)
    assert (one.layers, one.sublayers) == (whole.layers, whole.sublayers)


def test_sublayers_in_order_are_the_block(make_hf) -> None:
    walk = walk_of(make_hf("llama"))
    block = walk.block(1).block
    assert block is not None
    attention, mlp = block.only(("attention",)), block.only(("mlp",))
    x = walk.states[0][0]
    with torch.inference_mode():
        assert torch.equal(mlp(attention(x, walk.span(20)), walk.span(20)), block(x, walk.span(20)))


def test_sublayer_turns_are_measured_between_them(make_hf) -> None:
    walk = walk_of(make_hf("llama"))
    block = walk.block(0).block
    assert block is not None
    attention = block.only(("attention",))
    x = walk.states[0][0]
    with torch.inference_mode():
        between = attention(x, walk.span(20)).double()
        after = block(x, walk.span(20)).double()
    turns = measure_layers(walk).sublayers
    assert turns["attention"][0].all_tokens == pytest.approx(float(expected(x.double(), between).mean()), rel=1e-5)
    assert turns["mlp"][0].all_tokens == pytest.approx(float(expected(between, after).mean()), rel=1e-5)


def test_best_start_of_a_hand_made_table() -> None:
    pairs = torch.full((5, 5), 9.0)
    pairs[0, 1], pairs[1, 2], pairs[2, 3], pairs[3, 4] = 4.0, 3.0, 1.0, 2.0
    pairs[0, 2], pairs[1, 3], pairs[2, 4] = 3.0, 2.0, 2.5
    assert [best_start(pairs, count) for count in (1, 2)] == [2, 1]


def test_perplexity_drops_what_a_brute_force_search_drops(make_hf) -> None:
    folder = make_hf("llama", num_hidden_layers=4)
    model = load_model(folder)
    blocks = list(model.blocks)

    def loss(kept: list[int]) -> float:
        with torch.inference_mode():
            x = model.table.look_up(TOKENS[:-1], model.dtype)
            for index in kept:
                x = blocks[index](x, walk_of(folder).span(20))
            assert model.final_norm is not None
            log_probs = model.head(model.final_norm(x)).log_softmax(-1)
        return -float(log_probs[:, :-1].gather(-1, TOKENS[:-1, 1:, None]).sum())

    first = min(range(4), key=lambda i: loss([j for j in range(4) if j != i]))
    left = [i for i in range(4) if i != first]
    second = min(left, key=lambda i: loss([j for j in left if j != i]))
    chosen = drop_by_perplexity(walk_of(folder), [(i, None) for i in range(4)], 2)
    assert chosen == sorted([(first, None), (second, None)])
