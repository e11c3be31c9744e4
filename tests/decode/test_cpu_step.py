"""Decode steps in C against the model itself, which runs operation by operation."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve.checkpoint.reader import load_model
from halve.compression.compress import compress
from halve.decode.cpu_step import CpuStep
from halve.decode.generate import Decoder
from halve.decode.sampling import Sampling
from halve.decode.torch_step import TorchStep
from halve.errors import HalveError
from halve.kernels import cpu
from halve.model.decoder import Model
from halve.model.linear import Linear
from tests.common import GEMMA, GRANITE, NEWER, relative

PROMPTS = [[5, 9, 3, 44, 81, 2, 17], [7] * 11, [90, 2, 61]]
STEPS = 6
# float32 sums in another order: a few units of 2^-24 in every sum, through 3 layers
FLOAT32_ERROR = 3e-6

pytestmark = pytest.mark.skipif(isinstance(cpu.load_library(), str), reason=str(cpu.load_library()))

FAMILIES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied-uneven-heads": ("llama", {"head_dim": 20, "tie_word_embeddings": True}),
    "five-queries-a-key": ("llama", {"hidden_size": 40, "num_attention_heads": 10, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 2}),
    "smollm3": ("smollm3", {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    **{kind: (kind, options) for kind, options in NEWER if kind != "ernie4_5"},
    "opt": ("opt", {}),
}


def decoder_in_c(model: Model, prompts: list[list[int]], capacity: int) -> tuple[Decoder, CpuStep]:
    decoder = Decoder(model, prompts, capacity, Sampling())
    assert isinstance(decoder.engine, CpuStep), decoder.kernel
    return decoder, decoder.engine


def kernel_of(model: Model, batch: int = 1) -> str:
    return Decoder(model, [[1]] * batch, 8, Sampling()).kernel


def steps_of(model: Model, in_c: bool, prompts: list[list[int]] = PROMPTS) -> Tensor:
    """Logits [steps, B, V] of STEPS fixed tokens after the prompts."""
    decoder, step_in_c = decoder_in_c(model, prompts, 40)
    found = []
    with torch.inference_mode():
        decoder.prefill()
        for step in range(STEPS):
            tokens = torch.tensor([[(13 * step + row) % 97] for row in range(len(prompts))])
            found.append(step_in_c.logits(tokens).clone() if in_c else model(tokens, decoder.cache)[:, 0])
    return torch.stack(found)


@pytest.fixture(params=["avx512-vnni", "avx-vnni", "avx2", "generic"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Models loaded from here on use this instruction set."""
    library = cpu.open_library(request.param)
    if isinstance(library, str):
        pytest.skip(library)
    monkeypatch.setattr(cpu, "load_library", lambda: library)
    return request.param


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_model(make_hf: Callable[..., Path], isa: str, name: str) -> None:
    family, options = FAMILIES[name]
    model = load_model(make_hf(family, **options))
    assert kernel_of(model) == f"{isa}-step"
    assert relative(steps_of(model, True), steps_of(model, False)) < FLOAT32_ERROR
    alone = [[5, 9, 3, 44, 81, 2, 17]]
    assert relative(steps_of(model, True, alone), steps_of(model, False, alone)) < FLOAT32_ERROR


def test_equals_the_model_beyond_one_piece_of_the_cache(make_hf: Callable[..., Path], isa: str) -> None:
    model = load_model(make_hf("llama", max_position_embeddings=256))
    torch.manual_seed(0)
    prompts = [torch.randint(97, (count,)).tolist() for count in (200, 63, 130)]
    decoder, step_in_c = decoder_in_c(model, prompts, 220)
    with torch.inference_mode():
        tokens = decoder.prefill()
        found = step_in_c.logits(tokens).clone()
        for row, prompt in enumerate(prompts):
            expected = model(torch.tensor([[*prompt, int(tokens[row])]]))[0, -1]
            assert relative(found[row], expected) < FLOAT32_ERROR


@pytest.mark.parametrize(
    "steps",
    [
        ["rtn:bits=8", "rtn:bits=8,targets=lm_head"],
        ["rtn:bits=4,group_size=16,symmetric=false"],
        ["l1-inputs:fraction=0.35"],
        ["l1-outputs:fraction=0.25"],
        ["l1-inputs:fraction=0.35", "rtn:bits=8"],
        ["drop-attention:count=1,select=deepest", "rtn:bits=8"],
    ],
    ids=lambda steps: "+".join(steps),
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equals_the_model_compressed(
    make_hf: Callable[..., Path], tmp_path: Path, isa: str, family: str, steps: list[str]
) -> None:
    compress(make_hf(family), tmp_path / "out", steps)
    model = load_model(tmp_path / "out")
    assert kernel_of(model) == f"{isa}-step"
    assert relative(steps_of(model, True), steps_of(model, False)) < FLOAT32_ERROR


def test_bfloat16_is_nearer_to_float64_than_the_operations_are(make_hf: Callable[..., Path], isa: str) -> None:
    folder = make_hf("llama", hidden_size=64, intermediate_size=160, head_dim=16)
    model = load_model(folder, dtype=torch.bfloat16)
    tokens = torch.arange(1, 65, 4).unsqueeze(1)
    prompts = [PROMPTS[0]] * len(tokens)
    found = {}
    with torch.inference_mode():
        expected = in_float64(load_model(folder, dtype=torch.bfloat16))(
            torch.cat((torch.tensor(prompts), tokens), dim=1)
        )[:, -1]
        for in_c in (True, False):
            decoder, step_in_c = decoder_in_c(model, prompts, 20)
            decoder.prefill()
            found[in_c] = relative(step_in_c.logits(tokens) if in_c else model(tokens, decoder.cache)[:, 0], expected)
    assert found[True] < found[False], found


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("step", ["rtn:bits=8", "rtn:bits=4,group_size=32,fallback=channel"])
def test_channels_far_larger_than_the_others_change_no_token(
    assets: Path, tmp_path: Path, step: str, size: float
) -> None:
    """Every 16th channel between norm and linears is `size` times as large, and its weights as much smaller. In float32 160
    greedy tokens are those that a prefill finds likeliest; in bfloat16 the logits are nearer to float32's than torch's."""
    folder = Path(shutil.copytree(assets / "models" / "stories260K", tmp_path / "model"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[7::16] *= size
        elif name.endswith(tuple(f"{role}_proj.weight" for role in ("q", "k", "v", "gate", "up"))):
            tensor[:, 7::16] /= size
    save_file(tensors, file, metadata={"format": "pt"})
    compress(folder, tmp_path / "out", [step])
    model = load_model(tmp_path / "out", dtype=torch.float32)
    tokens, found = greedy(model, 160)
    with torch.inference_mode():
        prefill = model(torch.tensor([tokens[:-1]]))[0, 1:]
        assert prefill.argmax(-1).tolist() == tokens[2:]
        assert relative(found, prefill) < 1e-5
        rounded = load_model(tmp_path / "out", dtype=torch.bfloat16)
        tokens, found = greedy(rounded, 160)
        exact, theirs = (
            load_model(tmp_path / "out", dtype=dtype, backend="reference")(torch.tensor([tokens[:-1]]))[0, 1:]
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert relative(found, exact) < relative(theirs, exact)


@torch.inference_mode()
def greedy(model: Model, count: int) -> tuple[list[int], Tensor]:
    """Token 1 and `count` greedy ones after it, and the logits of all of these but the first."""
    decoder, step_in_c = decoder_in_c(model, [[1]], count + 2)
    token = decoder.prefill()
    tokens, found = [1, int(token)], []
    while len(tokens) <= count:
        found.append(step_in_c.logits(token)[0].clone())
        token = found[-1].argmax().view(1, 1)
        tokens.append(int(token))
    return tokens, torch.stack(found)


def in_float64(model: Model) -> Model:
    """The same numbers, computed with in float64."""
    assert model.final_norm is not None and model.head is not model.table
    model.dtype, model.table = torch.float64, Linear(model.table.dense_weight(torch.float64))
    norms = [norm for block in model.blocks for norm in block.norms.values()]  # type: ignore[union-attr]
    for norm in [*norms, model.final_norm]:
        norm.weight = norm.weight.double()  # type: ignore[union-attr]
    for block in model.blocks:
        for role, linear in block.linears.items():  # type: ignore[union-attr]
            block.linears[role] = linear.replaced(weight=linear.dense_weight(torch.float64))  # type: ignore[index]
    model.head = model.head.replaced(weight=model.head.dense_weight(torch.float64))
    return model


def test_nothing_is_allocated_by_a_step(make_hf: Callable[..., Path]) -> None:
    model = load_model(make_hf("llama"))
    decoder, step_in_c = decoder_in_c(model, PROMPTS[:1], 40)
    with torch.inference_mode():
        tokens = decoder.prefill()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step_in_c.logits(tokens)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages()) == 0


def test_what_c_does_not_know_is_left_to_the_model(
    make_hf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    projected = load_model(make_hf("opt", word_embed_proj_dim=16, do_layer_norm_before=False))
    assert kernel_of(projected).startswith("torch (norms after the sums")
    on_torch = load_model(make_hf("llama"), backend="reference")
    assert kernel_of(on_torch) == "torch (a layer runs on torch.linear)"
    assert type(Decoder(on_torch, PROMPTS, 40, Sampling()).engine) is TorchStep
    hooked = load_model(make_hf("llama"))
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    assert kernel_of(hooked) == "torch (hooks on a layer)"
    many = load_model(make_hf("llama"))
    assert kernel_of(many, 65) == "torch (65 prompts at once, the C step takes 64)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 24}, "a linear of an attention"),
        ({"inner": 16}, "the hidden size"),
        ({"outer": 16}, "a linear of an attention"),
        ({"columns": 8}, "a linear of an attention"),
        ({"segments": 0}, "a linear of an attention"),
        ({"head_size": 0}, "the head size"),
        ({"head_size": 4}, "the turned channels"),
        ({"turned": 7}, "the turned channels"),
        ({"kind": 2}, "another kind"),
        ({"heads": 3}, "do not share keys evenly"),
        ({"heads": 8}, "a linear of an attention"),
        ({"width": 47}, "a linear of an MLP"),
        ({"batch": 65}, "too many rows"),
        ({"capacity": 0}, "no slots"),
        ({"input": 32}, "a linear of an MLP"),
        ({"input": -1}, "a linear of an MLP"),
        ({"output": 10**6}, "a linear of an MLP"),
    ],
)
def test_a_step_checks_what_it_reads_by(
    make_hf: Callable[..., Path], tmp_path: Path, change: dict[str, int], message: str
) -> None:
    compress(make_hf("llama"), tmp_path / "out", ["rtn:bits=4", "l1-inputs:fraction=0.25", "l1-outputs:fraction=0.25"])
    model = load_model(tmp_path / "out")
    _, step_in_c = decoder_in_c(model, PROMPTS, 40)
    described, cache = step_in_c._c_model, step_in_c._c_cache
    library = cpu.load_library()
    assert not isinstance(library, str)
    addresses = ctypes.addressof(described), ctypes.addressof(cache)
    assert library.step_check(*addresses) is None
    for field, value in change.items():
        up = model.blocks[0].linears["up_proj"]  # type: ignore[union-attr,index]
        if field in ("input", "output"):
            getattr(up, f"{field}_index")[-1] = value
        for structure in (described, cache, step_in_c._layers[0]):
            if hasattr(structure, field):
                setattr(structure, field, value)
    found = library.step_check(*addresses)
    assert found is not None and message in found.decode()


@pytest.mark.parametrize("token", [-1, 97, 2**40])
def test_a_token_outside_of_the_vocabulary_is_refused(make_hf: Callable[..., Path], token: int) -> None:
    _, step_in_c = decoder_in_c(load_model(make_hf("llama")), PROMPTS, 40)
    with pytest.raises(HalveError, match=f"{token}.* is not in the vocabulary of 97"):
        step_in_c.logits(torch.tensor([[5], [token], [9]]))
