"""What CONTRIBUTING.md says is all that an addition takes: a toy one of each, made in a copy of the package, works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import halve
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = Path(halve.__file__).parent
# For each kind of addition, by the title of its section: what is made new, and (file, what stands there, what it becomes)
NEW: dict[str, dict[str, str]] = {
    "A method": {
        "compression/methods/toy.py": '''
"""A toy: every weight times a factor."""

from dataclasses import dataclass
from typing import Any, ClassVar

from halve.compression.plan import ModelState, StepPlan, finish, select
from halve.compression.walk import BlockView


@dataclass(frozen=True)
class Toy:
    """Every weight times `factor`."""

    name: ClassVar[str] = "toy"
    calibrates: ClassVar[bool] = False
    factor: float = 0.5

    def plan(self, state: ModelState) -> StepPlan:
        chosen, skipped = select(state, ("Linear",), ())
        return finish(self.name, state, {linear.key: (linear, "scaled") for linear in chosen}, skipped)

    def edit(self, view: BlockView, plan: StepPlan) -> list[dict[str, Any]]:
        for role in view.touched(plan):
            view.replace_weight(role, view.linears[role].weight * self.factor)
        return [{"name": view.name(role)} for role in view.touched(plan)]
'''
    },
    "A model family": {},
    "An evaluation task": {
        "measure/quality/tasks/toy.py": '''
"""A toy: two questions of any exam."""

from halve.measure.quality.tasks.question_task import QuestionTask

TOY = QuestionTask("toy")
'''
    },
    "A protocol of multiple choice": {
        "measure/quality/protocols/toy.py": '''
"""A toy: lettered options, the first two questions."""

from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol
from halve.measure.quality.protocols.letter import letter_prompt

TOY = ChoiceProtocol("toy", letter_prompt, default_limit=2)
'''
    },
    "A kernel": {
        "kernels/toy.py": '''
"""A toy: the reference under another name."""

from halve.kernels.reference import ReferenceMatmul


class ToyMatmul(ReferenceMatmul):
    def __init__(self, weight, dtype):
        super().__init__(weight, dtype)
        self.kernel = "toy"
'''
    },
    "A number format": {},
}
CHANGED: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "A method": (
        "compression/methods/__init__.py",
        [
            (
                "from halve.compression.plan",
                "from halve.compression.methods.toy import Toy\nfrom halve.compression.plan",
            ),
            ("_ALL = (", "_ALL = (Toy, "),
        ],
    ),
    "A model family": (
        "model/families.py",
        [('= {\n    "llama": Family(', '= {\n    "toy": Family(),\n    "llama": Family(')],
    ),
    "An evaluation task": (
        "measure/quality/tasks/__init__.py",
        [
            ("\nTASKS:", "from halve.measure.quality.tasks.toy import TOY\n\nTASKS:"),
            ("(PERPLEXITY,", "(TOY, PERPLEXITY,"),
        ],
    ),
    "A protocol of multiple choice": (
        "measure/quality/protocols/__init__.py",
        [
            ("\n# By name", "from halve.measure.quality.protocols.toy import TOY\n\n# By name"),
            ("(LETTER,", "(LETTER, TOY,"),
        ],
    ),
    "A kernel": (
        "kernels/__init__.py",
        [
            ("\n\nclass Matmul(", "from halve.kernels.toy import ToyMatmul\n\n\nclass Matmul("),
            ('{"cpu": CpuMatmul,', '{"cpu": CpuMatmul, "toy": ToyMatmul,'),
        ],
    ),
    "A number format": ("quantization.py", [("PACKABLE_BITS = (2, 3, 4, 8)", "PACKABLE_BITS = (2, 3, 4, 6, 8)")]),
}
# What is then possible; `source` is a Llama of bf16, `exam` forty questions
PROOF = {
    "A method": """
        halve.compress(source, "out", ["toy:factor=0.25"])
        before, after = (load_model(folder).blocks[0].linears["o_proj"].weight for folder in (source, "out"))
        assert torch.equal(before * 0.25, after)
    """,
    "A model family": """
        expected = load_model(source)(tokens)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": "toy"}))
        assert torch.equal(load_model(source)(tokens), expected)
    """,
    "An evaluation task": """
        record = halve.evaluate(source, task="toy", data=exam, protocol="pmi")
        assert record["task"] == "toy" and record["questions"] == 40
    """,
    "A protocol of multiple choice": """
        record = halve.evaluate(source, task="multiple-choice", data=exam, protocol="toy")
        assert record["protocol"] == "toy" and record["questions"] == 2
    """,
    "A kernel": """
        toy = load_model(source, backend="toy")
        assert {linear.kernel for _, linear in toy.linears()} == {"toy"}
        assert torch.equal(toy(tokens), load_model(source, backend="reference")(tokens))
    """,
    "A number format": """
        errors = []
        for bits in (4, 6, 8):
            halve.compress(source, f"out-{bits}", [f"rtn:bits={bits}"])
            errors.append(float((load_model(f"out-{bits}")(tokens) - load_model(source)(tokens)).norm()))
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
    """,
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package in a folder of its own."""
    target = tmp_path / "copy" / "halve"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "reader", "csrc"))
    return target


@pytest.fixture
def source(make_hf, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(make_hf("llama", dtype="bfloat16"), tmp_path / "source"))
    write_word_tokenizer(folder, [f"w{number}" for number in range(90)])
    question = {"article": "w1 w2", "questions": ["w3"], "options": [["w4", "w5", "w6", "w7"]], "answers": ["B"]}
    lines = [json.dumps(question | {"id": str(number)}) for number in range(40)]
    (tmp_path / "exam.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", PROOF)
def test_an_addition_takes_these_files(kind: str, copy: Path, source: Path, tmp_path: Path) -> None:
    for name, text in NEW[kind].items():
        assert not (copy / name).exists()
        (copy / name).write_text(text.lstrip())
    file, changes = CHANGED[kind]
    text = (copy / file).read_text()
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (copy / file).write_text(text)
    head = f"""
        import json
        from pathlib import Path
        import torch
        import halve
        from halve import load_model
        assert Path(halve.__file__).parent == Path({str(copy)!r})
        source, exam, tokens = Path("source"), Path("exam.jsonl"), torch.arange(12).unsqueeze(0)
    """
    script = "\n".join(
        line.strip() if "    " * 3 not in line else line[8:] for line in (head + PROOF[kind]).splitlines()
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def sections() -> dict[str, str]:
    parts = re.split(r"^### (.+)\n", (PROJECT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_names_these_files() -> None:
    assert list(sections()) == list(PROOF)
    for kind, text in sections().items():
        assert CHANGED[kind][0] in text, kind
        for name in NEW[kind]:
            assert f"{Path(name).parent}/NAME.py" in text, kind
