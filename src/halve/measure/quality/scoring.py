"""Log-likelihoods of many token sequences that share prefixes: every shared prefix goes through the model once.

Shape legend: R rows of a batch, T tokens of a pass, N scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from halve.measure.quality.prompts import common_prefix
from halve.model.cache import KVCache
from halve.model.decoder import Model
from halve.model.vocabulary import check_finite

LOGIT_ELEMENTS = 2**24  # float32 logits held at a time: 64 MB, 130 rows of a 128k vocabulary
CACHED_ELEMENTS = 2**19  # of those reduced at a time on a CPU: 2 MB, which stay in its cache
BATCH_TOKENS = 4096  # live cache slots of one batch, padding included


@dataclass
class Node:
    """A stretch of tokens that continues its parent's.

    targets: (offset within `tokens` of the position that predicts, predicted token, slot of the sum it belongs to).
    """

    tokens: Sequence[int]
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)


def sequence_node(tokens: Sequence[int], slot: int, first: int = 1) -> Node:
    """One sequence on its own, its tokens from position `first` on summed into `slot`; the last is only predicted."""
    return Node(tokens[:-1], [(t - 1, tokens[t], slot) for t in range(first, len(tokens))])


Question = tuple[Sequence[Sequence[int]], Sequence[int], int]


def question_nodes(questions: Sequence[Question], limit: float | None = None) -> list[Node]:
    """The prefix tree of one article: article, then its questions, then each question's options.

    A question is (token sequences of its options, where each option starts, slot of its first option). Where a cut to
    the context left options or questions with different beginnings, the tree branches there. Beyond `limit` tokens
    (`ModelConfig.length_limit`) a beginning is another in every text: options of such a question share nothing.
    """
    alone = [q for q in questions if limit is not None and max(map(len, q[0])) - 1 > limit]
    if alone:
        nodes = [
            sequence_node(tokens, slot + index, start)
            for sequences, starts, slot in alone
            for index, (tokens, start) in enumerate(zip(sequences, starts, strict=True))
        ]
        rest = [question for question in questions if question not in alone]
        return nodes + (question_nodes(rest) if rest else [])
    first_option = [sequences[0] for sequences, _, _ in questions]
    # nothing is predicted from the article's own node, so it ends before the token that predicts any option
    shared = min(min(starts) - 1 for _, starts, _ in questions)
    shared = min(shared, *(_shared_by_options(sequences) for sequences, _, _ in questions))
    shared = min(shared, *(common_prefix(first_option[0], tokens) for tokens in first_option))
    longest = max(len(tokens) for sequences, _, _ in questions for tokens in sequences)
    if len(questions) == 1 or not _worth_sharing(shared, longest):
        shared = 0
    children = [node for question in questions for node in _option_nodes(*question, shared)]
    return [Node(first_option[0][:shared], [], children)] if shared > 0 else children


def _option_nodes(sequences: Sequence[Sequence[int]], starts: Sequence[int], slot: int, begin: int) -> list[Node]:
    """A question's tokens from `begin` on with its options as children; the options alone when they share too little."""
    stem = _shared_by_options(sequences)
    if not _worth_sharing(stem - begin, max(len(tokens) for tokens in sequences) - begin):
        stem = begin
    node = Node(sequences[0][begin:stem])
    branches: dict[tuple[int, ...], Node] = {}  # letters of two tokens differ in the last only, and are one branch
    for index, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
        targets = [(t - 1, tokens[t], slot + index) for t in range(start, len(tokens))]
        node.targets += [(at - begin, token, own) for at, token, own in targets if at < stem]
        rest = [(at - stem, token, own) for at, token, own in targets if at >= stem]
        if rest:
            branch = branches.setdefault(tuple(tokens[stem:-1]), Node(tokens[stem:-1]))
            branch.targets += rest
    node.children = list(branches.values())
    return [node] if node.tokens else node.children


def _shared_by_options(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the tokens all options share and that feed the model; each keeps its last token to be predicted."""
    return min(min(common_prefix(sequences[0], s), len(s) - 1) for s in sequences)


def _worth_sharing(shared: int, length: int) -> bool:
    """A continued prefix needs masked attention, which costs more than the few tokens of a short one."""
    return 5 * shared >= length


def score(model: Model, roots: Sequence[Node], slots: int, batch_tokens: int = BATCH_TOKENS) -> Tensor:
    """Sum of log-probabilities (nats) per slot, float64 [slots] on the CPU. Raises HalveError when one is not finite."""
    sums = torch.zeros(slots, dtype=torch.float64)
    with torch.inference_mode():
        for nodes, hidden_RTD in passes(model, roots, batch_tokens):
            _add_targets(model, hidden_RTD, nodes, sums)
    check_finite(sums)
    return sums


def passes(model: Model, roots: Sequence[Node], batch_tokens: int) -> Iterator[tuple[list[Node], Tensor]]:
    """Every pass through the model: the nodes that are its rows, and their hidden states [R, T, D]."""
    yield from _descend(model, model.new_cache(1, 0), [(0, root) for root in roots], batch_tokens)


def _descend(
    model: Model, cache: KVCache, nodes: list[tuple[int, Node]], batch_tokens: int
) -> Iterator[tuple[list[Node], Tensor]]:
    """Run nodes, each given with the cache row it continues, then their children."""
    for chunk in _chunks(model, cache, nodes, batch_tokens):
        lengths = [len(node.tokens) for _, node in chunk]
        width, parents = max(lengths), [row for row, _ in chunk]
        tokens = torch.zeros(len(chunk), width, dtype=torch.int64)
        for row, (_, node) in enumerate(chunk):
            tokens[row, : lengths[row]] = torch.tensor(node.tokens)
        leaf = isinstance(cache.lengths, int) and cache.lengths == 0 and not any(node.children for _, node in chunk)
        grown = None if leaf else fork(cache, parents, width)
        starts = None if grown is None else grown.lengths
        hidden = model.hidden(tokens.to(model.device), grown)
        yield [node for _, node in chunk], hidden
        children = [(row, child) for row, (_, node) in enumerate(chunk) for child in node.children]
        if grown is not None and children:
            assert starts is not None
            grown.lengths = starts + torch.tensor(lengths, device=model.device)
            yield from _descend(model, grown, children, batch_tokens)


def _chunks(
    model: Model, cache: KVCache, nodes: list[tuple[int, Node]], batch_tokens: int
) -> Iterator[list[tuple[int, Node]]]:
    """Nodes of similar length together, at most `batch_tokens` slots a chunk (a single node may need more)."""
    live = [cache.lengths] if isinstance(cache.lengths, int) else cache.lengths.tolist()
    # learned positions have no row for the padding of a long prefix, so lengths must fit together there; and a row beyond the
    # length that changes the frequencies of all rows beside it runs alone
    limit = model.config.length_limit if model.positions is None else model.config.max_positions
    chunk: list[tuple[int, Node]] = []
    width = prefix = 0
    for row, node in sorted(nodes, key=lambda entry: -len(entry[1].tokens)):
        width_new, prefix_new = max(width, len(node.tokens)), max(prefix, live[row])
        full = (len(chunk) + 1) * (width_new + prefix_new) > batch_tokens
        if chunk and (full or (limit is not None and width_new + prefix_new > limit)):
            yield chunk
            chunk, width_new, prefix_new = [], len(node.tokens), live[row]
        chunk.append((row, node))
        width, prefix = width_new, prefix_new
    if chunk:
        yield chunk


def fork(cache: KVCache, rows: list[int], extra: int) -> KVCache:
    """Copies of the given rows of a cache, each with room for `extra` more tokens; a row may occur several times."""
    index = torch.tensor(rows, device=cache.lengths.device if isinstance(cache.lengths, Tensor) else None)
    grown = copy.copy(cache)
    grown.lengths = cache.lengths if isinstance(cache.lengths, int) else cache.lengths[index]
    live = grown.end
    grown.capacity, grown.layers = live + extra, []
    if cache.tokens is not None:
        grown.tokens = functional.pad(cache.tokens[:, :live].index_select(0, index.to(cache.tokens.device)), (0, extra))
    for pair in cache.layers:
        if pair is None:
            grown.layers.append(None)
            continue
        keys, values = (t[:, :, :live].index_select(0, index.to(t.device)) for t in pair)
        grown.layers.append((functional.pad(keys, (0, 0, 0, extra)), functional.pad(values, (0, 0, 0, extra))))
    return grown


def _add_targets(model: Model, hidden_RTD: Tensor, nodes: list[Node], sums: Tensor) -> None:
    entries = [(row, *target) for row, node in enumerate(nodes) for target in node.targets]
    if not entries:
        return
    rows, offsets, tokens, slots = torch.tensor(entries).T
    picked = hidden_RTD[rows.to(hidden_RTD.device), offsets.to(hidden_RTD.device)]
    sums.index_add_(0, slots, token_log_probs(model, picked, tokens))


def stretches(positions: int, at_a_time: int) -> Iterator[slice]:
    """All of so many positions, at most so many at a time."""
    return (slice(begin, min(begin + at_a_time, positions)) for begin in range(0, positions, max(1, at_a_time)))


def positions_at_a_time(model: Model) -> int:
    """How many rows of logits are held at a time."""
    return max(1, LOGIT_ELEMENTS // model.config.vocab_size)


def reduced_at_a_time(logits_NV: Tensor) -> Iterator[slice]:
    """The rows whose passes over the vocabulary are made one after another before those of the next rows begin."""
    rows = CACHED_ELEMENTS // logits_NV.shape[1] if logits_NV.device.type == "cpu" else len(logits_NV)
    return stretches(len(logits_NV), max(1, rows))


def token_log_probs(model: Model, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
    """log p(token) in nats after each hidden state, float64 [N] on the CPU.

    Logits are taken to float32 a stretch of positions at a time, so that a large vocabulary needs little memory.
    """
    parts = []
    for part in stretches(len(tokens_N), positions_at_a_time(model)):
        logits = model.logits(hidden_ND[part])
        targets = tokens_N[part].to(logits.device).unsqueeze(1)
        for rows in reduced_at_a_time(logits):
            block = logits[rows].float()
            parts.append((block.gather(1, targets[rows]).squeeze(1) - block.logsumexp(dim=1)).double().cpu())
    return torch.cat(parts)
