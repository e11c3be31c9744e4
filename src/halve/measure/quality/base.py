"""The base of a comparison: the model that others were made from, at hand or as a file of its predictions.

`BaseComparison.run` puts one batch of an evaluation through a model and its base and gives, item by item (a sequence of text,
a question), the log-probabilities that both give and the divergence at every position where something was predicted.
Shape legend: N positions of a batch in the order of `Layout`, T targets, D hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halve.decode.text_stream import TokenizerLike
from halve.errors import HalveError
from halve.measure.quality.base_file import BaseFile, BaseWriter, KeptItem
from halve.measure.quality.divergence import Distribution, diverge, log_softmax
from halve.measure.quality.resume import fingerprint
from halve.measure.quality.scoring import Node, passes, positions_at_a_time, reduced_at_a_time, stretches
from halve.model.decoder import Model
from halve.model.vocabulary import check_finite

Encode = Callable[[TokenizerLike], Iterable[Sequence[int]]]  # every sequence of an evaluation


@dataclass(frozen=True)
class Asked:
    """What both models were asked: the same, or nothing can be compared."""

    task: str
    protocol: str
    template: str | None
    data_sha256: str
    vocabulary: int
    tokens_sha256: str
    longest: int  # tokens of the longest sequence

    @classmethod
    def of(
        cls,
        task: str,
        protocol: str,
        template: str | None,
        data_sha256: str,
        sequences: Collection[Sequence[int]],
        model: Model,
    ) -> Asked:
        longest = max(map(len, sequences), default=0)
        vocabulary = model.config.vocab_size
        return cls(task, protocol, template, data_sha256, vocabulary, tokens_sha256(sequences), longest)


def tokens_sha256(sequences: Iterable[Sequence[int]]) -> str:
    """Of all token sequences and where each ends."""
    digest = hashlib.sha256()
    for tokens in sequences:
        digest.update(torch.tensor([len(tokens), *tokens], dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Layout:
    """Where the predictions of a batch are made, the positions of an item together.

    places: (node, offset within its tokens) of each position. targets: (position, token, slot), in the order of their
    positions. items: the stretches of positions and of targets of each item.
    """

    places: list[tuple[Node, int]]
    targets: list[tuple[int, int, int]]
    items: dict[str, tuple[slice, slice]]

    @classmethod
    def of(cls, roots: Sequence[Node], item_of_slot: Sequence[str]) -> Layout:
        """The positions of trees whose targets' slots belong to these items.

        What an item asks after the same tokens is one position, on however many branches of the tree they lie.
        """
        by_item: dict[str, dict[tuple[int, int], tuple[Node, list[int], list[tuple[int, int]]]]] = {}
        for node, before in _nodes(roots, []):
            for offset, token, slot in node.targets:
                places = by_item.setdefault(item_of_slot[slot], {})
                places.setdefault((id(node), offset), (node, before, []))[2].append((token, slot))
        layout = cls([], [], {})
        for item, places in by_item.items():
            first, first_target = len(layout.places), len(layout.targets)
            several = len({node for node, _ in places}) > 1
            seen: dict[Hashable, int] = {}
            for place, (node, before, predicted) in places.items():
                offset = place[1]
                asked_after = (*before, *node.tokens[: offset + 1]) if several else place
                position = seen.setdefault(asked_after, len(layout.places))
                if position == len(layout.places):
                    layout.places.append((node, offset))
                layout.targets.extend((position, token, slot) for token, slot in predicted)
            layout.targets[first_target:] = sorted(layout.targets[first_target:], key=lambda target: target[0])
            layout.items[item] = slice(first, len(layout.places)), slice(first_target, len(layout.targets))
        return layout

    def targets_of(self, item: str) -> list[tuple[int, int]]:
        """(position within the item, token) of each of its targets."""
        positions, own = self.items[item]
        return [(position - positions.start, token) for position, token, _ in self.targets[own]]

    def hidden(self, model: Model, roots: Sequence[Node], batch_tokens: int) -> Tensor:
        """The model's hidden states at every position [N, D]."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for position, (node, offset) in enumerate(self.places):
            wanted.setdefault(id(node), []).append((position, offset))
        states: Tensor | None = None
        for nodes, hidden_RTD in passes(model, roots, batch_tokens):
            entries = [(p, row, offset) for row, node in enumerate(nodes) for p, offset in wanted.get(id(node), ())]
            if entries:
                positions, rows, offsets = torch.tensor(entries, device=hidden_RTD.device).T
                if states is None:
                    states = hidden_RTD.new_empty(len(self.places), hidden_RTD.shape[2])
                states[positions] = hidden_RTD[rows, offsets]
        assert states is not None
        return states


def _nodes(roots: Sequence[Node], before: list[int]) -> Iterator[tuple[Node, list[int]]]:
    """Every node with the tokens that it continues."""
    for node in roots:
        yield node, before
        if node.children:
            yield from _nodes(node.children, [*before, *node.tokens])


class Distributions(Protocol):
    """Those of a stretch of positions, of which some at a time are asked for."""

    def __getitem__(self, part: slice) -> Distribution: ...


@dataclass(frozen=True)
class Logits:
    """What a model gives for a stretch of positions, [N, V]."""

    values: Tensor

    def __getitem__(self, part: slice) -> Distribution:
        return Distribution(log_softmax(self.values[part].float()))


@dataclass(frozen=True)
class Predictions:
    """of: the distributions of a stretch of positions. log_probs: float64 of all targets, where they are known apart."""

    of: Callable[[slice], Distributions]
    log_probs: Tensor | None = None


BY_POSITION = ("kl", "same_top", "acceptance")
BY_TARGET = ("log_probs", "base_log_probs")


class Base(Protocol):
    """What models are compared with. `about`: for records, and to tell runs apart."""

    about: dict[str, Any]

    def check(self, asked: Asked, encode: Encode) -> None:
        """HalveError unless the base reads the same tokens of the same vocabulary and was asked the same."""
        ...

    def predict(self, layout: Layout, roots: Sequence[Node], batch_tokens: int) -> Predictions:
        """What it predicts at the positions of a batch."""
        ...


class ModelBase:
    """A model in memory."""

    def __init__(self, name: str, model: Model, tokenizer: TokenizerLike, recipe: list[Any]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        dtype = str(model.dtype).removeprefix("torch.")
        self.about = {"model": name, "fingerprint": fingerprint(model), "dtype": dtype, "recipe": recipe, "kept": None}

    def check(self, asked: Asked, encode: Encode) -> None:
        name, config = self.about["model"], self._model.config
        if config.vocab_size != asked.vocabulary:
            raise HalveError(
                f"base {name}: has a vocabulary of {config.vocab_size} tokens, the model one of {asked.vocabulary}: "
                "compare a model with the one it was made from"
            )
        if asked.longest > config.max_positions:
            raise HalveError(
                f"base {name}: its context of {config.max_positions} tokens does not hold the {asked.longest} asked: "
                "give a smaller --window"
            )
        if tokens_sha256(encode(self._tokenizer)) != asked.tokens_sha256:
            raise HalveError(
                f"base {name}: its tokenizer makes other tokens of the text than the model's: "
                "compare a model with the one it was made from"
            )

    def predict(self, layout: Layout, roots: Sequence[Node], batch_tokens: int) -> Predictions:
        hidden = layout.hidden(self._model, roots, batch_tokens)
        return Predictions(lambda part: Logits(self._model.logits(hidden[part])))


class FileBase:
    """The predictions of a model that were kept: see base_file.py."""

    def __init__(self, path: Path) -> None:
        self._file = BaseFile(path)
        self.about = self._file.about

    def check(self, asked: Asked, encode: Encode) -> None:
        kept = self._file.asked
        words = {"data_sha256": "another text", "tokens_sha256": "other tokens (another tokenizer, window or limit)"}
        for key, value in asdict(asked).items():
            if kept.get(key) != value:
                what = words.get(key, f"another {key} ('{kept.get(key)}', the request's is '{value}')")
                raise HalveError(f"{self._file.path}: is a base of {what}: make one for this request with --save-base")

    def predict(self, layout: Layout, roots: Sequence[Node], batch_tokens: int) -> Predictions:
        vocabulary = self._file.asked["vocabulary"]
        kept = [self._file.read(item, layout.targets_of(item), vocabulary) for item in layout.items]
        top = Distribution.cat([item.top for item in kept])
        return Predictions(lambda part: top[part], torch.cat([item.log_probs for item in kept]))


class BaseComparison:
    """Puts batches through a model and its base. With a writer the base's predictions are kept (the model's own where
    there is no base), and `gaps` gathers by how much KL from what is kept falls short of KL from whole distributions."""

    def __init__(self, base: Base | None, writer: BaseWriter | None = None) -> None:
        self._base = base
        self._writer = writer
        self.gaps: list[float] = []

    @property
    def about(self) -> dict[str, Any]:
        """Of the base, for records and to tell runs apart."""
        return self._base.about if self._base else {}

    @property
    def compares(self) -> bool:
        """Whether there is a base: without one, predictions are only kept."""
        return self._base is not None

    def begin(self, asked: Asked, encode: Encode) -> None:
        """Before the first batch: HalveError unless the base was asked the same; `encode` makes all sequences."""
        if self._base is not None:
            self._base.check(asked, encode)
        self.asked = asked

    def figures(self) -> dict[str, Any]:
        """What a record says of the base."""
        if self._base is None:
            return {}
        gaps = self.gaps
        gap = (
            {"tokens": self._writer.count, "mean": math.fsum(gaps) / len(gaps), "max": max(gaps)}
            if self._writer
            else None
        )
        return {"base": self.about, "kl_gap_of_kept_tokens": gap}

    def run(
        self, model: Model, roots: Sequence[Node], item_of_slot: Sequence[str], batch_tokens: int
    ) -> dict[str, dict[str, list[Any]]]:
        """By item, lists that JSON takes: `kl`, `same_top`, `acceptance` of its positions, `slots`, `log_probs`,
        `base_log_probs` of its targets; without a base, `slots` and `log_probs`. Raises HalveError for logits that are
        not finite, and what a damaged base raises."""
        layout = Layout.of(roots, item_of_slot)
        targets = torch.tensor(layout.targets)
        with torch.inference_mode():
            hidden = layout.hidden(model, roots, batch_tokens)
            predictions = self._base.predict(layout, roots, batch_tokens) if self._base else None
            parts = []
            for stretch in stretches(len(hidden), positions_at_a_time(model)):
                logits = Logits(model.logits(hidden[stretch]))
                base = predictions.of(stretch) if predictions else None
                for few in reduced_at_a_time(logits.values):
                    own = logits[few]
                    other = base[few] if base is not None else None
                    first = stretch.start + few.start
                    asked = (targets[:, 0] >= first) & (targets[:, 0] < stretch.start + few.stop)
                    at = (targets[asked, 0] - first).to(hidden.device), targets[asked, 1].to(hidden.device)
                    known = predictions.log_probs[asked] if predictions and predictions.log_probs is not None else None
                    parts.append(self._figures(own, at, other, known))
        columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        check_finite(columns["log_probs"] + columns.get("base_log_probs", 0))
        if self._writer:
            _keep(self._writer, layout, columns)
        rows: dict[str, dict[str, list[Any]]] = {}
        for item, (positions, own_targets) in layout.items.items():
            rows[item] = {"slots": targets[own_targets, 2].tolist()}
            for keys, part in ((BY_POSITION, positions), (BY_TARGET, own_targets)):
                rows[item] |= {key: columns[key][part].tolist() for key in keys if key in columns}
        return rows

    def _figures(
        self, own: Distribution, at: tuple[Tensor, Tensor], base: Distribution | None, known: Tensor | None
    ) -> dict[str, Tensor]:
        """Of a few positions, the model's and the base's, and of their targets, found `at` (position, token); `known`: the
        base's log-probabilities of those, where it holds them apart."""
        log_probs = own.log_probs
        columns = {"log_probs": log_probs[at].double().cpu()}
        if base is not None:
            columns["base_log_probs"] = base.log_probs[at].double().cpu() if known is None else known
            columns |= vars(diverge(base, log_probs))
        if self._writer is not None:
            top = (base or own).kept(self._writer.count)
            columns |= {f"top_{name}": tensor.cpu() for name, tensor in vars(top).items()}
            if base is not None:
                self.gaps += (columns["kl"] - diverge(top, log_probs).kl).tolist()
        return columns


def _keep(writer: BaseWriter, layout: Layout, columns: dict[str, Tensor]) -> None:
    log_probs = columns.get("base_log_probs", columns["log_probs"])
    for item, (positions, own_targets) in layout.items.items():
        top = Distribution(*(columns[f"top_{name}"][positions] for name in ("log_probs", "tokens", "tail")))
        writer.add(item, KeptItem(top, log_probs[own_targets]), layout.targets_of(item))
