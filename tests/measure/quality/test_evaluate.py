"""What README and docs promise of `halve.evaluate`: a folder in, the record of the command out; and adding to it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import halve
from halve.checkpoint.tokenizer import load_tokenizer
from halve.cli import terminal
from halve.cli.app import main
from halve.errors import DataError
from halve.measure.kinds import EvaluationRecord
from halve.measure.quality import options as options_module
from halve.measure.quality.evaluate import LoadedModel, evaluate_loaded, prepare
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.protocols import ChoiceProtocol
from halve.measure.quality.protocols.letter import letter_prompt
from halve.measure.quality.task import Evaluation, Task

CIRCUMSTANCES = ("date", "command")


@pytest.fixture(scope="module")
def folder(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a word tokenizer, and questions made of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(shutil.copytree(make_hf("llama"), tmp_path_factory.mktemp("evaluate") / "model"))
    words = ["<unk>", "<s>", "</s>", *"the a cat dog sat ran mat . ? A B : Question Answer Article".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    item = {"questions": ["the cat ?"], "options": [["sat .", "ran ."]], "answers": ["A"]}
    lines = [json.dumps({"id": str(n), "article": "the cat sat . " * (n + 1)} | item) for n in range(4)]
    (folder.parent / "exam.jsonl").write_text("\n".join(lines))
    (folder.parent / "text.txt").write_text("the cat sat . a dog ran . " * 20)
    return folder


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "multiple-choice", "data": "exam.jsonl", "protocol": "pmi", "template": "plain"},
        {"task": "perplexity", "data": "text.txt", "window": 32, "limit": 2},
    ],
)
def test_the_record_is_the_one_the_command_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    asked = asked | {"data": str(folder.parent / asked["data"])}
    record = halve.evaluate(folder, **asked)
    words = [word for key, value in asked.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["halve", "evaluate", str(folder), *words, "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    written = json.loads((tmp_path / "r.json").read_text())
    assert list(written) == list(record)
    assert set(record) <= set(EvaluationRecord.__annotations__), "a key that records.py does not name"
    for key in record.keys() - set(CIRCUMSTANCES):
        assert written[key] == record[key], key


def test_records_of_two_folders_go_straight_into_a_table(folder: Path, tmp_path: Path) -> None:
    halve.compress(folder, tmp_path / "int8", ["rtn:bits=8"])
    exam = folder.parent / "exam.jsonl"
    records = [halve.evaluate(m, task="multiple-choice", data=exam) for m in (folder, tmp_path / "int8")]
    assert [record["recipe"] for record in records] == [[], [records[1]["recipe"][0]]]
    table = halve.compare(records)
    assert [row["model"] for row in table.rows] == ["model", "int8"]
    assert "to the first row" in table.markdown()


def test_the_data_is_checked_before_a_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("halve.measure.quality.evaluate.load_model", refuse)
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        halve.evaluate(folder, task="multiple-choice", data="none.jsonl")
    with pytest.raises(AssertionError, match="a weight was read"):
        halve.evaluate(folder, task="multiple-choice", data=folder.parent / "exam.jsonl")


def test_one_loaded_model_answers_several_tasks(folder: Path) -> None:
    loaded = LoadedModel.load(folder, name="mine", tokenizer=load_tokenizer(folder))
    exam = EvaluationOptions("multiple-choice", folder.parent / "exam.jsonl")
    text = EvaluationOptions("perplexity", folder.parent / "text.txt")
    records = [evaluate_loaded(loaded, prepare(asked), command="a script") for asked in (exam, text)]
    assert [(r["model"], r["command"], r["task"]) for r in records] == [
        ("mine", "a script", "multiple-choice"),
        ("mine", "a script", "perplexity"),
    ]


def test_a_protocol_may_be_handed_in(folder: Path) -> None:
    """A study's own way of asking is no entry in PROTOCOLS."""
    first_two = ChoiceProtocol("first-two", letter_prompt, default_limit=2)
    record = halve.evaluate(folder, task="multiple-choice", data=folder.parent / "exam.jsonl", protocol=first_two)
    assert (record["protocol"], record["questions"], record["limit"]) == ("first-two", 2, 2)


class Length(Task):
    """A toy task: how many tokens a file is."""

    name, figure = "length", "tokens"
    protocols = MappingProxyType({"whole": "the file as it is"})

    def check(self, options: EvaluationOptions) -> None:
        pass

    def prepare(self, options: EvaluationOptions) -> Evaluation:
        text = Path(options.data or "").read_text()
        return lambda model, tokenizer, progress_file, comparison: {
            "task": "length",
            "tokens": len(tokenizer.encode(text, False)),
        }


def test_a_task_is_one_entry(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(options_module.TASKS, "length", Length())
    record = halve.evaluate(folder, task="length", data=folder.parent / "text.txt")
    assert (record["kind"], record["tokens"]) == ("evaluation", 160)
    assert "| model | 160 |" in halve.compare([record]).markdown()
    terminal.evaluation(record)
    assert capsys.readouterr().out == "tokens 160 [length]\n"
