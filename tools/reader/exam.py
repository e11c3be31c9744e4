"""The bundled reader's exam: 1,000 items in RACE's layout, and how a model is examined on items of that kind.

Half of the items are clozes (which two sentences come next: the wrong ones name the same people with the facts of
another story), half are questions answered by one of four words, asked about stories of one to six people.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.reader import stories

EXAM_SEED, DEV_SEED = 1, 2
CLOZE_QUESTION = "What happened next?"
PROTOCOLS = {"cloze": ("pmi", "continuation"), "question": ("pmi", "continuation", "letter")}

Encode = Callable[[str], list[int]]
People = tuple[stories.Person, ...]


@dataclass(frozen=True)
class Item:
    """One article with one question and four options; `answer` is a letter, `people` how many the story is about."""

    id: str
    kind: str
    people: int
    article: str
    question: str
    options: tuple[str, ...]
    answer: str

    def race_line(self) -> str:
        """The item as a line of RACE's layout, which allows several questions per article."""
        lists = {"questions": [self.question], "options": [list(self.options)], "answers": [self.answer]}
        return json.dumps({"id": self.id, "article": self.article, **lists, "kind": self.kind, "people": self.people})

    @classmethod
    def from_race_line(cls, line: str) -> "Item":
        """The inverse of `race_line`."""
        row = json.loads(line)
        one = {"question": row["questions"][0], "options": tuple(row["options"][0]), "answer": row["answers"][0]}
        return cls(id=row["id"], kind=row["kind"], people=row["people"], article=row["article"], **one)

    def without_story(self) -> "Item":
        """The same item with an empty article: what can be guessed from question and options alone."""
        return dataclasses.replace(self, article="")


def draw_items(kind: str, n_items: int, split: str, seed: int) -> list[Item]:
    """Items about one to six people in turn, each letter the answer equally often."""
    if kind not in PROTOCOLS:
        raise ValueError(f"kind is {kind!r}; an item is one of {', '.join(PROTOCOLS)}")
    rng = random.Random(f"{seed}/{split}/{kind}")
    letters = (list(stories.LETTERS) * -(-n_items // 4))[:n_items]
    rng.shuffle(letters)
    items, seen = [], set()
    while len(items) < n_items:
        n_people = 1 + len(items) % stories.MAX_PEOPLE
        story = stories.draw_story(rng, n_people, split)
        if story.article in seen:
            continue
        seen.add(story.article)
        question, right, wrong = (_cloze if kind == "cloze" else _question)(rng, story)
        answer = letters[len(items)]
        options = list(wrong)
        options.insert(stories.LETTERS.index(answer), right)
        items.append(Item(f"{kind}-{len(items):03d}", kind, n_people, story.article, question, tuple(options), answer))
    return items


def _question(rng: random.Random, story: stories.Story) -> tuple[str, str, list[str]]:
    question = stories.draw_questions(rng, story, 1)[0]
    wrong = [option for option in stories.draw_options(rng, story, question) if option != question.answer]
    return question.text, question.answer, wrong


def _cloze(rng: random.Random, story: stories.Story) -> tuple[str, str, list[str]]:
    ending = stories.draw_ending(rng, story, 2)
    wrong = []
    while len(wrong) < 3:
        other = _with_facts_of(story.people, stories.draw_people(rng, len(story.people)))
        if all(_differs(a, b) for chosen in (story.people, *wrong) for a, b in zip(chosen, other, strict=True)):
            wrong.append(other)
    rng.shuffle(wrong)
    right, *rest = (stories.plain(stories.render_ending(ending, people)) for people in (story.people, *wrong))
    return CLOZE_QUESTION, right, rest


def _with_facts_of(people: People, others: People) -> People:
    return tuple(dataclasses.replace(other, name=p.name) for p, other in zip(people, others, strict=True))


def _differs(a: stories.Person, b: stories.Person) -> bool:
    return all(getattr(a, category) != getattr(b, category) for category in stories.WORDS if category != "name")


def exam_items() -> list[Item]:
    """The exam: 500 clozes and 500 questions."""
    return [item for kind in PROTOCOLS for item in draw_items(kind, 500, "exam", EXAM_SEED)]


def dev_items(n_cloze: int = 48, n_questions: int = 180) -> list[Item]:
    """Items drawn like the exam's from other stories, to watch the training with."""
    return draw_items("cloze", n_cloze, "dev", DEV_SEED) + draw_items("question", n_questions, "dev", DEV_SEED)


def write_exam(folder: Path) -> None:
    """Writes exam.jsonl and its halves exam_cloze.jsonl and exam_questions.jsonl."""
    items = exam_items()
    for name, kinds in (("exam", PROTOCOLS), ("exam_cloze", ("cloze",)), ("exam_questions", ("question",))):
        lines = [item.race_line() for item in items if item.kind in kinds]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def prompt(item: Item, protocol: str) -> tuple[str, list[str]]:
    """The context of the item under the protocol and the four continuations that are compared."""
    if item.kind == "cloze":
        return item.article, [f" {option}" for option in item.options]
    context = f"Article: {item.article}\nQuestion: {item.question}"
    if protocol != "letter":
        return f"{context}\nAnswer:", [f" {option}" for option in item.options]
    listed = "".join(f"\n{letter}) {option}" for letter, option in zip(stories.LETTERS, item.options, strict=True))
    return f"{context}{listed}\nAnswer:", [f" {letter}" for letter in stories.LETTERS]


def log_likelihoods(model: nn.Module, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """The natural log-likelihood of each continuation after its context; `model(ids [B, T])` gives logits [B, T, V].

    A row is context and continuation without its last token, so one-word continuations of a context share one row.
    """
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        readers.setdefault((*context, *continuation[:-1]), []).append(i)
    rows = sorted(readers, key=len)
    sums = [0.0] * len(pairs)
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        ids_BT = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
        for i, row in enumerate(batch):
            ids_BT[i, : len(row)] = torch.tensor(row)
        logits_BTV = model(ids_BT)
        for i, row in enumerate(batch):
            log_probabilities: Tensor = functional.log_softmax(logits_BTV[i, : len(row)].float(), dim=-1)
            for reader in readers[row]:
                context, continuation = pairs[reader]
                sums[reader] = float(log_probabilities[range(len(context) - 1, len(row)), continuation].sum())
    return sums


@torch.no_grad()
def choices(model: nn.Module, items: list[Item], encode: Encode, bos: int) -> dict[str, list[str]]:
    """The letters that the model chooses for items of one kind, under every protocol of the kind.

    `continuation`: the option of the highest log-likelihood after the context. `pmi`: the same minus the option's
    log-likelihood after BOS alone. `letter`: the options are listed and their letters are the continuations.
    """

    def scores(protocol: str) -> Tensor:
        prompts = [prompt(item, protocol) for item in items]
        contexts = [[bos, *encode(context)] for context, _ in prompts]
        pairs = [(c, encode(o)) for c, (_, options) in zip(contexts, prompts, strict=True) for o in options]
        given = torch.tensor(log_likelihoods(model, pairs)).view(-1, 4)
        alone = torch.tensor(log_likelihoods(model, [([bos], o) for _, o in pairs])).view(-1, 4)
        return torch.stack((given, given - alone))

    def letters(scores_N4: Tensor) -> list[str]:
        return [stories.LETTERS[best] for best in scores_N4.argmax(dim=1).tolist()]

    continuation, pmi = scores("continuation")
    chosen = {"pmi": letters(pmi), "continuation": letters(continuation)}
    if "letter" in PROTOCOLS[items[0].kind]:
        chosen["letter"] = letters(scores("letter")[0])
    return chosen


def examine(model: nn.Module, items: list[Item], encode: Encode, bos: int) -> dict[str, dict[str, float]]:
    """Accuracy for every kind and protocol: of all the items and, under "1" to "6", by number of people."""
    accuracies = {}
    for kind in PROTOCOLS:
        asked = [item for item in items if item.kind == kind]
        for protocol, chosen in choices(model, asked, encode, bos).items() if asked else ():
            right = [(str(item.people), item.answer == letter) for item, letter in zip(asked, chosen, strict=True)]
            groups = {"all": [ok for _, ok in right]}
            groups |= {n: [ok for people, ok in right if people == n] for n in sorted({people for people, _ in right})}
            accuracies[f"{kind}_{protocol}"] = {n: round(sum(oks) / len(oks), 4) for n, oks in groups.items()}
    return accuracies
