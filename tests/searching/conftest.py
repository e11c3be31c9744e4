"""A small random model and an exam that it answers without a mistake, so that pruning it costs accuracy."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WORDS = "the a cat dog sat ran on mat and then red blue bird sang to in house tree big small".split()


@dataclass(frozen=True)
class Subject:
    """A model folder, its exam, and the options that ask it."""

    model: Path
    exam: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"task": "multiple-choice", "data": self.exam, "protocol": "continuation", "template": "plain"}


@pytest.fixture(scope="session")
def subject(make_hf, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from halve import evaluate, load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("search")
    model = Path(shutil.copytree(make_hf("llama"), folder / "tiny"))
    names = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(model / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))

    draw = random.Random(1)
    items = [
        {
            "id": f"article-{n}",
            "article": " ".join(draw.choices(WORDS, k=14)),
            "questions": ["?"],
            "options": [[" ".join(draw.choices(WORDS, k=3)) for _ in range(4)]],
            "answers": ["A"],
        }
        for n in range(80)
    ]
    exam = folder / "exam.jsonl"
    loaded, words = load_model(model), load_tokenizer(model)
    for letter in "ABCD":  # the answer is what the model says
        for item in items:
            item["answers"] = item["answers"] if "right" in item else [letter]
        exam.write_text("".join(json.dumps({k: v for k, v in i.items() if k != "right"}) + "\n" for i in items))
        found = evaluate(loaded, words, task="multiple-choice", data=exam, protocol="continuation", template="plain")
        for item in items:
            if found["answers"][item["id"]] == "1":
                item["right"] = True
    assert all("right" in item for item in items)
    return Subject(model, exam)
