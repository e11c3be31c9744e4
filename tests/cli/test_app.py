"""The command line end to end: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from halve.cli.app import main
from tests.common import write_word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return call


@pytest.fixture
def model(make_hf, tmp_path: Path) -> Path:
    """A small model with a word tokenizer."""
    folder = Path(shutil.copytree(make_hf("llama"), tmp_path / "model"))
    words = "the a cat dog sat ran on mat and then . , A B C D : Question Answer Article"
    write_word_tokenizer(folder, words.split())
    return folder


def test_compress_evaluate_benchmark_compare(run, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and then a dog ran . " * 40)
    out, records = tmp_path / "out", tmp_path / "records"
    code, printed, _ = run("compress", model, out, "--step", "rtn:bits=8", "--dry-run")
    assert code == 0 and "int8 per channel" in printed and "lm_head" in printed and not out.exists()
    code, printed, _ = run("compress", model, out, "--step", "rtn:bits=8")
    assert code == 0 and f"wrote {out}" in printed
    (done,) = json.loads((out / "halve.json").read_text())["steps"]
    assert f"parameters {done['parameters_before']:,} -> {done['parameters_after']:,}" in printed
    records.mkdir()
    for folder in (model, out):
        target = records / f"{folder.name}-ppl.json"
        code, printed, error = run("evaluate", folder, "--task", "perplexity", "--data", text, "--json", target)
        assert code == 0 and "perplexity" in printed, error
        speed = records / f"{folder.name}-speed.json"
        code, printed, error = run(
            "benchmark", folder, "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 5, "--json", speed
        )
        assert code == 0 and "floor" in printed, error
    code, printed, _ = run("compare", records, "--csv")
    header, *rows = printed.splitlines()
    assert code == 0 and len(rows) == 2 and "perplexity" in header
    evaluation = json.loads((records / "out-ppl.json").read_text())
    speed = json.loads((records / "out-speed.json").read_text())
    always = {"halve_version", "torch_version", "machine", "command", "model", "recipe"}
    assert always | {"task", "protocol", "nll_nats_per_token", "perplexity", "tokens"} <= set(evaluation)
    assert set(
        "prefill_tokens_per_s ttft_ms decode_ms_median decode_ms_p10 decode_ms_p90 decode_tokens_per_s weight_bytes "
        "peak_memory_bytes bandwidth_gb_per_s floor_share kernels device".split()
    ) | always <= set(speed)
    assert speed["recipe"][0]["step"] == "rtn" and sum(speed["kernels"].values()) == 3 * 4 + 1
    dense = json.loads((records / "model-speed.json").read_text())
    assert speed["weight_bytes"] < dense["weight_bytes"]


def test_multiple_choice_record(run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    item = {
        "article": "the cat sat .",
        "questions": ["the cat ?"],
        "options": [["sat", "ran", "mat", "dog"]],
        "answers": ["A"],
    }
    data.write_text(json.dumps(item) + "\n")
    target = tmp_path / "r.json"
    code, printed, error = run("evaluate", model, "--task", "multiple-choice", "--data", data, "--json", target)
    assert code == 0 and "accuracy" in printed, error
    record = json.loads(target.read_text())
    assert {"accuracy", "accuracy_ci95", "questions", "answered", "protocol"} <= set(record)
    assert record["protocol"] == "letter" and record["questions"] == 1
    words = ("--task", "multiple-choice", "--data", data, "--protocol", "system1")
    code, printed, error = run("evaluate", model, *words)  # a study's protocol, by its name
    assert code == 0 and "[multiple-choice, system1]" in printed, error


def test_generate_streams_the_prompt_and_more(run, model: Path) -> None:
    code, printed, error = run("generate", model, "--prompt", "the cat", "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("the cat") and len(printed) > len("the cat\n"), error


def test_random_weights_from_a_config_alone(run, model: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    target = tmp_path / "r.json"
    code, _, error = run(
        "benchmark",
        tmp_path / "config.json",
        "--random-weights",
        "--prompt-tokens",
        4,
        "--new-tokens",
        2,
        "--json",
        target,
    )
    assert code == 0, error
    assert "random" in json.loads(target.read_text())["not_measured"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "nowhere", "OUT", "--step", "rtn"], "no such folder"),
        (["compress", "MODEL", "OUT"], "no step given"),
        (["compress", "MODEL", "OUT", "--step", "rtn:bits=5"], "bits=5"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--recipe", "r.yaml"], "use one of them"),
        (["compress", "MODEL", "OUT", "--recipe", "none.yaml"], "none.yaml"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--dtype", "int9"], "int9"),
        (["compress", "MODEL", "OUT", "--step", "rtn", "--device", "tpu9"], "tpu9"),
        (["compress", "MODEL", "MODEL", "--step", "rtn", "--overwrite"], "own folder"),
        (["compress", "MODEL", "OUT", "--step", "gptq:group_size=16", "--calibration", "none.txt"], "none.txt"),
        (["evaluate", "MODEL", "--task", "chess"], "chess"),
        (["evaluate", "MODEL", "--task", "perplexity"], "--data"),
        (["evaluate", "MODEL", "--task", "perplexity", "--data", "EMPTY"], "empty.txt"),
        (["benchmark", "MODEL", "--prompt-tokens", "100"], "exceed the context"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p=2.0"),
        (["compare", "none.json"], "none.json"),
        (["fetch", "noslash"], "not a hub id"),
        (["reproduce", "system9", "--model", "MODEL"], "system9"),
        (["reproduce", "system1", "--model", "MODEL", "--out", "OUT"], "a context of 64 is too short"),
        (["report", "none"], "no such folder"),
        (["frobnicate"], "frobnicate"),
        (["compress", "MODEL", "OUT", "--samples", "many"], "--samples"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(
    run, model: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty.txt").touch()
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {"MODEL": model, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    code, printed, error = run(*(places.get(a, a) for a in arguments))
    assert code == 2 and words in error, (code, error)
    assert error.startswith("halve: ") and error.count("\n") == 1 and not printed
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_and_version(run) -> None:
    code, printed, _ = run("--help")
    assert code == 0
    for command in (
        *("compress", "evaluate", "benchmark", "generate", "compare", "demo", "convert", "steps", "layers"),
        *("fetch", "reproduce", "report"),
    ):
        assert command in printed
        assert run(command, "--help")[0] == 0
    assert run("--version")[1].strip() == __import__("halve").__version__
    assert run()[0] == 0


def test_steps_lists_every_method(run) -> None:
    from halve.compression.methods import METHODS

    printed = run("steps")[1]
    for name in METHODS:
        assert name in printed
