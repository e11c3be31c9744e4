"""Every command line on the pages runs: on the small files below, which have the names that the pages use."""

from __future__ import annotations

import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from halve.cli.app import app, main
from halve.measure.records import new_record, write_record
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
# the log tells what was, and the help page is the program's own words
PAGES = [page for page in ("README.md", "CONTRIBUTING.md") if (PROJECT / page).is_file()]
PAGES += sorted(f"docs/{page.name}" for page in (PROJECT / "docs").glob("*.md") if page.stem not in ("LOG", "help"))
WORDS = "the a cat dog sat ran on mat and then red blue bird sang to in house tree , . : ? ( ) A B C D Question Answer".split()

# what a command gets besides, so that it takes seconds: the figures of such runs mean nothing
SMALLER = {
    "compress": "--samples 4 --window 16",
    "benchmark": "--prompt-tokens 8 --new-tokens 4 --runs 3",
    "generate": "--max-new-tokens 3",
    "layers": "--samples 4 --window 16",
    "search": "--samples 4 --window 16 --resolution 0.25",
    "search --floor-lower-bound": "--trials 2",  # the one that varies two options
    # a small model with random weights guesses: on few questions of the hub it is not within 95 % of itself
    "search --floor 95% --calibration text.jsonl": "--data race_dev.jsonl --held-out-data race_test.jsonl",
    # minutes even on the smallest model, which tests/studies/system1 has it run whole on
    "reproduce": "--dry-run --calibration text.jsonl --data exam.jsonl --samples 4",
}
# figures of real models that small ones with random weights do not reach, and ids that only a network knows
INSTEAD = {
    "--floor 0.5": "--floor 0.01",
    "--floor 95% --floor-lower-bound": "--floor 10% --floor-lower-bound",
    "meta-llama/Llama-3.2-3B": "MODEL",
    "--device cuda": "--device cpu",
    "$R": "READER",
}
# what is read by the command's own parser and not run, and why
PARSED_ONLY = {
    "fetch": "needs a network; tests/checkpoint/test_hub.py fetches from a stand-in",
    "export": "a tokenizer that splits at spaces has no place in a GGUF file; tests/checkpoint/test_gguf_export.py runs it",
    "demo": "takes minutes; make demo and the continuous integration run it whole",
}


def code(text: str) -> Iterator[str]:
    """The lines of the code blocks of a page: indented ones, fenced ones without a language or of the shell."""
    fence: str | None = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in ("", "bash", "sh") or (fence is None and line.startswith("    ")):
            yield line.strip()


def commands(text: str) -> list[list[str]]:
    """The words of every command line of a page, comments left out; lines that end in a backslash go on."""
    joined = "\n".join(code(text)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines() if not line.startswith("<!--")]
    return [words for words in lines if words]


def in_prose(text: str) -> list[list[str]]:
    """The words of every command with options that stands inside a sentence."""
    spans = re.findall(r"`((?:halve|python -m|python benchmarks)[\s/][^`]*)`", text)
    return [shlex.split(span) for span in spans]


def unused_options(options: str, words: list[str]) -> list[str]:
    """The words of `options` ("--name value ...") whose name the command line has not set itself."""
    parts = re.findall(r"--\S+(?: (?!--)\S+)?", options)
    return [word for part in parts if part.split()[0] not in words for word in part.split()]


def smaller(words: list[str]) -> list[str]:
    """The same command on less."""
    line = "\0".join(words)
    for name, other in INSTEAD.items():
        line = line.replace(name.replace(" ", "\0"), other.replace(" ", "\0"))
    words = line.split("\0")
    for key, options in SMALLER.items():
        name, *needed = key.split()
        if words[1] == name and set(needed) <= set(words):
            words = words + unused_options(options, words)
    return words


def check_options(words: list[str]) -> None:
    """The command exists, and so does every option that the line names."""
    command: Any = typer.main.get_command(app).commands[words[1]]  # pyright: ignore[reportAttributeAccessIssue]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words[2:] if word.startswith("--")} <= known | {"--help"}, words


def run_halve(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_options(words)
    if words[1] in PARSED_ONLY:
        return
    words = smaller(words)
    if words[1] in ("compress", "search") and Path(words[3]).exists():
        shutil.rmtree(words[3])  # one page has several commands that make it
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, shlex.join(words)


def run_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own parser takes the arguments as far as its help, which names every option used."""
    if words[1] == "-m":
        run: Callable[..., Any] = runpy.run_module
        name, *arguments = words[2:]
    else:
        run, name = runpy.run_path, str(PROJECT / words[1])
        arguments = words[2:]
        monkeypatch.syspath_prepend(str(Path(name).parent))  # as Python does for a script
    arguments = [word for word in arguments if word != "--help"]
    asked = [word for word in arguments if not word.startswith("--")][:1] if name.endswith("run.py") else []
    monkeypatch.setattr(sys, "argv", [name, *asked, "--help"])
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        run(name, run_name="__main__")
    assert not stop.value.code
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"{option}\b", printed.getvalue()), f"{shlex.join(words)}: no option {option}"


def run_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for target in words[1:]:
        assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


def run_gpu(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps need a GPU or many minutes: they are named at the script's head."""
    step = words[1]
    head = (PROJECT / words[0]).read_text().split("set -euo", 1)[0]
    assert step == "all" or re.search(rf"^#   {step} ", head, re.MULTILINE), f"no step {step}"


def run_pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuous integration installs the wheel; here the files named are there."""
    assert words[1] == "install" and (PROJECT / "constraints.txt").is_file()


RUNNERS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "halve": run_halve,
    "python": run_python,
    "make": run_make,
    "benchmarks/gpu.sh": run_gpu,
    "pip": run_pip,
}


def run_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command line; fails for what nobody here knows how to run."""
    if re.fullmatch(r"[A-Z]+=\S+", words[0]) and len(words) == 1:
        return
    assert words[0] in RUNNERS, f"no test knows how to run: {shlex.join(words)}"
    RUNNERS[words[0]](words, monkeypatch)


class HubStandIn:
    """In place of the package `datasets`, which needs a network: the data sets that the commands on the pages may ask for."""

    def load_dataset(self, name: str, config: str | None = None, *, split: str, **_: object) -> list[dict[str, Any]]:
        assert (name, config) == ("ehovy/race", "high"), f"no page says that {name}, {config} is read"
        return [json.loads(line) for line in questions({"validation": 1000, "test": 2000}[split]).splitlines()]


def test_the_readme_names_the_extra_that_its_commands_need() -> None:
    """The commands that ask the hub run here on a stand-in for the package that the extra brings."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    lines = list(code(text))
    asks_hub = [n for n, line in enumerate(lines) if "--task race-h" in line and "--data" not in line]
    installs = [n for n, line in enumerate(lines) if re.fullmatch(r"pip install .*'\.\[data\]'", line)]
    assert asks_hub and installs and installs[0] < asks_hub[0]
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(re.match(r"datasets\b", needed) for needed in extras["data"])


def questions(first: int) -> str:
    """Forty questions in RACE's layout, every letter as often the answer."""
    rows = []
    for number in range(first, first + 40):
        article = " ".join(random.Random(number).choices(WORDS[:18], k=30))
        item = {"questions": ["the cat ?"], "options": [["sat", "ran", "sang", "mat"]], "answers": ["ABCD"[number % 4]]}
        rows.append(json.dumps({"id": f"high{number}.txt", "article": article} | item))
    return "\n".join(rows)


@pytest.fixture(scope="module")
def material(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name, small."""
    folder = tmp_path_factory.mktemp("material")
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 640, "max_position_embeddings": 512}
    model = make_hf("llama", **shape)
    write_word_tokenizer(model, WORDS)
    for name in ("MODEL", "DENSE", "INT8", "INT4", "OUT", "stories260K"):
        shutil.copytree(model, folder / name)
    for name in ("CONFIG.json", "config.json"):
        shutil.copy(model / "config.json", folder / name)
    text = " ".join(WORDS[(n * n + n // 7) % 18] for n in range(2000))
    for name in ("wiki.txt", "wikitext2_test.raw", "TEXT", "TEXT.txt", "tinystories_317.txt"):
        (folder / name).write_text(text)
    (folder / "text.jsonl").write_text(json.dumps({"text": text}))
    for first, name in enumerate(("exam.jsonl", "race_dev.jsonl", "race_test.jsonl", "story_cloze_615.jsonl")):
        (folder / name).write_text(questions(100 * first))
    (folder / "RACE/test/high").mkdir(parents=True)
    for line in questions(900).splitlines():
        (folder / "RACE/test/high" / json.loads(line)["id"]).write_text(line)
    record = new_record("evaluation", "MODEL", command="halve evaluate", task="perplexity", protocol="documents")
    record |= {"perplexity": 3.0, "nll_nats_per_token": 1.1, "tokens": 100, "data": "wiki.txt", "data_sha256": "0"}
    record |= dict.fromkeys(("accuracy", "accuracy_ci95", "questions", "answered", "limit"))
    record |= {"window": 64, "dtype": "bfloat16", "not_measured": {}}
    for name in ("FOLDER", "halve-reproduce"):
        (folder / name).mkdir()
        write_record(folder / name / "record.json", record)
    os.symlink(PROJECT / "src/halve/demo/reader", folder / "READER")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(
    page: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path(shutil.copytree(material, tmp_path / "work", symlinks=True))
    monkeypatch.chdir(work)
    # these take seconds each, and have tests of their own
    for module in ("measure.speed.benchmark", "studies.system1.needs"):
        monkeypatch.setattr(f"halve.{module}.bandwidth_gb_per_s", lambda device: 10.0)
    monkeypatch.setattr("halve.measure.speed.timed_model.peak_memory", lambda *_, **__: {"peak": 123_000_000})
    monkeypatch.setitem(sys.modules, "datasets", HubStandIn())
    text = (PROJECT / page).read_text(encoding="utf-8")
    for words in commands(text):
        run_line(words, monkeypatch)
    for words in in_prose(text):
        if words[0] == "halve":
            check_options(words)
        else:
            run_line(words, monkeypatch)


def test_the_lines_of_a_page_are_found() -> None:
    text = "a\n\n    halve compress A B \\\n        --step rtn  # why\n\n```bash\nmake test\n```\n```text\nno command\n```\n"
    assert commands(text) == [["halve", "compress", "A", "B", "--step", "rtn"], ["make", "test"]]
    assert in_prose("with `halve layers MODEL\n--data TEXT` and `halve.compress`") == [
        ["halve", "layers", "MODEL", "--data", "TEXT"]
    ]


@pytest.mark.parametrize(
    "line",
    [
        "curl https://example.org",
        "make nothing",
        "benchmarks/gpu.sh nothing",
        "python benchmarks/kernels_cpu.py --nothing 1",
        "halve compress MODEL OUT --nothing 1",
        "halve evaluate MODEL --task nothing",
    ],
)
def test_a_line_that_does_not_run_fails(
    line: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material)
    with pytest.raises(AssertionError):
        run_line(shlex.split(line), monkeypatch)
