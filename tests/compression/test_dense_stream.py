"""The dense stream beside the compressed one: where it stands, and what it asks of each linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halve.checkpoint.reader import load_model, open_checkpoint
from halve.compression import walk as walking
from halve.compression.dense_stream import Aim
from halve.compression.walk import Walk
from halve.compression.windows import Calibration
from halve.model.linear import Linear
from tests.common import FAMILIES

POST_NORM = ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16})
IDS = [f[0] for f in FAMILIES]


def walk_of(folder: Path, aims: bool = True) -> Walk:
    drawn = torch.randint(0, 97, (6, 20), generator=torch.Generator().manual_seed(0))
    checkpoint = open_checkpoint(folder)
    walk = Walk(checkpoint, Calibration(drawn[:4], drawn[4:], {}), torch.float32, "cpu")
    if aims:
        layers = range(len(checkpoint.config.layers))
        walk.aim_at(checkpoint, layers, [(layer, name) for layer in layers for name in ("attention", "mlp")])
    return walk


def shaken(linear: Linear, by: float, seed: int = 0) -> Linear:
    """The linear with an error in its weight of a share `by` of it."""
    weight = linear.dense_weight()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight.std()
    return linear.replaced(weight=weight + by * noise)


@pytest.mark.parametrize(("kind", "options"), [*FAMILIES, POST_NORM], ids=[*IDS, "opt post-norm"])
@torch.inference_mode()
def test_nothing_is_asked_where_nothing_was_changed(make_hf, kind: str, options: dict) -> None:
    """The two streams agree: no drift, and goals that are what the linears give. Granite multiplies what is added, Gemma and
    OLMo 2 put a norm between, OPT has biases."""
    walk = walk_of(make_hf(kind, **options))
    for index in range(3):
        view = walk.block(index)
        for stage in view.stages():
            for held_out in (False, True):
                for aim in stage.aims(held_out):
                    if aim.drift is not None:
                        assert float(aim.drift.abs().max()) == 0
                        continue
                    linear = view.linears[stage.roles[0]]
                    given = aim.inputs @ linear.dense_weight().t()
                    assert aim.goal is not None
                    torch.testing.assert_close(aim.goal, given, rtol=1e-3, atol=1e-4 * float(given.abs().max()))
        assert view.block is not None
        walk.advance(view.block)


@pytest.mark.parametrize(("kind", "options"), [*FAMILIES, POST_NORM], ids=[*IDS, "opt post-norm"])
@torch.inference_mode()
def test_a_linear_that_reaches_its_goal_brings_the_stream_back(make_hf, kind: str, options: dict) -> None:
    """A writer whose output were its goal would leave a stream much nearer to the dense one, in every family: exactly that
    one where nothing stands between, to first order behind a norm."""
    walk = walk_of(make_hf(kind, **options))
    view = walk.block(0)
    block = view.block
    assert block is not None
    for stage in view.stages():
        if stage.roles == ("down_proj",):
            break
        for role in stage.roles:
            view.replace(role, shaken(view.linears[role], 0.03))
    else:
        pytest.fail("no down_proj")
    (aim,) = stage.aims(False)
    halt = walk._halted[0][0].at(3)
    assert walk.dense is not None and aim.goal is not None
    (dense,), linear, sublayer = walk.dense.states[0], view.linears["down_proj"], walking.WIRES["down_proj"].sublayer
    weighted = aim.inputs.norm(dim=1) / halt.input.flatten(0, 1).norm(dim=1)
    goal = aim.goal / weighted.unsqueeze(1) + (0 if linear.bias is None else linear.bias)
    before = block.written(sublayer, halt.stream, linear(halt.input)) - dense
    after = block.written(sublayer, halt.stream, goal.view_as(halt.stream)) - dense
    exact = not (block.config.norm_output or block.config.norm_sum)
    assert float(before.norm()) > 1e-3 * float(dense.norm())
    assert float(after.norm()) < (1e-4 if exact else 0.35) * float(before.norm())


@torch.inference_mode()
def test_the_dense_stream_is_the_dense_model(make_hf) -> None:
    """Whatever the compressed one does: taken to the end it is what the model's last block gives, and drifts are measured
    from it."""
    folder = make_hf("qwen3")
    walk = walk_of(folder)
    for index in range(3):
        view = walk.block(index)
        for stage in view.stages():
            for role in stage.roles:
                view.replace(role, shaken(view.linears[role], 0.3))
        assert view.block is not None
        walk.advance(view.block)
    walk.finish_states()
    (stage,) = walk.head().stages()
    assert walk.calibration is not None
    for held_out, windows in enumerate((walk.calibration.windows, walk.calibration.held_out)):
        aims = list(stage.aims(bool(held_out)))
        expected = load_model(folder).hidden(windows).flatten(0, 1)
        reached = torch.cat([aim.inputs + aim.drift for aim in aims if aim.drift is not None])
        torch.testing.assert_close(reached, expected, rtol=1e-4, atol=1e-5)
        assert float(torch.cat([aim.drift for aim in aims if aim.drift is not None]).norm()) > 0.1


def first_goal(folder: Path, kept: list[tuple[int, str]]) -> tuple[Aim, Walk]:
    """What is asked of layer 0's down_proj when only the sublayers `kept` stay."""
    walk = walk_of(folder)
    walk.aim_at(walk.checkpoint, range(3), kept)
    view = walk.block(0)
    for stage in view.stages():
        if stage.roles == ("down_proj",):
            return next(iter(stage.aims(False))), walk
    raise AssertionError


@torch.inference_mode()
def test_what_goes_is_asked_of_what_stands_before_it(make_hf) -> None:
    """Layer 1 goes: down_proj of layer 0 should add what layer 1 would have added as well."""
    folder = make_hf("llama")
    kept = [(layer, name) for layer in (0, 2) for name in ("attention", "mlp")]
    aim, walk = first_goal(folder, kept)
    plain = walk_of(folder, aims=False)
    for index in range(2):
        block = plain.block(index).block
        assert block is not None
        plain.advance(block)
    halt = walk._halted[0][0].at(3)
    assert aim.goal is not None
    torch.testing.assert_close(
        aim.goal + halt.stream.flatten(0, 1), plain.states[0][0].flatten(0, 1), rtol=1e-4, atol=1e-5
    )
