"""Prompts as written in the protocol, and the tokens of context and option taken together."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from halve.measure.quality.prompts import (
    Prompt,
    encode_prompt,
)
from halve.measure.quality.protocols.continuation import option_prompt, plain_prompt
from halve.measure.quality.protocols.generate import open_prompt
from halve.measure.quality.protocols.letter import letter_prompt
from halve.measure.quality.race import Question

QUESTION = Question("a", "Tom has a cat.", "What has Tom?", ("a dog", "a cat", "an owl"), 1)


class WordTokenizer:
    """Ids of words with their leading space, like SentencePiece: a text gets a space in front; "x: y" merges ": "."""

    bos_ids: tuple[int, ...] = (0,)
    eos_ids: tuple[int, ...] = (1,)

    def __init__(self, pattern: str) -> None:
        self.pattern, self.ids = re.compile(pattern), {}

    def encode(self, text: str, bos: bool) -> list[int]:
        words = self.pattern.findall(f" {text}" if text else "")
        return ([0] if bos else []) + [self.ids.setdefault(word, len(self.ids) + 2) for word in words]

    def decode(self, ids: list[int]) -> str:
        names = {number: word for word, number in self.ids.items()}
        return "".join(names[i] for i in ids if i > 1)


def test_prompts_are_the_protocols_to_the_letter() -> None:
    letters = letter_prompt(QUESTION)
    assert letters.context == (
        "Article: Tom has a cat.\nQuestion: What has Tom?\nA) a dog\nB) a cat\nC) an owl\nAnswer:"
    )
    assert letters.continuations == (" A", " B", " C")
    assert open_prompt(QUESTION) == replace(letters, continuations=())
    options = option_prompt(QUESTION)
    assert options.context == "Article: Tom has a cat.\nQuestion: What has Tom?\nAnswer:"
    assert options.continuations == (" a dog", " a cat", " an owl")
    plain = plain_prompt(QUESTION)
    assert (plain.context, plain.continuations) == ("Tom has a cat.", (" a dog", " a cat", " an owl"))


def test_an_options_tokens_are_those_after_the_context(characters: Any) -> None:
    encoded = encode_prompt(characters, option_prompt(QUESTION), 200)
    context = characters.encode(option_prompt(QUESTION).context, bos=True)
    for sequence, start, option in zip(encoded.sequences, encoded.starts, QUESTION.options, strict=True):
        assert list(sequence[:start]) == context
        assert characters.decode(list(sequence[start:])) == f" {option}"
    assert (encoded.cut, encoded.overflow) == (0, False)


def test_a_tokenizer_that_adds_a_leading_space_adds_none_to_the_option() -> None:
    tokenizer = WordTokenizer(r" \w+|\W")
    encoded = encode_prompt(tokenizer, plain_prompt(QUESTION), 50)
    tails = [tokenizer.decode(list(s[b:])) for s, b in zip(encoded.sequences, encoded.starts, strict=True)]
    assert tails == [" a dog", " a cat", " an owl"]
    # encoded apart, the option would begin with a space of its own and then one more
    assert tokenizer.decode(tokenizer.encode(" a dog", bos=False)) == "  a dog"


def test_a_merge_across_the_border_belongs_to_the_option() -> None:
    tokenizer = WordTokenizer(r"\. \w+|\w+|\W")  # ". a" is one token, so the context's "." is not what was there
    encoded = encode_prompt(tokenizer, plain_prompt(QUESTION), 50)
    tails = [tokenizer.decode(list(s[b:])) for s, b in zip(encoded.sequences, encoded.starts, strict=True)]
    assert tails == [". a dog", ". a cat", ". an owl"]


def test_an_option_that_merges_whole_keeps_its_last_token() -> None:
    tokenizer = WordTokenizer(r"\w+| ")  # drops all punctuation: the option "!" leaves no token of its own
    encoded = encode_prompt(tokenizer, Prompt("", "Tom has a cat", "", ("!", " now")), 50)
    assert [len(s) - b for s, b in zip(encoded.sequences, encoded.starts, strict=True)] == [1, 2]


def test_a_long_prompt_loses_the_articles_beginning_and_nothing_else(characters: Any) -> None:
    whole = encode_prompt(characters, letter_prompt(QUESTION), 1000)
    room = len(whole.sequences[0]) - 5
    encoded = encode_prompt(characters, letter_prompt(QUESTION), room)
    assert encoded.cut == 5 and not encoded.overflow
    texts = [characters.decode(list(s)) for s in encoded.sequences]
    shorter = letter_prompt(replace(QUESTION, article="as a cat."))
    assert texts == [shorter.context + letter for letter in shorter.continuations]
    assert {len(s) for s in encoded.sequences} == {room}
    assert all(s[0] == characters.bos_ids[0] for s in encoded.sequences)
    assert [characters.decode(list(s[b:])) for s, b in zip(encoded.sequences, encoded.starts, strict=True)] == [
        " A",
        " B",
        " C",
    ]


def test_each_option_is_cut_by_what_it_needs_itself(characters: Any) -> None:
    longest = len(encode_prompt(characters, plain_prompt(QUESTION), 1000).sequences[2])
    encoded = encode_prompt(characters, plain_prompt(QUESTION), longest - 1)
    assert [characters.decode(list(s)) for s in encoded.sequences] == [
        "Tom has a cat. a dog",
        "Tom has a cat. a cat",
        "om has a cat. an owl",
    ]
    assert encoded.cut == 1


def test_letters_see_one_and_the_same_article(characters: Any) -> None:
    """Even where a tokenizer makes two tokens of " D" and one of " A"."""
    prompt = letter_prompt(QUESTION)
    uneven = replace(prompt, continuations=(" A", " B", " CC"))
    room = len(prompt.context) + 1
    encoded = encode_prompt(characters, uneven, room)
    texts = [characters.decode(list(s)) for s in encoded.sequences]
    context = letter_prompt(replace(QUESTION, article=QUESTION.article[3:])).context
    assert texts == [context + " A", context + " B", context + " CC"]
    assert encoded.cut == 3


def test_overflow_begins_where_question_and_options_alone_do_not_fit(characters: Any) -> None:
    bare = letter_prompt(replace(QUESTION, article=""))
    room = 1 + len(bare.context) + len(" A")  # BOS and everything but the article
    fits = encode_prompt(characters, letter_prompt(QUESTION), room)
    assert not fits.overflow and fits.cut == len(QUESTION.article)
    assert characters.decode(list(fits.sequences[0])) == bare.context + " A"
    assert encode_prompt(characters, letter_prompt(QUESTION), room - 1).overflow


def test_generation_keeps_room_for_the_answer_only(characters: Any) -> None:
    context = open_prompt(QUESTION).context
    encoded = encode_prompt(characters, open_prompt(QUESTION), len(context) + 1)
    assert (len(encoded.sequences), encoded.cut) == (1, 0)
    assert characters.decode(list(encoded.sequences[0])) == context


def test_without_bos_and_article_nothing_predicts_the_first_token(characters: Any) -> None:
    characters.bos_ids = ()
    question = replace(QUESTION, options=("a dog", "x"))
    assert not encode_prompt(characters, plain_prompt(question), 7).overflow  # one character of the article is left
    assert encode_prompt(characters, plain_prompt(question), 6).overflow
