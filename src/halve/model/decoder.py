"""One decoder for every family and every width: compression, evaluation and generation all run it.

Shape legend: B batch, T tokens of this pass, S cache slots, D hidden size, H query heads, K key/value heads,
h head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve.model import wiring
from halve.model.cache import KVCache
from halve.model.config import LayerConfig, ModelConfig
from halve.model.linear import Linear
from halve.model.rotary import Rotary, query_growth
from halve.model.vocabulary_share import VocabularyShare
from halve.model.wiring import ATTENTION, SUBLAYERS, Sublayer
from halve.ranks.collective import ALONE, Ranks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last dimension."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str, size: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kind, self.shape = weight, bias, eps, kind, (size,)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            if self.weight is not None and self.weight.dtype != x.dtype:  # one that the dtype of x could not hold
                return functional.rms_norm(x.float(), self.shape, self.weight, self.eps).type_as(x)
            return functional.rms_norm(x, self.shape, self.weight, self.eps)
        if self.weight is not None and self.weight.dtype != x.dtype:
            return functional.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps).type_as(x)
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Span:
    """Where the T tokens of one pass stand: positions, rotary tables, masks. Shared by all layers."""

    def __init__(
        self,
        rotaries: Sequence[Rotary],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        cache: KVCache | None = None,
    ) -> None:
        self.tokens, self.cache, self.device = tokens, cache, device
        start = 0 if cache is None else cache.lengths
        self.start = start
        self.end = tokens + (0 if cache is None else cache.end)
        steps = torch.arange(tokens, device=device)
        self.positions = steps + start if isinstance(start, int) else steps + start.unsqueeze(1)  # [T] or [B, T]
        tables = [rotary.tables(self.end, dtype, rotary.long(self.end)) for rotary in rotaries]
        self._turns = [tuple(table[self.positions].unsqueeze(-3) for table in pair) for pair in tables]
        self._neighbours = [rotary.config.neighbours for rotary in rotaries]
        growths = [query_growth(rotary.config, self.positions) for rotary in rotaries]
        self._growths = [None if growth is None else growth.to(dtype)[..., None, :, None] for growth in growths]
        self._masks: dict[int | None, Tensor | None] = {}

    def rotate(self, x_BHTh: Tensor, rope: int, queries: bool) -> Tensor:
        """One of the rotary embeddings of queries or keys, in the half-split form of the Hugging Face checkpoints."""
        cos, sin = self._turns[rope]
        x, left = x_BHTh.split((cos.shape[-1], x_BHTh.shape[-1] - cos.shape[-1]), dim=-1)
        if self._neighbours[rope]:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        low, high = x.chunk(2, dim=-1)
        x = x * cos + torch.cat((-high, low), dim=-1) * sin
        if self._neighbours[rope]:
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        x = torch.cat((x, left), dim=-1) if left.shape[-1] else x
        growth = self._growths[rope]
        return x * growth if queries and growth is not None else x

    def plain_causal(self, window: int | None) -> bool:
        """True when the mask is the square causal one."""
        return self.end == self.tokens and isinstance(self.start, int) and (window is None or self.tokens <= window)

    def mask(self, window: int | None) -> Tensor | None:
        """Boolean mask [T, S] or [B, 1, T, S] over the live slots; None when every query sees all of them."""
        if window not in self._masks:
            one_row = self.tokens == 1 and isinstance(self.start, int)
            if one_row and (window is None or self.end <= window):
                self._masks[window] = None
            else:
                slots, query = torch.arange(self.end, device=self.device), self.positions.unsqueeze(-1)
                seen = slots <= query
                if window is not None:
                    seen &= slots > query - window
                self._masks[window] = seen if seen.dim() == 2 else seen.unsqueeze(1)
        return self._masks[window]


class Halt(NamedTuple):
    """Where a block halts: the input of its next linears, and the stream that their sublayer will be added to."""

    input: Tensor
    stream: Tensor


class Block(nn.Module):
    """One layer. Absent sublayers are None; q/k/v and gate/up may be merged into one matmul (`merge_siblings`).

    On one of several `ranks` it has some of the heads and channels, and what sublayers write is added up.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        index: int,
        linears: dict[str, Linear],
        norms: dict[str, Norm],
    ) -> None:
        super().__init__()
        self.config, self.layer, self.index = config, layer, index
        self.ranks: Ranks = ALONE
        self.linears = nn.ModuleDict(linears)
        self.norms = nn.ModuleDict(norms)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor, span: Span) -> Tensor:
        return run_to_end(self.stages(x_BTD, span))

    def stage_roles(self) -> list[tuple[str, ...]]:
        """The linears that read one input, in the order they run (siblings not merged)."""
        return wiring.stages(self.config, self.layer)

    def stages(self, x_BTD: Tensor, span: Span) -> Generator[Halt, None, Tensor]:
        """`forward`, halting before each of `stage_roles`; a linear replaced then is what runs."""
        for sublayer in SUBLAYERS.values():
            if not sublayer.units(self.layer):
                continue
            x = self.read(sublayer, x_BTD)
            yield Halt(x, x_BTD)
            x = self._heads(x, span) if sublayer is ATTENTION else self._hidden(x)
            yield Halt(x, x_BTD)
            x_BTD = self.written(sublayer, x_BTD, self.ranks.add(self.linears[sublayer.writer](x)))
        return x_BTD

    def read(self, sublayer: Sublayer, stream: Tensor) -> Tensor:
        """What a sublayer reads of the stream before it."""
        return self.norms[sublayer.norm](stream) if self.config.norm_input else stream

    def written(self, sublayer: Sublayer, stream: Tensor, output: Tensor) -> Tensor:
        """The stream after a sublayer, of that before it and the output of its last linear."""
        x = self.norms[sublayer.output_norm](output) if self.config.norm_output else output
        x = stream + (x if self.config.residual_scale == 1 else x * self.config.residual_scale)
        return self.norms[sublayer.norm](x) if self.config.norm_sum else x

    def only(self, sublayers: Collection[str]) -> Block:
        """The block with those of its sublayers that are named, sharing the weights. One after the other they are the block."""
        layer = self.layer
        for name, sublayer in SUBLAYERS.items():
            if name not in sublayers:
                layer = sublayer.resized(layer, 0)
        linears = {role: linear for role, linear in self.linears.items() if isinstance(linear, Linear)}
        norms = {role: norm for role, norm in self.norms.items() if isinstance(norm, Norm)}
        block = Block(self.config, layer, self.index, linears, norms)
        block.ranks = self.ranks
        return block

    def _heads(self, x: Tensor, span: Span) -> Tensor:
        layer, size = self.layer, self.config.head_dim
        batch, tokens, _ = x.shape
        if "qkv_proj" in self.linears:
            widths = [layer.num_heads * size, layer.num_kv_heads * size, layer.num_kv_heads * size]
            q, k, v = self.linears["qkv_proj"](x).split(widths, dim=-1)
        else:
            q, k, v = (self.linears[name](x) for name in ("q_proj", "k_proj", "v_proj"))
        if self.config.qk_norm_whole:
            q, k = (whole_norm(self.norms[name], t, self.ranks) for name, t in (("q_norm", q), ("k_norm", k)))
        q, k, v = (t.view(batch, tokens, -1, size).transpose(1, 2) for t in (q, k, v))
        if self.config.qk_norm and not self.config.qk_norm_whole:
            q, k = self.norms["q_norm"](q), self.norms["k_norm"](k)
        if layer.rope is not None:
            q, k = span.rotate(q, layer.rope, queries=True), span.rotate(k, layer.rope, queries=False)
        if span.cache is not None:
            k, v = span.cache.store(self.index, k, v, span.positions, span.end)
        y = attend(q, k, v, span, layer.sliding_window, self.config.attention_scale, self.config.attention_cap)
        return y.transpose(1, 2).reshape(batch, tokens, -1)

    def _hidden(self, x: Tensor) -> Tensor:
        if "gate_up_proj" in self.linears:
            gate, up = self.linears["gate_up_proj"](x).chunk(2, dim=-1)
            return self.activation(gate).mul_(up)
        if self.config.gated:
            return self.activation(self.linears["gate_proj"](x)).mul_(self.linears["up_proj"](x))
        return self.activation(self.linears["up_proj"](x))

    @property
    def nbytes(self) -> int:
        norms = [n for n in self.norms.values() if isinstance(n, Norm)]
        total = sum(t.nbytes for n in norms for t in (n.weight, n.bias) if t is not None)
        return total + sum(linear.nbytes for linear in self.linears.values() if isinstance(linear, Linear))


def whole_norm(norm: nn.Module, x: Tensor, ranks: Ranks) -> Tensor:
    """RMSNorm over the channels of all ranks, of which `x` and the norm's weight are this one's."""
    if ranks.size == 1:
        return norm(x)
    assert isinstance(norm, Norm) and norm.weight is not None
    squares = ranks.add(x.float().pow(2).sum(-1, keepdim=True))
    return (x * torch.rsqrt(squares / (x.shape[-1] * ranks.size) + norm.eps) * norm.weight).type_as(x)


def run_to_end(stages: Generator[Halt, None, Tensor]) -> Tensor:
    """What `Block.stages` returns, from wherever it halted."""
    while True:
        try:
            next(stages)
        except StopIteration as stop:
            return stop.value


def attend(
    q_BHTh: Tensor,
    k_BKSh: Tensor,
    v_BKSh: Tensor,
    span: Span,
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Grouped-query causal attention -> [B, H, T, h]; `scale` and `cap` as in a ModelConfig."""
    batch, heads, tokens, size = q_BHTh.shape
    groups = k_BKSh.shape[1]
    if cap is not None:
        q = q_BHTh.reshape(batch, groups, heads // groups, tokens, size) * (size**-0.5 if scale is None else scale)
        scores = capped(q @ k_BKSh.unsqueeze(2).transpose(-1, -2), cap)
        mask = span.mask(window)
        if mask is not None:
            scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask.unsqueeze(2)), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ v_BKSh.unsqueeze(2)).view(q_BHTh.shape)
    if tokens == 1:
        # one query: its heads that share keys become rows of one product, so keys are never repeated
        mask = span.mask(window)
        q = q_BHTh.reshape(batch, groups, heads // groups, size)
        y = functional.scaled_dot_product_attention(q, k_BKSh, v_BKSh, attn_mask=mask, scale=scale)
        return y.view(q_BHTh.shape)
    causal = span.plain_causal(window)
    mask = None if causal else span.mask(window)
    return functional.scaled_dot_product_attention(
        q_BHTh, k_BKSh, v_BKSh, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    )


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)"""
    return torch.tanh(x / cap) * cap


class Model(nn.Module):
    """Embedding, blocks, final norm, head. Built by `halve.load_model`; holds no gradient.

    The embedding is the rows of `table`, looked up by token; a tied head is that very linear.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        table: Linear,
        blocks: list[Block],
        final_norm: Norm | None,
        head: Linear,
        positions: Tensor | None = None,
        project_in: Linear | None = None,
        project_out: Linear | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.table, self.positions = config, dtype, table, positions
        self.ranks, self.vocabulary = ranks, VocabularyShare(ranks, config.vocab_size)
        self.read_bytes: int | None = None  # of the files, where that is not all they hold
        self.blocks = nn.ModuleList(blocks)
        self.final_norm, self.head = final_norm, head
        self.project_in, self.project_out = project_in, project_out
        self.rotaries = make_rotaries(config, self.device)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        return KVCache(self.config, batch, capacity, self.dtype, self.device)

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads, [B, T, embed size]. With a cache, tokens continue it and its lengths grow by T.

        Where they take the longest row beyond the length up to which its keys hold, the cache is made again first.
        """
        if cache is None or not cache.outgrown(tokens_BT):
            return self._hidden(tokens_BT, cache)
        assert cache.tokens is not None
        lengths, positions, rows = cache.lengths, cache.positions(tokens_BT.shape[1]), len(tokens_BT)
        whole, cache.lengths = cache.tokens[:, : cache.end + tokens_BT.shape[1]], 0
        hidden = self._hidden(whole, cache)
        cache.lengths = lengths + tokens_BT.shape[1]
        return hidden[torch.arange(rows, device=hidden.device).unsqueeze(1), positions]

    def _hidden(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        span = Span(self.rotaries, tokens_BT.shape[1], self.dtype, self.device, cache)
        x = self.vocabulary.embed(tokens_BT, self.table, self.dtype)
        x = place_embeddings(self.config, x, span, self.positions, self.project_in)
        for block in self.blocks:
            x = block(x, span)
        if cache is not None:
            cache.lengths = cache.lengths + tokens_BT.shape[1]
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] in the model's dtype."""
        return self.logits(self.hidden(tokens_BT, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of what `hidden` returned."""
        return self.vocabulary.join(self.own_logits(hidden))

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Of all logits those of this rank's tokens, `vocabulary.own`."""
        return finish_logits(self.config, self.head(hidden))

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """(role path, layer) of every linear, the head last."""
        for block in self.blocks:
            assert isinstance(block, Block)
            for role, linear in block.linears.items():
                assert isinstance(linear, Linear)
                yield f"layers.{block.index}.{role}", linear
        yield "lm_head", self.head

    def weight_bytes(self) -> int:
        """Bytes of all tensors; a tied head counts once."""
        tensors = [self.positions]
        if self.final_norm is not None:
            tensors += [self.final_norm.weight, self.final_norm.bias]
        total = self.table.nbytes + sum(t.nbytes for t in tensors if t is not None)
        total += sum(b.nbytes for b in self.blocks if isinstance(b, Block))
        total += sum(p.nbytes for p in (self.project_in, self.project_out) if p is not None)
        return total if self.head is self.table else total + self.head.nbytes

    def step_bytes(self) -> int:
        """Bytes one decode step has to read: all weights, of the embedding and position tables one row each."""
        table = self.table.nbytes
        total = self.weight_bytes() - (0 if self.head is self.table else table) + table // self.table.out_features
        return total if self.positions is None else total - self.positions.nbytes + self.positions[0].nbytes


def make_rotaries(config: ModelConfig, device: torch.device | str) -> list[Rotary]:
    """The rotary tables of a model, none when it has learned positions."""
    return [Rotary(rope, config.head_dim, config.max_positions, device) for rope in config.ropes]


def embed_scale(config: ModelConfig, dtype: torch.dtype) -> float:
    """What embeddings of a dtype are multiplied by."""
    return float(torch.tensor(config.embed_scale, dtype=dtype)) if config.embed_scale_rounded else config.embed_scale


def finish_logits(config: ModelConfig, head_output: Tensor) -> Tensor:
    """The logits, of what the output head computed."""
    logits = head_output if config.logit_divisor == 1 else head_output / config.logit_divisor
    return logits if config.logit_cap is None else capped(logits, config.logit_cap)


def place_embeddings(
    config: ModelConfig, x: Tensor, span: Span, positions: Tensor | None, project_in: Linear | None
) -> Tensor:
    """Input of the first block, [B, T, D], of the rows of the embedding."""
    if config.embed_scale != 1:
        x = x * embed_scale(config, x.dtype)
    if project_in is not None:
        x = project_in(x)
    return x if positions is None else x + functional.embedding(span.positions + config.position_offset, positions)
