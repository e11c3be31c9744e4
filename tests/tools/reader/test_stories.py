"""The generator, the exam and the tokenizer of the bundled reader."""

import collections
import random
import re

import pytest

from halve.demo.run import READER
from tools.reader import exam, stories
from tools.reader.tokens import BOS, build_tokenizer, token_ids

ANNA = stories.Person("Anna", job="baker", place="market", day="Monday", colour="red", thing="key", feeling="happy")
TOM = stories.Person("Tom", job="pilot", place="farm", day="Friday", colour="blue", thing="cup", feeling="sad")
STORY = stories.Story((ANNA, TOM), ("place", "thing"), "Anna had a red key.")


def test_same_seed_same_text():
    texts = [stories.story_text(random.Random(7), 3, "train") for _ in range(2)]
    assert texts[0] == texts[1] != stories.story_text(random.Random(8), 3, "train")


def test_a_person_fills_the_forms():
    assert ANNA.fill("{Subject} had a {colour} {thing}.") == "Anna had a red key."
    assert ANNA.fill("{Subject} was {feeling}.", ANNA.pronoun) == "She was happy."
    assert TOM.pronoun == "He"


def test_the_words_of_a_category_are_unique_and_in_one_category_only():
    counts = collections.Counter(word for words in stories.WORDS.values() for word in words)
    assert counts.most_common(1)[0][1] == 1
    assert min(len(words) for words in stories.WORDS.values()) >= stories.MAX_PEOPLE


@pytest.mark.parametrize("n_people", range(1, stories.MAX_PEOPLE + 1))
def test_an_article_tells_every_fact_and_no_other(n_people):
    rng = random.Random(n_people)
    for _ in range(50):
        story = stories.draw_story(rng, n_people, "train")
        words = re.findall(r"\w+", story.article)
        for person in story.people:
            for relation in story.relations:
                assert getattr(person, relation) in words
        for category in set(stories.ASK) - set(story.relations):
            untold = {getattr(p, category) for p in story.people}
            assert not untold & set(words[6:])  # the opening may speak of a village or a town


def test_splits_do_not_depend_on_order_or_wording_and_are_disjoint():
    relations = ("place", "thing")
    assert stories.split_of((ANNA, TOM), relations) == stories.split_of((TOM, ANNA), relations)
    rng = random.Random(0)
    drawn = {split: stories.draw_story(rng, 2, split) for split in (*stories.SPLITS, "train")}
    assert {split: stories.split_of(s.people, s.relations) for split, s in drawn.items()} == {s: s for s in drawn}
    shares = collections.Counter(stories.split_of(stories.draw_people(rng, 2), relations) for _ in range(3200))
    assert all(140 < shares[split] < 260 for split in stories.SPLITS)  # 200 of 3200 expected, 14 the standard deviation


@pytest.mark.parametrize("n_people", [0, 7])
def test_a_number_of_people_that_cannot_be_told_is_refused(n_people):
    with pytest.raises(ValueError, match=f"n_people is {n_people}"):
        stories.draw_story(random.Random(0), n_people, "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        stories.draw_story(random.Random(0), 1, "test")


def test_endings_read_differently_for_other_people():
    ending = [(0, "{name} left the ^{place} late."), (1, "The {colour} ^{thing} stayed with ^{name}.")]
    assert stories.render_ending(ending, (ANNA, TOM)) == "Anna left the ^market late. The blue ^cup stayed with ^Tom."


def test_questions_have_the_answer_of_the_person_they_ask_about():
    rng = random.Random(3)
    answers = {q.text: q.answer for _ in range(60) for q in stories.draw_questions(rng, STORY, 4)}
    assert answers["Where did Anna go?"] == "market"
    assert answers["Who went to the farm?"] == "Tom"
    assert answers["What colour was the cup?"] == "blue"
    assert not [text for text in answers if "job" in text or "feel" in text]


def test_options_hold_the_answer_and_the_others_of_the_story():
    options = stories.draw_options(random.Random(0), STORY, stories.Question("Where did Anna go?", "market", "place"))
    assert len(set(options)) == 4
    assert {"market", "farm"} < set(options) <= set(stories.WORDS["place"])


def test_question_block_in_words_and_by_letter():
    question = stories.Question("Who was sad?", "Tom", "name")
    assert stories.question_block(question) == "\nQuestion: Who was sad?\nAnswer: ^Tom"
    block = stories.question_block(question, ["Anna", "Ben", "Tom", "Eva"])
    assert block == "\nQuestion: Who was sad?\nA) Anna\nB) Ben\nC) Tom\nD) Eva\nAnswer: ^C"


def test_marked_words_of_a_warm_up_sequence_repeat_its_first_half():
    tokens = stories.split_marked(stories.repeat_text(random.Random(5)))
    half = len(tokens) // 2
    assert [t for t, _ in tokens[:half]] == [t for t, _ in tokens[half:]]
    assert [marked for _, marked in tokens] == [False] * half + [True] * half


def test_marked_words_of_linked_pairs_were_linked_before():
    rng = random.Random(6)
    for _ in range(20):
        sentences = stories.links_text(rng).split(".")[:-1]
        n_pairs = len(sentences) // 3
        pairs = {frozenset((sentence.split()[0], sentence.split()[-1])) for sentence in sentences[:n_pairs]}
        assert len(pairs) == n_pairs
        for sentence in sentences[n_pairs:]:
            words = stories.plain(sentence).split()
            assert frozenset((words[0], words[-1])) in pairs and f"^{words[-1]}" in sentence


@pytest.mark.parametrize("kind", stories.TEXTS)
def test_generated_words_are_whole_tokens_and_round_trip(kind):
    tokenizer, ids = build_tokenizer(), token_ids()
    rng = random.Random(kind)
    for i in range(30):
        marked = stories.TEXTS[kind](rng, 1 + i % stories.MAX_PEOPLE, "train")
        text = stories.plain(marked)
        encoded = tokenizer.encode(text).ids
        assert encoded == [BOS, *(ids[token] for token, _ in stories.split_marked(marked))]
        assert tokenizer.decode(encoded) == text
        assert len(encoded) < 512


def test_any_other_text_falls_back_to_bytes():
    text = "Zürich 日本\n\n\tquark"
    tokenizer = build_tokenizer()
    encoded = tokenizer.encode(text).ids
    assert len(encoded) == 1 + len(text.encode())
    assert tokenizer.decode(encoded) == text


def test_the_shipped_exam_is_balanced_and_shares_no_story_with_the_development_items():
    lines = (READER / "exam.jsonl").read_text().splitlines()
    items = [exam.Item.from_race_line(line) for line in lines]
    assert exam.draw_items("question", 500, "exam", exam.EXAM_SEED) == items[500:]
    assert len(items) == 1000
    assert len({item.article for item in items if item.kind == "question"}) == 500
    assert collections.Counter((item.kind, item.answer) for item in items) == {
        (kind, letter): 125 for kind in exam.PROTOCOLS for letter in "ABCD"
    }
    assert all(len(set(item.options)) == 4 for item in items)
    dev = exam.dev_items()
    assert not {item.article for item in items} & {item.article for item in dev}


def test_an_item_survives_races_layout():
    item = exam.draw_items("question", 1, "exam", seed=9)[0]
    line = item.race_line()
    assert '"questions": ["' in line and f'"answers": ["{item.answer}"]' in line
    assert exam.Item.from_race_line(line) == item


def test_wrong_clozes_name_the_same_people():
    for item in exam.draw_items("cloze", 24, "exam", seed=9):
        named = [{w for w in re.findall(r"\w+", o) if w in stories.WORDS["name"]} for o in item.options]
        if not any("The one" in o or "this story" in o or "people here" in o for o in item.options):
            assert all(names == named[0] for names in named)


def test_prompts_are_those_of_the_protocols():
    item = exam.Item(
        "x", "question", 1, "Anna was at the farm.", "Where was Anna?", ("farm", "zoo", "lake", "mill"), "A"
    )
    asked = "Article: Anna was at the farm.\nQuestion: Where was Anna?"
    assert exam.prompt(item, "pmi") == (f"{asked}\nAnswer:", [" farm", " zoo", " lake", " mill"])
    listed = "\nA) farm\nB) zoo\nC) lake\nD) mill\nAnswer:"
    assert exam.prompt(item, "letter") == (asked + listed, [" A", " B", " C", " D"])
    assert exam.prompt(item.without_story(), "pmi")[0].startswith("Article: \nQuestion:")


def test_an_unknown_kind_of_item_is_refused():
    with pytest.raises(ValueError, match="'essay'"):
        exam.draw_items("essay", 1, "exam", seed=0)
