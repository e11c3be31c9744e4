"""A real language model: what halve's recipes and other programs make of it, all judged by one evaluation.

    python benchmarks/real.py MODEL ASSETS WORK [--only ROW ...] [--examine] [--llama-quantize FILE] [--llm-compressor PYTHON]

One row (see ROWS) is one compressed model: made, reloaded from disk, compared with MODEL on WikiText-2 and C4 (KL
divergence; both in float32) and, with --examine, on RACE-H (bfloat16). Its record is benchmarks/results/real/ROW.json;
docs/results.md shows them. WORK keeps models and evaluations: what is there is not made again. Rows of a program that is
not named are left out. What llama.cpp made is converted back with `halve convert`, so that the weights are judged and not
its kernels. ASSETS holds data/wikitext2_test.raw, data/c4_sample_1000.jsonl and data/race/race_high_test.jsonl;
calibration text is the first half of the C4 documents, judged is the second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_quality import peer_groups
from safetensors.torch import save_file

from halve.checkpoint.gguf_header import read_header
from halve.checkpoint.reader import open_checkpoint
from halve.checkpoint.tokenizer import load_tokenizer
from halve.compression.windows import CalibrationOptions, make_windows
from halve.measure.records import new_record, write_record
from halve.texts import read_documents

RESULTS = Path(__file__).parent / "results" / "real"
PEER = Path(__file__).parent / "peers" / "llm_compressor.py"
CALIBRATION_DOCUMENTS = 500
SAMPLES, WINDOW = 48, 512


@dataclass(frozen=True)
class Row:
    """How one model is made: by our steps, or by another program (its type of file, or its bits)."""

    steps: tuple[str, ...] = ()
    gguf: str | None = None
    llm_compressor: int | None = None


ALL = "target=dense,refit=true,polish=2"
TABLE8 = "rtn:bits=8,group_size=128,targets=embed_tokens"


# 38 % of the linears' weights in 8 bit: with the table fewer bytes than Q4_K_M, whose own rows are half in 5 and 8 bit here
SENSITIVE = "*v_proj|*o_proj|*down_proj"
MIXED = (f"gptq:bits=8,group_size=128,targets={SENSITIVE}", f"gptq:bits=4,group_size=32,ignore={SENSITIVE}", TABLE8)


def _rows() -> dict[str, Row]:
    """Every model by its name, the most telling first."""
    gptq = {
        f"gptq{bits}-g{size}": f"gptq:bits={bits},group_size={size}" for bits in (4, 3, 8) for size in (128, 64, 32)
    }
    plain = gptq["gptq4-g128"]
    rows = {"dense": Row(), "rtn8-table8": Row(("rtn:bits=8,group_size=128", TABLE8))}
    rows |= {f"llama.cpp-{kind}": Row(gguf=kind) for kind in ("Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M")}
    rows["gptq4+8-table8"] = Row(MIXED)
    rows |= {"gptq4-g128": Row((plain,)), "gptq4-g128-all": Row((f"{plain},{ALL}",))}
    rows |= {"llm-compressor4-g128": Row(llm_compressor=4), "rtn4-g128": Row(("rtn:bits=4,group_size=128",))}
    rows |= {f"{name}-all-table8": Row((f"{step},{ALL}", TABLE8)) for name, step in gptq.items() if "8-" not in name}
    rows |= {"rtn8": Row(("rtn:bits=8",)), "gptq8-g128": Row((gptq["gptq8-g128"],))}
    for fraction in (10, 20, 30):
        prune = f"prune-mlp:fraction=0.{fraction // 10},multiple_of=128"
        rows |= {f"mlp{fraction}": Row((prune,)), f"mlp{fraction}-gptq4-g128": Row((prune, plain))}
    for count in (1, 2, 3):
        drop = f"drop-layers:count={count}"
        rows |= {f"drop{count}": Row((drop,)), f"drop{count}-gptq4-g128": Row((drop, plain))}
    return rows | {f"l1-inputs{share}": Row((f"l1-inputs:fraction=0.{share // 10}",)) for share in (10, 20)}


ROWS = _rows()
# of the record of an evaluation what a table may show
FIGURES = (
    *("data", "data_sha256", "limit", "window", "windows", "documents", "tokens", "positions", "protocol", "template"),
    *("nll_nats_per_token", "perplexity", "bits_per_byte", "base", "base_perplexity", "perplexity_ratio"),
    *("perplexity_ratio_interval", "kl_nats_per_token", "kl_nats_per_token_interval", "kl_nats_percentiles"),
    *("same_top_share", "same_top_share_interval", "expected_acceptance", "right_token_probability_change"),
    *("accuracy", "accuracy_ci95", "questions", "answered", "cut", "overflow", "log_likelihood", "base_accuracy"),
    *("agreement", "right_to_wrong", "wrong_to_right", "accuracy_difference", "accuracy_difference_interval"),
    "accuracy_difference_p_value",
)


@dataclass
class Bench:
    """The dense model, the texts, and a folder to work in, which every command runs in, so that records hold short names."""

    work: Path
    args: argparse.Namespace

    def prepare(self) -> None:
        """The dense model as `dense`, calibration and judged text, and the predictions that rows are compared with."""
        data = Path(self.args.assets) / "data"
        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.work / "dense").exists():
            shutil.copytree(self.args.model, self.work / "dense.part", dirs_exist_ok=True)
            (self.work / "dense.part").rename(self.work / "dense")
        for source in (data / "wikitext2_test.raw", data / "race/race_high_test.jsonl"):
            shutil.copy(source, self.work)
        lines = (data / "c4_sample_1000.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (self.work / "c4_calibration.jsonl").write_text("".join(lines[:CALIBRATION_DOCUMENTS]), encoding="utf-8")
        (self.work / "c4_judged.jsonl").write_text("".join(lines[CALIBRATION_DOCUMENTS:]), encoding="utf-8")

    def judgements(self) -> dict[str, list[str]]:
        """What every model is asked, as options of `halve evaluate`."""
        window = ["--task", "perplexity", "--window", str(WINDOW), "--dtype", "fp32"]
        exam = ["--task", "race-h", "--protocol", "pmi", "--template", self.args.template]
        return {
            "wikitext": [*window, "--limit", "20", "--data", "wikitext2_test.raw"],
            "c4": [*window, "--protocol", "documents", "--limit", "20", "--data", "c4_judged.jsonl"],
            "race": [*exam, "--limit", str(self.args.questions), "--data", "race_high_test.jsonl"],
        }

    def run(self, command: list[str]) -> dict[str, Any]:
        """Run a program in the work folder; its seconds and the most resident memory it had."""
        print("+", " ".join(command), flush=True)
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=self.work)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        return {"seconds": time.monotonic() - start, "peak_resident_bytes": usage.ru_maxrss * 1024}

    def halve(self, *words: str) -> dict[str, Any]:
        """Run one of halve's commands."""
        return self.run([sys.executable, "-m", "halve", *words])

    def make(self, name: str, row: Row) -> dict[str, Any]:
        """Make the row's model as the folder `name`; what making it took."""
        if row.gguf:
            if not (self.work / "dense.gguf").exists():
                self.halve("export", "dense", "dense.gguf", "--to", "gguf", "--dtype", "bf16")
            return self.run([self.args.llama_quantize, "dense.gguf", f"{name}.gguf", row.gguf]) | {
                "convert": self.halve("convert", f"{name}.gguf", name)
            }
        if row.llm_compressor:
            return self.by_llm_compressor(name, row.llm_compressor)
        steps = [word for step in row.steps for word in ("--step", step)]
        text = ["--calibration", "c4_calibration.jsonl", "--samples", str(SAMPLES), "--window", str(WINDOW)]
        data = [] if all(step.startswith(("rtn", "l1")) for step in row.steps) else text
        return self.halve("compress", "dense", name, *steps, *data)

    def by_llm_compressor(self, name: str, bits: int) -> dict[str, Any]:
        """Its GPTQ on the very windows that ours is calibrated on."""
        text, folder = self.work / "c4_calibration.jsonl", self.work / "dense"
        options = CalibrationOptions(text.name, SAMPLES, WINDOW)
        vocabulary = open_checkpoint(folder).config.vocab_size
        drawn = make_windows(read_documents(text), load_tokenizer(folder), options, vocabulary)
        save_file({"input_ids": drawn.windows}, str(self.work / "windows.safetensors"))
        request = {
            "model": "dense",
            "out": name,
            "windows": "windows.safetensors",
            "bits": bits,
            "groups": peer_groups(folder, 128),
            "damping": 0.01,
            "threads": os.cpu_count(),
        }
        (self.work / "request.json").write_text(json.dumps(request))
        return self.run([self.args.llm_compressor, str(PEER.resolve()), "request.json"])

    def judge(self, name: str) -> dict[str, Any]:
        """The figures of every judgement, compared with the dense model's kept predictions."""
        found = {}
        for key, asked in self.judgements().items():
            if key == "race" and not self.args.examine:
                continue
            record, base = self.work / f"{name}-{key}.json", f"{key}.base"
            if not (self.work / base).exists():
                kept = "64" if key == "race" else "1024"
                self.halve("evaluate", "dense", *asked, "--save-base", base, "--base-tokens", kept)
            if not record.exists():
                self.halve("evaluate", name, *asked, "--base", base, "--json", record.name)
            figures = json.loads(record.read_text(encoding="utf-8"))
            found[key] = {key: figures[key] for key in FIGURES if key in figures}
        return found

    def row(self, name: str, row: Row) -> None:
        """Make, judge and record one model."""
        costs = self.work / f"{name}-made.json"
        if not costs.exists():
            if row != Row():
                shutil.rmtree(self.work / name, ignore_errors=True)
            made = {} if row == Row() else self.make(name, row)
            costs.write_text(json.dumps(made))
        file = self.work / f"{name}.gguf"
        folder = self.work / name
        tensors = read_header(file).tensors.values() if row.gguf else ()
        weights = sum(tensor.nbytes for tensor in tensors) or _bytes(folder, "*.safetensors")
        record = new_record(
            "real",
            name,
            command=f"real.py --questions {self.args.questions} --template {self.args.template} --only {name}",
            recipe=list(row.steps),
            weight_bytes=weights,
            file_bytes=file.stat().st_size if row.gguf else _bytes(folder, "*"),
            made=json.loads(costs.read_text()),
            **self.judge(name),
        )
        write_record(RESULTS / f"{name}.json", record)


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense folder, on no quantization grid")
    parser.add_argument("assets")
    parser.add_argument("work", type=Path, help="a folder for models and evaluations; 15 GB for all rows")
    parser.add_argument("--examine", action="store_true", help="on RACE-H too: minutes a row")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="these rows (default: all)")
    parser.add_argument("--llama-quantize", help="llama.cpp's program of this name")
    parser.add_argument("--llm-compressor", help="the Python of an environment with llmcompressor")
    parser.add_argument("--questions", type=int, default=400, help="of RACE-H (default: the first 400)")
    parser.add_argument("--template", default="race", help="of its prompt: race (default) or plain")
    args = parser.parse_args()
    bench = Bench(args.work, args)
    bench.prepare()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.only or ROWS:
        row = ROWS[name]
        absent = (row.gguf and not args.llama_quantize) or (row.llm_compressor and not args.llm_compressor)
        if not absent:
            bench.row(name, row)


if __name__ == "__main__":
    main()
