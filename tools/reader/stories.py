"""The seeded generator of the bundled reader's English: stories, endings, questions and warm-up sequences.

A story gives each of one to six people some facts (job, place, day, thing and its colour, feeling) in varied sentence
forms. Two people of a story never share a value, so every question has one answer. In the texts made here a caret
before a word ("^market") marks a word that can be looked up in what precedes it; `plain` removes the carets. Training
weighs the marked words more than the facts themselves, which nobody can predict.

Exam, development and held-out stories never occur in training: a story belongs to the split that a checksum of its
facts names (`split_of`), whatever the seed and whatever sentences tell it.
"""

import dataclasses
import random
import re
import zlib
from dataclasses import dataclass

_LISTS = {
    "women": (
        "Anna Eva Mary Lucy Sara Emma Julia Nina Clara Laura Ida Rosa Helen Alice Jane Kate Lena Maria Nora Olga "
        "Paula Ruth Sofia Tina Vera Wendy Zoe Grace Irene Diana Carla Betty"
    ),
    "men": (
        "Tom Ben Max Paul John Peter Adam David Felix George Henry Ivan Jack Karl Leo Mark Noah Oscar Philip Robert "
        "Sam Simon Victor Walter Carlos Daniel Frank Hugo Jonas Louis Martin Rafael"
    ),
    "job": (
        "baker farmer doctor teacher painter singer driver sailor soldier judge nurse cook pilot hunter fisher "
        "gardener dancer writer lawyer tailor barber builder plumber waiter butcher shepherd carpenter poet guard "
        "priest miner clerk dentist potter weaver merchant student banker porter musician"
    ),
    "place": (
        "market park school library church garden forest beach river castle station harbour bakery museum hospital "
        "theatre bridge tower farm mill lake hotel bank shop kitchen office square valley village zoo stadium temple "
        "prison palace cave field cinema factory airport barn"
    ),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "colour": "red blue green yellow white black brown pink purple grey silver golden",
    "thing": (
        "key cup hat book ball lamp coat box bag ring chair table kite boat drum bell shoe scarf watch mirror bottle "
        "basket letter map knife spoon plate blanket pillow ladder wheel rope brush comb flute guitar piano candle "
        "clock camera bike car glove belt shirt tie stone flower feather shell coin doll toy sword shield crown rug "
        "vase bowl jar"
    ),
    "feeling": (
        "happy sad tired proud angry calm hungry lonely brave bored nervous glad sick afraid jealous sleepy cheerful "
        "worried thirsty curious ashamed surprised grateful hopeful"
    ),
}
WOMEN, MEN = (_LISTS[names].split() for names in ("women", "men"))
WORDS = {"name": WOMEN + MEN} | {c: words.split() for c, words in _LISTS.items() if c not in ("women", "men")}

# In the tables below the commonest, name-first form stands first: `variety` (0 to 1) opens the rest of each row.
# {Subject} is the name or, inside a passage about one person, a pronoun.
OPENINGS = (
    "It was a warm day.",
    "Once there was a small town.",
    "This is a story about {names}.",
    "Many things happened that week.",
    "One day the people of the town met.",
    "There is news from the village.",
    "In those days life was simple.",
    "Here is what happened to {names}.",
    "Once upon a time there lived {names}.",
    "It was the end of a long winter.",
    "Everybody in the street knew {names}.",
)
FILLERS = (
    "The sun was shining.",
    "It rained a little.",
    "The wind was cold.",
    "Nobody was in a hurry.",
    "Time went by.",
    "The street was quiet.",
    "A dog was sleeping in the sun.",
    "Children were playing outside.",
)
TELL = {
    ("job",): (
        "{Subject} was a {job}.",
        "{Subject} worked as a {job}.",
        "{Subject} had always been a {job}.",
        "{Subject} wanted to be a {job} and became one.",
        "The new {job} of the town was {name}.",
        "Everybody said that {name} was a good {job}.",
        "For many years {name} had been a {job}.",
    ),
    ("place",): (
        "{Subject} went to the {place}.",
        "{Subject} was at the {place}.",
        "{Subject} walked to the {place} alone.",
        "{Subject} stayed at the {place} for hours.",
        "At the {place} one could see {name}.",
        "Early in the day {name} left for the {place}.",
        "The way to the {place} was long, but {name} took it.",
    ),
    ("place", "day"): (
        "{Subject} went to the {place} on {day}.",
        "On {day} {name} went to the {place}.",
        "{Subject} was at the {place} on {day}.",
        "{Subject} waited until {day} and walked to the {place}.",
        "On {day} the door of the {place} opened and {name} came in.",
        "When {day} came, {name} left for the {place}.",
    ),
    ("thing", "colour"): (
        "{Subject} had a {colour} {thing}.",
        "{Subject} carried a {colour} {thing}.",
        "{Subject} bought a {colour} {thing}.",
        "{Subject} found a {thing} that was {colour}.",
        "The {colour} {thing} belonged to {name}.",
        "Somebody gave {name} a {colour} {thing}.",
        "There was a {colour} {thing} and it was a present for {name}.",
    ),
    ("feeling",): (
        "{Subject} felt {feeling}.",
        "{Subject} was {feeling}.",
        "{Subject} looked {feeling} that day.",
        "{Subject} could not say why, but felt {feeling}.",
        "Everybody saw that {name} was {feeling}.",
        "The news made {name} feel {feeling}.",
    ),
    ("job", "place"): (
        "{name} the {job} went to the {place}.",
        "{Subject} worked as a {job} at the {place}.",
        "{name}, a {job}, was at the {place}.",
        "A {job} called {name} went to the {place}.",
    ),
    ("place", "thing", "colour"): (
        "{Subject} took a {colour} {thing} to the {place}.",
        "{Subject} went to the {place} with a {colour} {thing}.",
        "At the {place} {name} found a {colour} {thing}.",
    ),
    ("job", "feeling"): (
        "{name} the {job} felt {feeling}.",
        "{Subject} was a {feeling} {job}.",
        "{name}, who was a {job}, felt {feeling}.",
    ),
    ("thing", "colour", "feeling"): (
        "{Subject} had a {colour} {thing} and felt {feeling}.",
        "{Subject} was {feeling} because of a {colour} {thing}.",
    ),
}
RETELL = {
    "job": (
        "{name} was still a ^{job}.",
        "{name} loved being a ^{job}.",
        "After all that, {name} went on working as a ^{job}.",
        "The {job} in this story is ^{name}.",
    ),
    "place": (
        "{name} came home from the ^{place}.",
        "{name} left the ^{place} late.",
        "In the end {name} thought of the ^{place} again.",
        "Of all the people here, the one from the {place} is ^{name}.",
    ),
    "day": (
        "{name} never forgot that ^{day}.",
        "For {name} ^{day} had been a long day.",
        "The one who was out on {day} is ^{name}.",
    ),
    "thing": (
        "{name} kept the ^{colour} ^{thing}.",
        "{name} put the ^{colour} ^{thing} on the floor.",
        "At home {name} looked at the ^{colour} ^{thing}.",
        "The {colour} ^{thing} stayed with ^{name}.",
    ),
    "feeling": (
        "{name} still felt ^{feeling}.",
        "At night {name} was ^{feeling} again.",
        "{name} told a friend about feeling so ^{feeling}.",
        "The one who felt {feeling} is ^{name}.",
    ),
}
# relation told: (question, the category of the word that answers it)
ASK = {
    "job": (
        ("What was {name}'s job?", "job"),
        ("Who was the {job}?", "name"),
        ("What did {name} work as?", "job"),
        ("Who worked as a {job}?", "name"),
    ),
    "place": (
        ("Where did {name} go?", "place"),
        ("Who went to the {place}?", "name"),
        ("Where was {name}?", "place"),
        ("Who was at the {place}?", "name"),
    ),
    "day": (
        ("When did {name} go to the {place}?", "day"),
        ("Who went out on {day}?", "name"),
        ("On which day did {name} go out?", "day"),
    ),
    "thing": (
        ("What did {name} have?", "thing"),
        ("Who had the {colour} {thing}?", "name"),
        ("What colour was the {thing}?", "colour"),
        ("What colour was {name}'s {thing}?", "colour"),
        ("Which {colour} thing did {name} have?", "thing"),
        ("Who had the {thing}?", "name"),
    ),
    "feeling": (
        ("How did {name} feel?", "feeling"),
        ("Who felt {feeling}?", "name"),
        ("Who was {feeling}?", "name"),
    ),
}
RELATIONS = tuple(ASK)
NUMBERS = ("one", "two", "three", "four", "five", "six")
LETTERS = "ABCD"
GAP_WORDS = ("a", "the", "was", "to", "went", "had", "felt", "of", "still", "left", "kept", "is")
MAX_PEOPLE = 6
FACTS_TOLD = {1: (3, 5), 2: (2, 4), 3: (2, 4), 4: (2, 3), 5: (1, 3), 6: (1, 3)}
SPLITS = ("exam", "dev", "held_out")  # residues 0, 1, 2 of 16; the rest is for training


@dataclass(frozen=True)
class Person:
    """One person of a story with a value for every category of `WORDS`."""

    name: str
    job: str
    place: str
    day: str
    colour: str
    thing: str
    feeling: str

    @property
    def pronoun(self) -> str:
        return "She" if self.name in WOMEN else "He"

    def fill(self, form: str, subject: str | None = None) -> str:
        """The sentence form with this person's words; `subject` stands for the name where the form allows it."""
        return form.format(**dataclasses.asdict(self), Subject=subject or self.name)


@dataclass(frozen=True)
class Story:
    """Some people, the relations that are told of each of them, and the text that tells them."""

    people: tuple[Person, ...]
    relations: tuple[str, ...]
    article: str


@dataclass(frozen=True)
class Question:
    """A question about one person of a story, answered by one word of a category."""

    text: str
    answer: str
    category: str


def plain(marked: str) -> str:
    """The text without the carets that mark words to be looked up."""
    return marked.replace("^", "")


def split_of(people: tuple[Person, ...], relations: tuple[str, ...]) -> str:
    """The split of a set of told facts, one of `SPLITS` or "train"; the order of the people does not matter."""
    categories = [*relations, *(["colour"] if "thing" in relations else [])]
    facts = sorted(":".join([p.name, *(f"{c}={getattr(p, c)}" for c in categories)]) for p in people)
    residue = zlib.crc32(";".join(facts).encode()) % 16
    return SPLITS[residue] if residue < len(SPLITS) else "train"


def draw_people(rng: random.Random, n_people: int) -> tuple[Person, ...]:
    """People that share no value of any category."""
    columns = [rng.sample(words, n_people) for words in WORDS.values()]
    return tuple(Person(**dict(zip(WORDS, row, strict=True))) for row in zip(*columns, strict=True))


def draw_story(rng: random.Random, n_people: int, split: str, variety: float = 1.0) -> Story:
    """A story of the split with `n_people` people; `variety` is the share of the sentence forms in use."""
    if not 1 <= n_people <= MAX_PEOPLE:
        raise ValueError(f"n_people is {n_people}; a story has 1 to {MAX_PEOPLE} people")
    if split not in (*SPLITS, "train"):
        raise ValueError(f"split is {split!r}; the splits are {', '.join(SPLITS)} and train")
    while True:
        relations = _draw_relations(rng, n_people)
        people = draw_people(rng, n_people)
        if split_of(people, relations) == split:
            return Story(people, relations, _tell(rng, people, relations, variety))


def _draw_relations(rng: random.Random, n_people: int) -> tuple[str, ...]:
    n_told = rng.randint(*FACTS_TOLD[n_people])
    while True:
        relations = tuple(sorted(rng.sample(RELATIONS, n_told), key=RELATIONS.index))
        if "day" not in relations or "place" in relations:
            return relations


def _choose(rng: random.Random, forms: tuple, variety: float):
    return forms[rng.randrange(max(1, round(variety * len(forms))))]


def _groups(rng: random.Random, relations: tuple[str, ...], variety: float) -> list[tuple[str, ...]]:
    """The relations grouped into the keys of `TELL`, one group per sentence, in random order."""
    groups = [("thing", "colour") if r == "thing" else (r,) for r in relations]
    if "day" in relations:
        groups = [g for g in groups if g not in (("place",), ("day",))] + [("place", "day")]
    rng.shuffle(groups)
    pairs = [(a, b) for a in groups for b in groups if a + b in TELL]
    if pairs and rng.random() < 0.4 * variety:
        first, second = rng.choice(pairs)
        groups = [g for g in groups if g not in (first, second)] + [first + second]
        rng.shuffle(groups)
    return groups


def _tell(rng: random.Random, people: tuple[Person, ...], relations: tuple[str, ...], variety: float) -> str:
    """The article: an opening, then the facts person by person, fact by fact, or in any order."""
    order = rng.choice(("by person", "by fact", "any") if variety > 0.3 else ("by person", "by fact"))
    sentences = []
    if order == "by fact":
        for group in _groups(rng, relations, variety):
            told = [p.fill(_choose(rng, TELL[group], variety)) for p in rng.sample(people, len(people))]
            sentences += _join(rng, told, people, variety)
    else:
        for person in people:
            for i, group in enumerate(_groups(rng, relations, variety)):
                pronoun = order == "by person" and i > 0 and rng.random() < 0.5 * variety
                form = _choose(rng, TELL[group], variety)
                sentences.append(person.fill(form, person.pronoun if pronoun else None))
        if order == "any":
            rng.shuffle(sentences)
    for _ in range(rng.choice((0, 0, 1, 2)) if variety > 0.3 else 0):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(FILLERS))
    names = [p.name for p in people]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return " ".join([_choose(rng, OPENINGS, variety).format(names=listed), *sentences])


def _join(rng: random.Random, sentences: list[str], people: tuple[Person, ...], variety: float) -> list[str]:
    """Some neighbouring sentences joined into one, where the second begins with a name."""
    joined = sentences[:1]
    names = {p.name for p in people}
    for sentence in sentences[1:]:
        if sentence.split()[0] in names and " and " not in joined[-1] and rng.random() < 0.4 * variety:
            joined[-1] = joined[-1][:-1] + rng.choice((" and ", ", but ", ", while ")) + sentence
        else:
            joined.append(sentence)
    return joined


def draw_ending(rng: random.Random, story: Story, n_sentences: int, variety: float = 1.0) -> list[tuple[int, str]]:
    """What is retold: (index of the person, sentence form) of different facts of the story, at most `n_sentences`."""
    facts = [(i, relation) for i in range(len(story.people)) for relation in story.relations]
    chosen = rng.sample(facts, min(n_sentences, len(facts)))
    return [(i, _choose(rng, RETELL[relation], variety)) for i, relation in chosen]


def render_ending(ending: list[tuple[int, str]], people: tuple[Person, ...]) -> str:
    """The ending, with marks, as it reads for these people."""
    return " ".join(people[i].fill(form) for i, form in ending)


def draw_questions(rng: random.Random, story: Story, n_questions: int, variety: float = 1.0) -> list[Question]:
    """Different questions about facts that the story tells."""
    questions = {}
    for _ in range(n_questions):
        person, relation = rng.choice(story.people), rng.choice(story.relations)
        form, category = _choose(rng, ASK[relation], max(variety, 0.5))
        text = person.fill(form)
        questions[text] = Question(text, getattr(person, category), category)
    return list(questions.values())


def draw_options(rng: random.Random, story: Story, question: Question) -> list[str]:
    """Four words of the answer's category in random order: the answer, others from the story first, then any others."""
    in_story = [getattr(p, question.category) for p in story.people]
    others = [w for w in in_story if w != question.answer]
    rng.shuffle(others)
    strangers = rng.sample([w for w in WORDS[question.category] if w not in in_story], 3) if len(others) < 3 else []
    options = [question.answer, *(others + strangers)[:3]]
    rng.shuffle(options)
    return options


def question_block(question: Question, options: list[str] | None = None) -> str:
    """The marked lines that follow an article: question, the options if answered by letter, answer."""
    if options is None:
        return f"\nQuestion: {question.text}\nAnswer: ^{question.answer}"
    listed = "".join(f"\n{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return f"\nQuestion: {question.text}{listed}\nAnswer: ^{LETTERS[options.index(question.answer)]}"


def story_text(rng: random.Random, n_people: int, split: str, variety: float = 1.0) -> str:
    """A story with its ending, as running text, with marks."""
    story = draw_story(rng, n_people, split, variety)
    ending = draw_ending(rng, story, rng.randint(2, 10), variety)
    return f"{story.article} {render_ending(ending, story.people)}"


def stories_text(rng: random.Random, n_people: int, split: str, variety: float = 1.0) -> str:
    """Two short stories, a line each, with marks: what running text of many stories looks like."""
    return "\n".join(story_text(rng, min(n_people, 3), split, variety) for _ in range(2))


def words_text(rng: random.Random, n_people: int, split: str, variety: float = 1.0) -> str:
    """An article and questions answered in words, with marks."""
    story = draw_story(rng, n_people, split, variety)
    questions = draw_questions(rng, story, rng.randint(3, 12), variety)
    return f"Article: {story.article}" + "".join(question_block(q) for q in questions)


def letters_text(rng: random.Random, n_people: int, split: str, variety: float = 1.0) -> str:
    """An article and questions answered by letter, with marks; half of them were answered in words just before."""
    story = draw_story(rng, n_people, split, variety)
    blocks = []
    for question in draw_questions(rng, story, rng.randint(2, 5), variety):
        if rng.random() < 0.3:
            blocks.append(question_block(question))
        blocks.append(question_block(question, draw_options(rng, story, question)))
    return f"Article: {story.article}" + "".join(blocks)


def repeat_text(rng: random.Random) -> str:
    """Warm-up: a random sequence of words and then the same again; the second time can be looked up."""
    words = [rng.choice(WORDS[rng.choice(tuple(WORDS))]) for _ in range(rng.randint(6, 40))]
    return "".join(f" {word}" for word in [*words, *(f"^{w}" for w in words)])


def links_text(rng: random.Random) -> str:
    """Warm-up for who has what: names and words linked across a gap, then every pair again, either way round."""
    n_pairs, n_gap = rng.randint(2, 6), min(rng.randint(0, 4), rng.randint(0, 4))
    values = rng.sample([word for category, words in WORDS.items() if category != "name" for word in words], n_pairs)
    pairs = list(zip(rng.sample(WORDS["name"], n_pairs), values, strict=True))
    gaps = [rng.choices(GAP_WORDS, k=n_gap) for _ in range(1 if rng.random() < 0.5 else 8)]

    def sentence(first: str, second: str) -> str:
        return "".join(f" {word}" for word in (first, *rng.choice(gaps), second)) + "."

    sentences = [sentence(*pair) for pair in pairs]
    for _ in range(2):
        rng.shuffle(pairs)
        sentences += [sentence(first, f"^{second}") for first, second in (rng.choice((p, p[::-1])) for p in pairs)]
    return "".join(sentences)


def pick_text(rng: random.Random) -> str:
    """Warm-up for letters: lists of four words and, for each, the letter of one of them."""
    blocks = []
    for _ in range(rng.randint(2, 4)):
        options = rng.sample(WORDS[rng.choice([c for c in WORDS])], 4)
        answer = rng.randrange(4)
        listed = "".join(f"\n{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
        blocks.append(f"\nQuestion: {options[answer]}{listed}\nAnswer: ^{LETTERS[answer]}")
    return "Article:" + "".join(blocks)


TEXTS = {"story": story_text, "stories": stories_text, "words": words_text, "letters": letters_text}
WARM_UPS = {"repeat": repeat_text, "links": links_text, "pick": pick_text}
_TOKEN = re.compile(r" ?\^?[A-Za-z]+|'s|[^A-Za-z]")


def split_marked(marked: str) -> list[tuple[str, bool]]:
    """The text's tokens (a word with the space before it, or one other character), each with whether it is marked."""
    return [(token.replace("^", ""), "^" in token) for token in _TOKEN.findall(marked)]


def vocabulary() -> list[str]:
    """Every token of more than one byte that the generator uses, sorted."""
    forms = [*OPENINGS, *FILLERS, *(f for table in (TELL, RETELL) for row in table.values() for f in row)]
    forms += [text for row in ASK.values() for text, _ in row]
    frames = ["Article: x\nQuestion: x\nAnswer: x", "and, but, while She He"]
    frames += [f" {word}" for row in (*WORDS.values(), LETTERS) for word in row]
    tokens = {
        token
        for text in [*forms, *(" " + f for f in forms), *frames]
        for token, _ in split_marked(re.sub(r"\^?\{\w+\}", "x", text))
    }
    return sorted(t for t in tokens if len(t) > 1 and t != " x")
