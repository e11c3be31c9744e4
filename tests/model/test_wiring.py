"""The table of a block against what the decoder really does with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halve.checkpoint.reader import open_checkpoint
from halve.model import wiring
from halve.model.config import LayerConfig
from halve.model.decoder import Block, Span, make_rotaries
from halve.model.linear import Linear
from halve.model.merge import merge_siblings
from halve.model.wiring import ATTENTION, MLP, SUBLAYERS

GATED = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
PLAIN = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("up_proj",), ("down_proj",)]


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "olmo2", "opt"])
def folder(request: pytest.FixtureRequest, make_hf) -> Path:
    return make_hf(request.param)


@torch.inference_mode()
def inputs_by_role(block: Block) -> dict[str, torch.Tensor]:
    """What each linear of a block reads, in the order in which they run."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, role=role: seen.__setitem__(role, args[0]))
        for role, linear in block.linears.items()
    ]
    span = Span(make_rotaries(block.config, "cpu"), 6, torch.float32, "cpu")
    block(torch.randn(2, 6, block.config.hidden_size, generator=torch.Generator().manual_seed(0)), span)
    for handle in handles:
        handle.remove()
    return seen


def block_of(folder: Path) -> Block:
    return open_checkpoint(folder).block(1, torch.float32)


def test_stages_are_what_runs_in_that_order_on_one_input(folder: Path) -> None:
    block = block_of(folder)
    seen = inputs_by_role(block)
    stages = block.stage_roles()
    assert stages == (GATED if block.config.gated else PLAIN)
    assert [role for roles in stages for role in roles] == list(seen)
    for roles in stages:
        assert all(seen[role] is seen[roles[0]] for role in roles)
    assert len({id(x) for x in seen.values()}) == len(stages)


def test_producers_are_what_changes_an_input_from_inside_the_sublayer(folder: Path) -> None:
    """A weight that is doubled changes what a linear behind it reads; what reads the stream has no producers."""
    before = inputs_by_role(block_of(folder))
    writers = {sublayer.writer: sublayer for sublayer in SUBLAYERS.values()}
    for changed in before:
        block = block_of(folder)
        linear = block.linears[changed]
        assert isinstance(linear, Linear) and isinstance(linear.weight, torch.Tensor)
        block.linears[changed] = linear.replaced(weight=linear.weight.roll(1, 0))
        after = inputs_by_role(block)
        for reader, sublayer in writers.items():
            if changed in sublayer.readers:
                assert (changed in wiring.producers(reader)) == (not torch.equal(after[reader], before[reader]))
    for sublayer in SUBLAYERS.values():
        assert set(wiring.producers(sublayer.writer)) == set(sublayer.readers)
        assert all(wiring.producers(role) == () for role in sublayer.readers)


def test_every_linear_is_as_wide_as_the_table_says(folder: Path) -> None:
    """Against the shapes of the files that transformers wrote."""
    block = block_of(folder)
    assert [wire.role for wire in wiring.wires(block.config, block.layer)] == list(block.linears)
    for wire in wiring.wires(block.config, block.layer):
        linear = block.linears[wire.role]
        assert isinstance(linear, Linear)
        assert linear.weight.shape == (
            wire.outputs(block.config, block.layer),
            wire.inputs(block.config, block.layer),
        )
        assert (linear.bias is not None) == getattr(block.config, wire.bias)


def test_running_readers_are_the_merged_linear_or_its_parts(folder: Path) -> None:
    block = block_of(folder)
    assert ATTENTION.running_readers(block.linears) == ["q_proj", "k_proj", "v_proj"]
    assert MLP.running_readers(block.linears) == (["gate_proj", "up_proj"] if block.config.gated else ["up_proj"])
    merge_siblings(block)
    assert ATTENTION.running_readers(block.linears) == ["qkv_proj"]
    assert MLP.running_readers(block.linears) == (["gate_up_proj"] if block.config.gated else ["up_proj"])


def test_siblings_read_one_input() -> None:
    assert wiring.siblings("k_proj") == ("q_proj", "k_proj", "v_proj")
    assert wiring.siblings("up_proj") == ("gate_proj", "up_proj")
    assert wiring.siblings("down_proj") == ("down_proj",)
    assert wiring.siblings("head") == ("head",)


def test_a_sublayer_shrinks_by_units_and_goes_whole() -> None:
    layer = LayerConfig(num_heads=12, num_kv_heads=4, intermediate_size=96, sliding_window=7)
    assert (ATTENTION.units(layer), MLP.units(layer)) == (4, 96)
    assert ATTENTION.resized(layer, 3) == LayerConfig(9, 3, 96, 7)  # a key/value head goes with its query heads
    assert MLP.resized(layer, 80) == LayerConfig(12, 4, 80, 7)
    without = ATTENTION.resized(layer, 0)
    assert without == LayerConfig(0, 0, 96, 7) and not without.has_attention
    assert ATTENTION.resized(without, 0) == without


def test_a_layer_without_a_sublayer_lacks_its_linears(make_hf) -> None:
    config = open_checkpoint(make_hf("qwen3")).config
    layer = config.layers[0]
    assert wiring.stages(config, ATTENTION.resized(layer, 0)) == GATED[2:]
    assert wiring.stages(config, MLP.resized(layer, 0)) == GATED[:2]
