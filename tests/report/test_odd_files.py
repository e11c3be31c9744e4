"""Odd files beside good ones: real records, manifests and analyses with something changed in them, by a seeded draw.

Whatever the change is, the file is shown or named with what is wrong, and everything else is shown.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halve.errors import DataError
from halve.measure.records import find_records, read_record, write_record
from halve.measure.table import compare
from halve.report.contents import read_contents
from halve.report.page import write_page
from tests.common import RAW, raw_json

from .conftest import analysis, evaluation, speed, trial

PROJECT = Path(__file__).resolve().parents[2]
VALUES = [
    None,
    True,
    -1,
    0,
    7,
    2.5,
    1e300,
    -1e-300,
    10**19,
    "",
    "x",
    "\ud800\x1b[1m",
    [],
    {},
    [[]],
    {"": None},
    [1, "a"],
    *RAW,
]

FILES = "evaluation perplexity benchmark reproduce search text-search layers halve".split()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from places(inner)


def odd(value: Any, draw: random.Random) -> str:
    """The text of `value` with one to three changes: a key left out, a value replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 3))):
        container, key = draw.choice(list(places(value)))
        if isinstance(container, dict) and draw.random() < 0.3:
            del container[key]
        else:
            container[key] = draw.choice(VALUES)
    return raw_json(value)


def samples(study: Path) -> dict[str, Any]:
    """A file of every kind that is read, by the name that such a file has."""
    reproduction = json.loads((PROJECT / "benchmarks/results/reproduce/stories260K.json").read_text())
    reproduction["fractions"] = reproduction["fractions"][:1]
    cloze = json.loads((PROJECT / "benchmarks/results/demo/int8-cloze.json").read_text())
    cloze["answers"] = dict(list(cloze["answers"].items())[:3])
    return {
        "evaluation.json": cloze,
        "perplexity.json": json.loads((PROJECT / "benchmarks/results/demo/int8-perplexity.json").read_text()),
        "benchmark.json": json.loads((PROJECT / "benchmarks/results/demo/int8-speed.json").read_text()),
        "reproduce.json": reproduction,
        "search.json": json.loads((study / "search" / "search.json").read_text()),
        "text-search.json": json.loads(text_search((study / "search" / "search.json").read_text())),
        "layers.json": analysis().as_json(),
        "halve.json": json.loads((study / "models" / "tiny-int8" / "halve.json").read_text()),
    }


def text_search(text: str) -> str:
    """A search for an accuracy as one for a KL."""
    for old, new in (
        ("accuracy_ci95", "kl_nats_per_token_interval"),
        ("accuracy", "kl_nats_per_token"),
        ("questions", "documents"),
    ):
        text = text.replace(f'"{old}"', f'"{new}"').replace(f'"held_out_{old}"', f'"held_out_{new}"')
    return text.replace('"asked": 0.5', '"figure": "kl", "asked": 0.5')


def shown_or_named(folder: Path) -> tuple[set[Path], dict[Path, str]]:
    contents = read_contents(folder)
    manifests = {place / "halve.json" for place in contents.manifests}
    return {*contents.everything, *contents.analyses, *manifests}, contents.left_out


@pytest.mark.parametrize("name", [f"{name}.json" for name in FILES])
def test_whatever_is_in_a_file_the_others_are_shown(name: str, study: Path, tmp_path: Path) -> None:
    draw, sample = random.Random(f"5 {name}"), samples(study)[name]
    write_record(tmp_path / "good.json", evaluation("good", [], 0.5))
    for number in range(120):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_text(odd(sample, draw))
    shown, left_out = shown_or_named(tmp_path)
    assert 10 < len(left_out) < 110 and Path("good.json") in shown
    for place, wrong in left_out.items():
        assert place not in shown and wrong.startswith(("is malformed", "is not valid JSON")), wrong
    silent = {Path(str(n), name) for n in range(120)} - shown - left_out.keys()
    assert len(silent) <= 2, "what no longer looks like a file of ours is no file of ours"
    for n, place in enumerate(sorted(shown)):  # pages take time: a few of those that were taken
        if n % 24 and place != Path("good.json"):
            (tmp_path / place).unlink()
    page = write_page(tmp_path).read_text()
    assert "good" in page and all(str(place) in page for place in left_out)
    compare(find_records([tmp_path]).records).markdown()


@pytest.mark.parametrize(
    "text", ["", "{", "[", "-Infinity", *RAW.values(), '{"kind": "benchmark", "command": 1}', "\ufeff{}"]
)
def test_one_bad_file_hides_nothing(text: str, tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", evaluation("a", [], 0.5))
    (tmp_path / "odd.json").write_text(text)
    assert "odd.json" in write_page(tmp_path).read_text()
    found = find_records([tmp_path])
    assert len(found.records) == 1 and len(found.left_out) == 1 and str(tmp_path / "odd.json") in found.left_out[0]
    with pytest.raises(DataError, match="odd"):
        find_records([tmp_path / "a.json", tmp_path / "odd.json"])
    (tmp_path / "a.json").unlink()
    with pytest.raises(DataError, match=r"odd\.json"):
        find_records([tmp_path])
    with pytest.raises(DataError, match=r"odd\.json"):
        write_page(tmp_path)


def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, study: Path) -> None:
    search = samples(study)["search.json"]
    path = tmp_path / "search.json"
    for change, wrong in (
        ({"trials": [trial(0.1, 0.6, 3), {"parameters": {}}]}, r'"trials\.1" lacks "accuracy"'),
        ({"trials": [trial(0.1, 0.6, 3) | {"accuracy": "high"}]}, r'"trials\.0\.accuracy" is text, expected a number'),
        ({"trials": [trial(0.1, 1.5, 3)]}, r'"trials\.0\.accuracy" is 1\.5, expected 0 to 1'),
        ({"floor": {"accuracy": True}}, r'"floor\.accuracy" is true or false, expected a number'),
        ({"machine": {"cores": 2.5}}, r'"machine\.cores" is a number, expected a whole number'),
        ({"winner": []}, r'"winner" is a list, expected an object or null'),
        ({"recipe": ["rtn", {}]}, r'"recipe\.1" lacks "step"'),
        ({"dense": search["dense"] | {"accuracy_ci95": [0.5]}}, r'"dense\.accuracy_ci95" is not a list of 2'),
        ({"floor": {"figure": "kl", "kl_nats_per_token": 1}}, r'"dense" lacks "kl_nats_per_token"'),
        ({"floor": {"figure": "bytes", "bytes": 1}, "objective": "kl"}, r'"dense" lacks "kl_nats_per_token"'),
        ({"floor": {"figure": "bytes"}, "objective": "accuracy"}, r'"floor" lacks "bytes"'),
        ({"floor": {"figure": "bytes", "bytes": 1}}, r'"floor\.figure" is no figure of quality'),
        ({"floor": {"figure": [], "accuracy": 1}}, r'"floor\.figure" is no figure of quality'),
        ({"winner": trial(0.1, 0.6, 3)}, r'"winner" lacks "held_out_accuracy"'),
    ):
        path.write_text(json.dumps(search | change))
        with pytest.raises(DataError, match=rf"search\.json is malformed, {wrong}: make it again"):
            read_record(path)


def test_records_of_earlier_versions_are_read() -> None:
    for path in (PROJECT / "benchmarks" / "results").rglob("*.json"):
        read_record(path)


def test_a_speed_alone_is_shown(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", speed("a", [], 1000, 5.0))
    assert "5.0" in write_page(tmp_path).read_text()
