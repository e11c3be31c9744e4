"""Trains the bundled reader: a small Llama-form model that looks things up in generated stories.

    python -m halve.demo.train --out DIR

One file from the curriculum to the exported Hugging Face folder. Every batch follows from (seed, step) alone, so a run
that is stopped and started again with the same command goes on where its last checkpoint was and sees the same texts.
Shapes: B documents, T tokens, D hidden, V vocabulary, H query heads, K key/value heads, E head size.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tools.reader import exam, stories
from tools.reader.tokens import BOS, EOS, PAD, token_ids

UNMARKED_WEIGHT = 0.1  # the facts of a story are random; their loss would drown that of what can be looked up


@dataclass(frozen=True)
class ReaderConfig:
    """The model's shape, under the names of Hugging Face's LlamaConfig."""

    vocab_size: int = 768
    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 384
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum, until step `until`.

    Its stories have up to `people` people and use the share `variety` of the sentence forms; `mixture` weighs the kinds
    of text; `rate` multiplies the learning rates.
    """

    name: str
    until: int
    people: int
    variety: float
    mixture: dict[str, float]
    rate: float = 1.0


WARM_UP = {"repeat": 0.8, "pick": 0.2}
FIRST = {"repeat": 0.05, "pick": 0.08, "story": 0.42, "words": 0.4, "letters": 0.05}
LINKS = {"repeat": 0.1, "pick": 0.05, "links": 0.5, "story": 0.2, "words": 0.15}
EARLY = {"repeat": 0.03, "links": 0.22, "story": 0.38, "words": 0.37}
LATE = {"repeat": 0.02, "pick": 0.02, "links": 0.06, "story": 0.4, "stories": 0.04, "words": 0.46}
LETTERS = {"pick": 0.04, "story": 0.28, "stories": 0.03, "words": 0.3, "letters": 0.35}
CURRICULUM = (  # the last phase goes on to the end
    Phase("sequences", 704, 1, 0.0, WARM_UP),
    Phase("one person", 1000, 1, 0.4, FIRST),
    Phase("links", 1400, 2, 0.2, LINKS, rate=0.3),
    Phase("three people", 1504, 3, 0.3, EARLY, rate=0.3),
    Phase("four people", 1704, 4, 1.0, LATE, rate=0.3),
    Phase("six people", 2304, stories.MAX_PEOPLE, 1.0, LATE, rate=0.3),
    Phase("letters", 2704, stories.MAX_PEOPLE, 1.0, LETTERS, rate=0.3),
    Phase("answers", 3000, stories.MAX_PEOPLE, 1.0, LATE, rate=0.3),
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights besides the model's shape and the code."""

    seed: int = 20
    n_steps: int = 3000
    rise_steps: int = 100
    decay_steps: int = 300
    tokens_per_step: int = 3072
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    eval_every: int = 200
    checkpoint_every: int = 100
    curriculum: tuple[Phase, ...] = CURRICULUM

    def __post_init__(self):
        if not 0 < self.decay_steps <= self.n_steps:
            raise ValueError(f"decay_steps is {self.decay_steps}; it must lie between 1 and n_steps ({self.n_steps})")

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        return next((phase for phase in self.curriculum if step < phase.until), self.curriculum[-1])


# ---------------------------------------------------------------- the model


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split layout."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


class Attention(nn.Module):
    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2) for project in projections)
        q, k = rotate(q, cos_TE, sin_TE), rotate(k, cos_TE, sin_TE)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y_BHTE = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y_BHTE.transpose(1, 2).reshape(B, T, -1))


class Mlp(nn.Module):
    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Reader(nn.Module):
    """A Llama-form decoder with a tied head; its state dict, prefixed with "model.", is Hugging Face's."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(torch.arange(config.max_position_embeddings), config.rope_theta**-exponents)
        self.register_buffer("cos_TE", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin_TE", torch.cat((angles, angles), dim=-1).sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
                nn.init.normal_(parameter, std=scale * (0.02 if "embed" in name else parameter.shape[1] ** -0.5))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token at every position."""
        T = ids_BT.shape[1]
        assert isinstance(self.cos_TE, Tensor) and isinstance(self.sin_TE, Tensor)
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.cos_TE[:T], self.sin_TE[:T])
        return functional.linear(self.norm(x_BTD), self.embed_tokens.weight)


# ---------------------------------------------------------------- texts to batches


def encode(marked: str, ids: dict[str, int]) -> tuple[list[int], list[float]]:
    """Ids with BOS and EOS, and the loss weight of predicting each of them."""
    tokens = stories.split_marked(marked)
    weights = [1.0 if looked_up else UNMARKED_WEIGHT for _, looked_up in tokens]
    return [BOS, *(ids[t] for t, _ in tokens), EOS], [0.0, *weights, UNMARKED_WEIGHT]


def draw_text(rng: random.Random, phase: Phase) -> str:
    """One marked training text of the phase."""
    kind = rng.choices(list(phase.mixture), weights=list(phase.mixture.values()))[0]
    if kind in stories.WARM_UPS:
        return stories.WARM_UPS[kind](rng)
    n_people = max(rng.randint(1, phase.people), rng.randint(1, phase.people))
    return stories.TEXTS[kind](rng, n_people, "train", phase.variety)


BATCHES_PER_POOL = 8


def draw_pool(train: TrainConfig, pool: int, ids: dict[str, int]) -> list[tuple[Tensor, Tensor]]:
    """Up to `BATCHES_PER_POOL` batches (ids [B, T], weights [B, T]) of documents of similar length, in random order."""
    rng = random.Random(f"{train.seed}/{pool}")
    phase = train.phase(pool * BATCHES_PER_POOL)
    documents, n_tokens = [], 0
    while n_tokens < BATCHES_PER_POOL * train.tokens_per_step:
        documents.append(encode(draw_text(rng, phase), ids))
        n_tokens += len(documents[-1][0])
    documents.sort(key=lambda d: len(d[0]))
    batches, group, group_tokens = [], [], 0
    for document in documents:
        group.append(document)
        group_tokens += len(document[0])
        if group_tokens >= n_tokens / BATCHES_PER_POOL and len(batches) < BATCHES_PER_POOL - 1:
            batches.append(_pad(group))
            group, group_tokens = [], 0
    if group:
        batches.append(_pad(group))
    rng.shuffle(batches)
    return batches


def _pad(documents: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in documents)
    ids_BT = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in documents])
    weights_BT = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in documents])
    return ids_BT, weights_BT


# ---------------------------------------------------------------- the optimizer


def orthogonalize(update_NRC: Tensor, n_iterations: int = 5) -> Tensor:
    """A stack of matrices brought near their closest semi-orthogonal ones by a quintic Newton-Schulz iteration.

    Muon, https://kellerjordan.github.io/posts/muon/ : X <- aX + (bA + cA^2)X with A = XX^T.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = update_NRC.shape[-2] > update_NRC.shape[-1]
    x = update_NRC.mT if wide else update_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class Muon:
    """Momentum whose update of every matrix is orthogonalized; matrices of one shape are handled as one stack."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95):
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            scale = lr * max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for parameter, matrix in zip(group, update, strict=True):
                parameter.mul_(1 - lr * weight_decay).sub_(scale * matrix)


def learning_rate_factor(step: int, train: TrainConfig) -> float:
    """Rises over `rise_steps`, stays, falls linearly to 0.02 over the last `decay_steps`; times the phase's rate."""
    rise = min(1.0, (step + 1) / train.rise_steps)
    fall = min(1.0, (train.n_steps - step) / train.decay_steps)
    return train.phase(step).rate * rise * max(0.02, fall)


# ---------------------------------------------------------------- checkpoints and the run


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)` and moves the result into place, so that `path` is never half written."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """A run's state: step, tokens_seen, reader (the shape), model, muon, adam."""
    return torch.load(path, weights_only=True)


class Run:
    """A training run in a folder: the model, its optimizers, the step reached and the log."""

    def __init__(self, out: Path, reader: ReaderConfig, train: TrainConfig, weights: Path | None = None):
        self.out, self.train, self.step, self.tokens_seen = out, train, 0, 0
        self.checkpoint, self.log_path = out / "checkpoint.pt", out / "train_log.jsonl"
        torch.manual_seed(train.seed)
        self.model = Reader(reader)
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=train.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.ids = token_ids()
        self.pool: tuple[int, list] = (-1, [])
        out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load()
        elif weights is not None:
            self._start_from(weights)
        settings = {"reader": dataclasses.asdict(reader), "train": dataclasses.asdict(train)}
        self.log({"event": "start", "torch": torch.__version__, "threads": torch.get_num_threads(), **settings})

    def encode(self, text: str) -> list[int]:
        """The ids of a text without BOS and EOS."""
        return encode(text, self.ids)[0][1:-1]

    def log(self, record: dict) -> None:
        with self.log_path.open("a") as log:
            log.write(json.dumps({"step": self.step, "tokens": self.tokens_seen, **record}) + "\n")

    def save(self) -> None:
        state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "reader": dataclasses.asdict(self.model.config),
            "model": self.model.state_dict(),
            "muon": self.muon.buffers,
            "adam": self.adam.state_dict(),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint)
        if state["reader"] != dataclasses.asdict(self.model.config):
            raise ValueError(f"{self.checkpoint} holds another shape ({state['reader']}); give another --out")
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.model.load_state_dict(state["model"])
        self.muon.buffers = state["muon"]
        self.adam.load_state_dict(state["adam"])

    def _start_from(self, folder: Path) -> None:
        """Takes the weights of an exported folder and the step it was exported at; the optimizers start anew."""
        tensors = {
            name.removeprefix("model."): t.float() for name, t in load_file(folder / "model.safetensors").items()
        }
        self.model.load_state_dict(tensors)
        measured = json.loads((folder / "measured.json").read_text())
        self.step, self.tokens_seen = measured["steps"], measured["tokens"]
        shutil.copyfile(folder / "train_log.jsonl", self.log_path)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The batch of the current step."""
        pool, index = divmod(self.step, BATCHES_PER_POOL)
        if self.pool[0] != pool:
            self.pool = (pool, draw_pool(self.train, pool, self.ids))
        return self.pool[1][index % len(self.pool[1])]

    def train_step(self) -> tuple[float, float]:
        """One update; the mean loss (nats) of the marked and of the other tokens."""
        ids_BT, weights_BT = self.batch()
        logits = self.model(ids_BT[:, :-1]).flatten(0, 1)
        losses = functional.cross_entropy(logits, ids_BT[:, 1:].flatten(), reduction="none")
        weights = weights_BT[:, 1:].flatten()
        self.model.zero_grad(set_to_none=True)
        ((losses * weights).sum() / weights.sum()).backward()
        factor = learning_rate_factor(self.step, self.train)
        self.muon.step(self.train.muon_lr * factor, self.train.weight_decay)
        for group in self.adam.param_groups:
            group["lr"] = self.train.adam_lr * factor
        self.adam.step()
        self.step += 1
        self.tokens_seen += int((weights > 0).sum())
        marked, unmarked = losses.detach()[weights == 1.0], losses.detach()[(weights > 0) & (weights < 1.0)]
        return float(marked.mean()), float(unmarked.mean())

    def until(self, n_steps: int) -> None:
        """Trains up to step `n_steps`, with checkpoints, log lines and examinations on the development split."""
        losses, since = [], time.monotonic()
        while self.step < n_steps:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                means = [round(sum(column) / len(losses), 4) for column in zip(*losses, strict=True)]
                nats = dict(zip(("marked_nats", "unmarked_nats"), means, strict=True))
                self.log({"event": "loss", **nats, "seconds": round(time.monotonic() - since, 1)})
                losses, since = [], time.monotonic()
            if self.step % self.train.checkpoint_every == 0 or self.step == n_steps:
                self.save()
            if self.step % self.train.eval_every == 0 and self.step > self.train.curriculum[0].until:
                self.log({"event": "dev", **exam.examine(self.model, exam.dev_items(), self.encode, BOS)})
                since = time.monotonic()


def options(config: type) -> list[dataclasses.Field]:
    """The fields that the command line sets: the numbers, not the curriculum."""
    return [field for field in dataclasses.fields(config) if field.name != "curriculum"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m halve.demo.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--weights", type=Path, help="an exported folder to go on from, where --out has no checkpoint")
    parser.add_argument("--stop-at", type=int, help="stop at this step (default: at --n-steps)")
    for config in (ReaderConfig, TrainConfig):
        for field in options(config):
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    reader = ReaderConfig(**{field.name: arguments[field.name] for field in options(ReaderConfig)})
    train = TrainConfig(**{field.name: arguments[field.name] for field in options(TrainConfig)})
    run = Run(arguments["out"], reader, train, arguments["weights"])
    run.until(arguments["stop_at"] or train.n_steps)


if __name__ == "__main__":
    main()
