"""Recipes as text, as YAML, and back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.compression.methods.rtn import Rtn
from halve.compression.recipe import make_step, parse_step, read_recipe, step_json, step_text
from halve.errors import RecipeError


def test_text_and_yaml_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n  - rtn: {bits: 4, group_size: 32, targets: [q_proj, k_proj]}\n  - rtn\n")
    text = [parse_step("rtn:bits=4,group_size=32,targets=q_proj|k_proj"), parse_step("rtn")]
    assert read_recipe(path) == text
    assert text[0] == Rtn(bits=4, group_size=32, targets=("q_proj", "k_proj"))
    assert step_json(text[1])["bits"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a list"),
        ("a: [", "not YAML"),
        ("- [rtn]", "is not NAME:key=value text"),
        ("- rtn: {bits: 4.5}", "not a whole number"),
        ("- rtn: {bits: true}", "not a whole number"),
    ],
)
def test_malformed_yaml(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("q_proj|k_proj", ["q_proj", "k_proj"]),
        (r"re:.*\.(1|2)\..*", [r"re:.*\.(1|2)\..*"]),
        (r"re:.*\.\d{1,2}\.mlp\..*|o_proj", [r"re:.*\.\d{1,2}\.mlp\..*", "o_proj"]),
        ("*.[0,|1].*", ["*.[0,|1].*"]),
        ("re:a[(|]b", ["re:a[(|]b"]),
        (r"re:a\(b|c", [r"re:a\(b", "c"]),
        (r"re:((a|b),c)+|d", ["re:((a|b),c)+", "d"]),
        ('"re:a,b|c"|d', ["re:a,b|c", "d"]),
        ("'re:a,b'", ["re:a,b"]),
        ('"re:a(b"', ["re:a(b"]),
        ('"re:a\'b"', ["re:a'b"]),
        ("re:a)b", ["re:a)b"]),
        ("re:(|*[0", ["re:(", "*[0"]),
        ("re:((a|b)|c", ["re:((a|b)", "c"]),
        ("a{(|b", ["a{(", "b"]),
        ("re:a=b", ["re:a=b"]),
        ("", []),
    ],
)
def test_patterns_keep_their_commas_and_bars(tmp_path: Path, text: str, patterns: list[str]) -> None:
    step = parse_step(f"rtn:ignore={text},bits=4")
    assert step == Rtn(bits=4, ignore=tuple(patterns))
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps([{"rtn": {"ignore": patterns, "bits": 4}}]))
    assert read_recipe(path) == [step]


@pytest.mark.parametrize("text", ['"a', "'a,b", "\"a|b'"])
def test_a_quote_that_is_not_closed_is_named(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"its {text[0]} is not closed"):
        parse_step(f"rtn:targets={text}")


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.text("ab.*,|=:()[]{}\\'\" ", max_size=6), max_size=3))
def test_every_step_can_be_written_as_text(patterns: list[str]) -> None:
    step = make_step("rtn", {"targets": patterns, "bits": 4})
    assert parse_step(step_text(step)) == step


LAUGHS = "\n".join(
    ["l0: &l0 [ha]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)), "steps: *l29"]
)
MERGES = "\n".join(
    ["m0: &m0 {a: 1}", *(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40)), "steps: *m39"]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "uses an alias"),
        (MERGES, "uses an alias"),
        ("&a [*a]", "uses an alias"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 20"),
        ("{a: " * 50_000 + "1" + "}" * 50_000, "nested deeper than 20"),
        ("- rtn: {bits: " + "1" * 10_000 + "}", "not YAML"),
        ("- rtn: {bits: 2001-99-99}", "not YAML"),
        ("- !!python/object/apply:os.system [ls]", "not YAML"),
        ("- rtn: {bits: .nan}", "bits=nan"),
        ("- prune-mlp: {fraction: .nan}", "fraction=nan"),
        ("- prune-mlp: {fraction: .inf}", "fraction=inf"),
        ("- prune-mlp: {fraction: " + "9" * 400 + "}", "fraction=99"),
        ("- rtn: {targets: [[a], {b: c}]}", "targets="),
        ("- rtn: {targets: {a: b}}", "targets="),
        ("- " + "a" * 2_000_000, "longer than"),
        ("- [[[[[[rtn]]]]]]", "is not NAME"),
        ("- {[a, b]: c}", "not YAML"),
        ("- {3: {bits: 4}}", "unknown step '3'"),
        ("- rtn: {3: 4}", "unknown option 3"),
        ("\0", "not YAML"),
        ("", "must be a list of steps"),
    ],
)
def test_recipes_that_nobody_writes_are_refused_at_once(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 600, message
