"""One decode step on a GPU as a fixed sequence of fused kernels on fixed buffers, captured once and replayed per token.

What changes from token to token lies in memory on the device: the token, its position, how many were made. So a captured
step serves every length, nothing waits for the host, and a layer costs five launches: norm + gather + q/k/v; rotary +
store + attention; o + residual; norm + gather + gate/up + activation; down + residual. Linears whose siblings could not
be merged take a launch each.

`acquire` gives a Decoder such a step, or None with the reason in `describe`. Models are Llama-like (see `_unsupported`).

Shape legend: B prompts, D hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.kernels import triton_backend
from halve.kernels.triton_backend import Fusion, Operand, Scratch, TritonMatmul, launch_options, multiply, tiling
from halve.linear import Linear
from halve.model import Block, KVCache, Model, Norm

STORE, ADD, GATE, TIMES = 0, 1, 2, 3  # epilogues of triton_matmul
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}
MAX_BATCH = triton_backend.MAX_ROWS
_CAPACITY_STEP = 256  # slots; a cache is made somewhat larger, so that the next prompt can use the same captured step
# of attention: slots of a block, most programs of a head, slots worth a program
_SLOTS, _SPLITS, _SHORTEST = 64, 16, 64


def acquire(model: Model, batch: int, capacity: int) -> CapturedStep | None:
    """The step that decodes `batch` rows of up to `capacity` tokens, or None where the model's own forward has to.

    A model keeps its last step; it is used again when it is large enough and no other decoder holds it.
    """
    reason = _unsupported(model, batch)
    if reason is not None:
        _STEPS[model] = reason
        return None
    held = _STEPS.get(model)
    if isinstance(held, CapturedStep):
        if held.batch == batch and held.cache.capacity >= capacity and held.free():
            return held
        del _STEPS[model], held  # its memory goes before the new one is made
    most = max(capacity, min(model.config.max_positions, -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP))
    step = _STEPS[model] = CapturedStep(model, batch, most)
    return step


def describe(model: Model) -> str:
    """How this model's last decoder made its steps: a name, or the reason for the ordinary forward."""
    held = _STEPS.get(model)
    if isinstance(held, CapturedStep):
        return held.kind
    return "module by module" if held is None else f"module by module ({held})"


def _unsupported(model: Model, batch: int) -> str | None:
    """Why the fused step cannot run this model, None when it can."""
    config = model.config
    if model.device.type != "cuda" and not triton_backend.INTERPRETED:
        return f"the model is on {model.device}"
    if triton_backend.missing():
        return triton_backend.missing()
    if batch > MAX_BATCH:
        return f"{batch} prompts at once, the fused kernels take {MAX_BATCH}"
    if config.rope is None or model.project_in is not None or model.project_out is not None:
        return "learned positions or projections"
    if config.norm != "rms" or not config.norm_first or not config.gated or config.activation not in ACTIVATIONS:
        return "not a Llama-like block"
    if model.final_norm is None or model.final_norm.weight is None:
        return "no final norm"
    for name, linear in model.linears():
        if not isinstance(linear._matmul, TritonMatmul):
            return f"{name} runs {linear.kernel}"
        fused = name.endswith(("o_proj", "up_proj", "down_proj"))
        if fused and linear.output_index is not None and linear.bias is not None:
            return f"{name} has removed outputs and a bias"
    return None


# the last step of every model that is alive, or why it has none
_STEPS: weakref.WeakKeyDictionary[Model, CapturedStep | str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Launch:
    """One product of a step, everything decided."""

    operand: Operand
    x: Tensor
    out: Tensor
    fusion: Fusion
    scratch: Scratch

    def __call__(self) -> None:
        multiply(self.operand, self.x, self.out, self.fusion, self.scratch, tiling(self.operand, self.x.shape[0]))


class CapturedStep:
    """The buffers and launches of one model, batch size and capacity. See the module's docstring."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.batch, self.kind = batch, "fused kernels"
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self._owner: Callable[[], object | None] = lambda: None
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}
        with torch.inference_mode(False):  # these outlive the inference mode they are made in
            self.cache: KVCache = model.new_cache(batch, capacity)
            self.token = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.turn = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.history = torch.zeros(batch, capacity, dtype=torch.int64, device=self.device)
            self.logits = self._buffer(self.config.vocab_size)
            self._launches = self._plan(model)
        self._made = 0  # columns of the history filled since `begin`
        self._last: Tensor | None = None

    def free(self) -> bool:
        """Whether no decoder uses this step."""
        return self._owner() is None

    def hold(self, owner: object) -> None:
        """Belong to `owner` as long as it lives."""
        self._owner = weakref.ref(owner)
        self.cache.lengths = 0
        self._last = None

    def step(self, tokens_B1: Tensor, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Feed tokens int64 [B, 1], return the next ones: by `choose` from logits [B, V], or greedily (None).

        What greedy steps return stays as it is until another decoder takes over this step.
        """
        if self._last is None:
            self._begin()
        if tokens_B1 is not self._last:
            self.token.copy_(tokens_B1[:, 0])
        self._replay(choose is None)
        if choose is None:
            chosen = self.history[:, self._made : self._made + 1]
        else:
            chosen = choose(self.logits)
            self.token.copy_(chosen[:, 0])
            self.position.add_(1).clamp_(max=self.cache.capacity - 1)
        self._made += 1
        lengths = self.cache.lengths
        self.cache.lengths = lengths + 1 if isinstance(lengths, int) else self.position.long()
        self._last = chosen
        return chosen

    def _begin(self) -> None:
        """Take over from a prefill that filled the cache."""
        lengths = self.cache.lengths
        if isinstance(lengths, int):
            self.position.fill_(lengths)
        else:
            self.position.copy_(lengths)
        # only a row that will not be asked again can stand at the end: its last slot is then rewritten
        self.position.clamp_(max=self.cache.capacity - 1)
        self.turn.zero_()
        self._made = 0

    def _replay(self, greedy: bool) -> None:
        if self.device.type != "cuda":
            self._run(greedy)
            return
        if greedy not in self._graphs:
            self._graphs[greedy] = self._capture(greedy)
        graph = self._graphs[greedy]
        if graph is None:
            self._run(greedy)
        else:
            graph.replay()

    def _capture(self, greedy: bool) -> torch.cuda.CUDAGraph | None:
        """Record the step, None where that cannot be; the state that compiling its kernels changes is put back."""
        state = (self.token, self.position, self.turn, self.history)
        saved = [t.clone() for t in state]
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._run(greedy)  # compiles; what it stores at this position is stored again by the replay
        current.wait_stream(aside)
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run(greedy)
        except RuntimeError as error:
            self.kind = f"fused kernels, launched one by one (no CUDA graph: {str(error).splitlines()[0]})"
            return None
        self.kind = "fused kernels in a CUDA graph"
        return graph

    def _run(self, greedy: bool) -> None:
        with triton_backend.current(self.device):
            for launch in self._launches:
                launch()
            if greedy:
                self._choose()

    # what follows builds the launches

    def _buffer(self, width: int) -> Tensor:
        return torch.zeros(self.batch, width, dtype=self.dtype, device=self.device)

    def _plan(self, model: Model) -> list[Callable[[], None]]:
        config, rotary = self.config, model.rotary
        assert rotary is not None
        self._scratch = Scratch(torch.device(self.device))
        self._x = self._buffer(config.hidden_size)
        self._cos_sin = rotary.tables(self.cache.capacity, self.dtype)
        embed = model.embed
        launches: list[Callable[[], None]] = [lambda: torch.index_select(embed, 0, self.token, out=self._x)]  # type: ignore[list-item]
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        widths = [block.layer for block in blocks]
        most = max((w.num_heads + 2 * w.num_kv_heads for w in widths), default=0) * config.head_dim
        # all layers share these; a layer whose outputs were pruned has its own, whose gaps stay 0 (or the bias)
        self._shared = {
            "qkv": self._buffer(most),
            "heads": self._buffer(max((w.num_heads for w in widths), default=0) * config.head_dim),
            "gate": self._buffer(max((w.intermediate_size for w in widths), default=0)),
            "hidden": self._buffer(max((w.intermediate_size for w in widths), default=0)),
        }
        self._attention_scratch = self._make_attention_scratch(blocks)
        for block in blocks:
            if block.layer.has_attention:
                launches += self._attention(block)
            if block.layer.has_mlp:
                launches += self._mlp(block)
        launches.append(self._head(model))
        for launch in launches:
            if isinstance(launch, _Launch):
                sizes = tiling(launch.operand, self.batch)
                tiles = -(-launch.operand.rows // sizes.rows)
                parts = sizes.parts if sizes.parts > 1 else 0
                self._scratch.reserve(parts * self.batch * launch.operand.rows, tiles)
        return launches

    def _product(self, linear: Linear, x: Tensor, out: Tensor, norm: Norm | None = None, **fusion: object) -> _Launch:
        matmul = linear._matmul
        assert isinstance(matmul, TritonMatmul)
        made = Fusion(
            index=matmul.operand.index(linear.input_index),
            gain=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            bias=_kept_bias(linear),
            place=None if linear.output_index is None else linear.output_index.to(torch.int32),
        )
        return _Launch(matmul.operand, x, out, replace(made, **fusion), self._scratch)  # type: ignore[arg-type]

    def _into(self, name: str, linears: list[Linear]) -> Tensor:
        """A buffer [B, outputs of all linears] that they write side by side."""
        width = sum(linear.out_features for linear in linears)
        if all(linear.output_index is None for linear in linears):
            return self._shared[name][:, :width]
        own = self._buffer(width)
        biases = [linear.bias if linear.bias is not None else own.new_zeros(linear.out_features) for linear in linears]
        own += torch.cat(biases)
        return own

    def _attention(self, block: Block) -> list[Callable[[], None]]:
        linears, norm = _linears(block), block.norms["attn_norm"]
        assert isinstance(norm, Norm)
        layer, size = block.layer, self.config.head_dim
        roles = ("qkv_proj",) if "qkv_proj" in linears else ("q_proj", "k_proj", "v_proj")
        parts = [linears[role] for role in roles]
        qkv, first = self._into("qkv", parts), 0
        launches: list[Callable[[], None]] = []
        for linear in parts:
            launches.append(self._product(linear, self._x, qkv[:, first : first + linear.out_features], norm))
            first += linear.out_features
        heads = self._shared["heads"][:, : layer.num_heads * size]
        launches.append(self._attend(block, qkv, heads))
        launches.append(self._product(linears["o_proj"], heads, self._x, epilogue=ADD))
        return launches

    def _mlp(self, block: Block) -> list[Callable[[], None]]:
        linears, norm = _linears(block), block.norms["mlp_norm"]
        assert isinstance(norm, Norm)
        activation = ACTIVATIONS[self.config.activation]
        if "gate_up_proj" in linears:
            hidden = self._shared["hidden"][:, : block.layer.intermediate_size]
            gated = [
                self._product(linears["gate_up_proj"], self._x, hidden, norm, epilogue=GATE, activation=activation)
            ]
        else:
            gate, hidden = self._into("gate", [linears["gate_proj"]]), self._into("hidden", [linears["up_proj"]])
            up = self._product(
                linears["up_proj"], self._x, hidden, norm, epilogue=TIMES, activation=activation, gate=gate
            )
            gated = [self._product(linears["gate_proj"], self._x, gate, norm), up]
        return [*gated, self._product(linears["down_proj"], hidden, self._x, epilogue=ADD)]

    def _head(self, model: Model) -> _Launch:
        linear = model.head
        assert isinstance(linear._matmul, TritonMatmul)
        logits = self.logits
        if linear.output_index is not None:
            logits += 0 if linear.bias is None else linear.bias
        tiles = triton_backend.tiles_of(linear._matmul.operand, self.batch)
        self._best = torch.empty(self.batch, tiles, dtype=torch.float32, device=self.device)
        self._best_row = torch.empty(self.batch, tiles, dtype=torch.int32, device=self.device)
        # logits without a row of the head are 0 (or the bias): those are not among the tiles' best
        self._whole_head = linear.output_index is None
        return self._product(
            linear, self._x, logits, model.final_norm, best=self._best, best_row=self._best_row
        )  # fmt: skip

    def _choose(self) -> None:
        kernels = triton_backend.load_kernels("triton_attention")
        if not self._whole_head:
            torch.amax(self.logits.float(), 1, keepdim=True, out=self._best[:, :1])
            self._best_row[:, :1] = self.logits.argmax(1, keepdim=True)
        kernels.choose[(self.batch,)](
            self._best, self._best_row, self.token, self.history, self.position, self.turn,
            self._best.shape[1], self.history.stride(0), self.cache.capacity - 1,
            BLOCK=2048 if self.device.type == "cuda" else 64, **launch_options(8),
        )  # fmt: skip

    def _make_attention_scratch(self, blocks: list[Block]) -> tuple[Tensor, Tensor, Tensor]:
        """Partial sums, their maxima and totals, and counters for the largest layer (see `triton_attention.attend`)."""
        cells = pairs = 0
        for block in blocks:
            if block.layer.has_attention:
                rows, _ = self._padded(block)
                cells = max(cells, block.layer.num_kv_heads * rows)
                pairs = max(pairs, block.layer.num_kv_heads)
        width = max(16, 1 << (self.config.head_dim - 1).bit_length())
        partial = torch.empty(self.batch * cells * _SPLITS * width, dtype=torch.float32, device=self.device)
        stats = torch.empty(self.batch * cells * _SPLITS * 2, dtype=torch.float32, device=self.device)
        return partial, stats, torch.zeros(self.batch * pairs, dtype=torch.int32, device=self.device)

    def _padded(self, block: Block) -> tuple[int, int]:
        """Query heads of a group and the head size, as the tensor cores take them."""
        group = block.layer.num_heads // block.layer.num_kv_heads
        return tuple(max(16, 1 << (n - 1).bit_length()) for n in (group, self.config.head_dim))  # type: ignore[return-value]

    def _attend(self, block: Block, qkv: Tensor, heads: Tensor) -> Callable[[], None]:
        layer, size = block.layer, self.config.head_dim
        pair = self.cache.layers[block.index]
        assert pair is not None
        (keys, values), (cos, sin) = pair, self._cos_sin
        gains, eps = [qkv, qkv], 0.0
        if self.config.qk_norm:
            norms = [norm for n in ("q_norm", "k_norm") if isinstance(norm := block.norms[n], Norm)]
            gains, eps = [norm.weight for norm in norms], norms[0].eps
        rows, width = self._padded(block)
        partial, stats, arrived = self._attention_scratch

        kernels = triton_backend.load_kernels("triton_attention")

        def launch() -> None:
            kernels.attend[(self.batch * layer.num_kv_heads, _SPLITS)](
                qkv, *gains, cos, sin, keys, values, self.position, heads, partial, stats, arrived,
                layer.num_heads, layer.num_kv_heads, size, self.cache.capacity, layer.sliding_window or 0,
                qkv.stride(0), heads.stride(0), eps, size**-0.5,
                QK_NORM=self.config.qk_norm, HEADS_A_GROUP=layer.num_heads // layer.num_kv_heads, R=rows, D=width,
                S=_SLOTS, SPLITS=_SPLITS, SHORTEST=_SHORTEST, **launch_options(4),
            )  # fmt: skip

        return launch


def _linears(block: Block) -> dict[str, Linear]:
    return {role: linear for role, linear in block.linears.items() if isinstance(linear, Linear)}


def _kept_bias(linear: Linear) -> Tensor | None:
    """The bias of the rows that are there."""
    if linear.bias is None or linear.output_index is None:
        return linear.bias
    return linear.bias[linear.output_index]
