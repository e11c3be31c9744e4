"""Recipes as text, as YAML, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from halve.compression.methods.rtn import Rtn
from halve.compression.recipe import parse_step, read_recipe, step_json
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
