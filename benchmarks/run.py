"""Ours and the peers that are installed, in turn in one run; records, then the tables of docs/.

    python benchmarks/run.py cpu [--only bf16,int8,...] [--llama-cpp PYTHON --gguf FOLDER]

cpu: batch 1, the Llama-3.2-1B shape with random weights, records in benchmarks/results/cpu/, docs/performance.md.
Hugging Face comes with this project. `--llama-cpp` names the Python of an environment with llama-cpp-python and gguf
(benchmarks/peers/README.md says how to make it), `--gguf` a folder for its models (6 GB, made when missing).

In two halves, dense and quantized, every program is loaded and warmed up, then rounds begin: each prefills and decodes
once a round, one after the other, while the others wait. The read bandwidth of the machine is measured before and after
every pass. Where it was far below the best of the run, because neighbours took it, the pass is done again, whoever it
belongs to, as long as `--patience` lasts; what counts are the `--runs` passes of each beside which it was highest.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_variants import VARIANTS, build

from halve.checkpoint.reader import load_model, open_checkpoint
from halve.errors import HalveError
from halve.measure.machine import bandwidth_gb_per_s, cpu_model
from halve.measure.records import Record, new_record, write_record
from halve.measure.speed.benchmark import make_record
from halve.measure.speed.timed_model import BenchmarkOptions, Placement, TimedModel
from halve.measure.speed.timing import PassTimes, kv_bytes_per_step, random_prompt, spread, time_pass
from halve.model.decoder import Model
from tools.docs.pages import ROOT, update

PEERS = Path(__file__).resolve().parent / "peers"
SHAPE = ROOT / "benchmarks/shapes/llama-3.2-1b"
RESULTS = ROOT / "benchmarks/results/cpu"
PROGRAMS = (
    *("hugging-face-eager", "hugging-face-compiled"),
    *("llama.cpp-BF16", "llama.cpp-F16", "llama.cpp-Q8_0", "llama.cpp-Q4_K_M", "llama.cpp-Q4_0"),
)
# left out unless named: the one compiles for minutes, the other is no target
RARE = ("hugging-face-compiled", "llama.cpp-Q4_0")
# what takes turns: all of it at once would need more than 20 GB
HALVES = (
    ("bf16", "hugging-face-eager", "hugging-face-compiled", "llama.cpp-BF16", "llama.cpp-F16"),
    (*VARIANTS, "llama.cpp-Q8_0", "llama.cpp-Q4_K_M", "llama.cpp-Q4_0"),
)
# ours -> the peers it has to beat (the best of them), and by how much
DECODE_TARGETS = {
    "bf16": (("llama.cpp-BF16", "llama.cpp-F16"), 1.15),
    "int8": (("llama.cpp-Q8_0",), 1.5),
    "int4": (("llama.cpp-Q4_K_M",), 1.4),
}
PRUNED_FROM = {"int8-l1-inputs": "int8", "int4-prune-mlp": "int4", "int8-drop-layers": "int8"}
FLOOR_TARGET, BYTES_RATIO_TARGET, PREFILL_TARGET = 0.85, 0.9, 0.9
# a machine that is busy with other things says nothing: below this share of idle time there is no measuring
IDLE_SHARE = 0.9
# nor does a pass beside which the bandwidth was below this share of the best
BANDWIDTH_SHARE = 0.8


@dataclass
class Peer:
    """Another program in a process of its own, which runs once for every line it is sent."""

    name: str
    command: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.about = self._line()

    def measure(self) -> PassTimes:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return PassTimes(**self._line())

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()

    def _line(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise HalveError(f"{self.name} stopped: run {shlex.join(self.command)} to see why")
        return json.loads(line)


def peers_of(names: Sequence[str], args: argparse.Namespace, settings: BenchmarkOptions) -> list[Peer]:
    """Those of the peers that are installed."""
    numbers = [str(settings.prompt_tokens), str(settings.new_tokens), str(torch.get_num_threads())]
    found = []
    for name in names:
        if name.startswith("hugging-face"):
            script = PEERS / "hugging_face_speed.py"
            found.append(Peer(name, [sys.executable, str(script), str(SHAPE), name.rsplit("-", 1)[1], *numbers]))
        elif args.llama_cpp:
            kind, script = name.removeprefix("llama.cpp-"), str(PEERS / "llama_cpp_speed.py")
            made = [args.llama_cpp, script, "make", str(SHAPE / "config.json"), args.gguf, kind]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found.append(Peer(name, [args.llama_cpp, script, "run", f"{args.gguf}/{kind}.gguf", *numbers]))
    return found


def wait_until_idle(patience_s: float = 120.0) -> float:
    """Share of idle processor time over a second, once it is large enough; HalveError when it never is."""

    def ticks() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return numbers[3] + numbers[4], sum(numbers)

    if not Path("/proc/stat").exists():
        return 1.0
    share, deadline = 0.0, time.monotonic() + patience_s
    while time.monotonic() < deadline:
        idle, total = ticks()
        time.sleep(1)
        now_idle, now_total = ticks()
        share = (now_idle - idle) / max(1, now_total - total)
        if share >= IDLE_SHARE:
            return share
    raise HalveError(f"only {share:.0%} of the processor is idle: stop what else runs, or the figures mean nothing")


def chosen(only: str | None) -> list[list[str]]:
    """The names of each half, those asked for or all but the rare ones; HalveError for an unknown name."""
    if not only:
        return [[name for name in half if name not in RARE] for half in HALVES]
    names = only.split(",")
    if unknown := set(names) - {*VARIANTS, *PROGRAMS}:
        raise HalveError(f"--only {min(unknown)}: use some of {', '.join((*VARIANTS, *PROGRAMS))}")
    return [names]


def timed_models_of(names: Sequence[str], dense: Model, settings: BenchmarkOptions) -> dict[str, TimedModel]:
    """Ours among `names`, built from the dense model."""
    checkpoint, found = open_checkpoint(SHAPE, random_weights=True), {}
    for name in names:
        if name in VARIANTS:
            found[name] = TimedModel(f"Llama-3.2-1B shape, {VARIANTS[name].title}", checkpoint)
            found[name]._model = build(dense, VARIANTS[name])
            found[name].not_measured = {
                "accuracy": "the weights are random",
                "peak_memory_bytes": "several programs were in memory",
            }
    return found


@dataclass
class Turns:
    """What was seen of one half: every program's passes that count, the read bandwidth beside each, and all of those."""

    passes: dict[str, list[PassTimes]]
    beside: dict[str, list[float]]
    bandwidths: list[float]
    idle: float


def take_turns(
    models: dict[str, TimedModel], peers: list[Peer], settings: BenchmarkOptions, patience_s: float
) -> Turns:
    """Warm everything up, then all in turn, round by round."""
    prompt = random_prompt(next(iter(models.values())).model, settings.prompt_tokens, settings.seed)
    runs: dict[str, Callable[[], PassTimes]] = {
        name: partial(time_pass, timed.model, prompt, settings.new_tokens) for name, timed in models.items()
    }
    runs |= {peer.name: peer.measure for peer in peers}
    try:
        for peer in peers:
            peer.start()
        for timed in models.values():
            time_pass(timed.model, prompt, 3)
        idle, bandwidths = wait_until_idle(), [bandwidth_gb_per_s("cpu")]
        # per pass the lower and the higher bandwidth of those before and after it
        seen: dict[str, list[tuple[float, float, PassTimes]]] = {name: [] for name in runs}
        end = time.monotonic() + patience_s

        def disturbed(bandwidth: float) -> bool:
            return bandwidth < BANDWIDTH_SHARE * max(bandwidths)

        def wanting(name: str) -> bool:
            undisturbed = sum(not disturbed(lower) for lower, *_ in seen[name])
            return len(seen[name]) < settings.runs or (undisturbed < settings.runs and time.monotonic() < end)

        while any(map(wanting, runs)):
            for name in filter(wanting, runs):
                while disturbed(bandwidths[-1]) and time.monotonic() < end:
                    time.sleep(1)
                    bandwidths.append(bandwidth_gb_per_s("cpu"))
                before, times = bandwidths[-1], runs[name]()
                bandwidths.append(bandwidth_gb_per_s("cpu"))
                seen[name].append((min(before, bandwidths[-1]), max(before, bandwidths[-1]), times))
    finally:
        for peer in peers:
            peer.stop()
    best = {name: sorted(passes, key=lambda p: -p[0])[: settings.runs] for name, passes in seen.items()}
    return Turns(
        {name: [times for *_, times in passes] for name, passes in best.items()},
        {name: [higher for _, higher, _ in passes] for name, passes in best.items()},
        bandwidths,
        idle,
    )


def measure(names: list[str], dense: Model, args: argparse.Namespace) -> dict[str, Record]:
    """Load all of `names` that is installed, measure it in turn; returns the records by name."""
    settings = BenchmarkOptions(args.prompt_tokens, args.new_tokens, args.runs, 0)
    peers = peers_of([name for name in names if name in PROGRAMS], args, settings)
    models = timed_models_of(names, dense, settings)
    turns = take_turns(models, peers, settings, args.patience)
    best = max(turns.bandwidths)
    command = "python benchmarks/run.py cpu" + (f" --only {args.only}" if args.only else "")
    placement = Placement("cpu", torch.bfloat16, "auto", True)
    records = {}
    for name, timed in models.items():
        timed.passes = {settings.prompt_tokens: turns.passes[name]}
        records[name] = make_record(timed, settings, placement, best, command)
        records[name] |= {"program": "halve", "recipe": list(VARIANTS[name].recipe)}
    kv = kv_bytes_per_step(dense, settings.prompt_tokens + settings.new_tokens // 2)
    for peer in peers:
        records[peer.name] = peer_record(peer, turns.passes[peer.name], settings, best, kv, command)
    for name, record in records.items():
        step_mb = record["floor_ms"] * best
        beside = zip(turns.beside[name], turns.passes[name], strict=True)
        shares = [step_mb / bandwidth / spread(times.steps_ms)[1] for bandwidth, times in beside]
        record |= {
            "floor_beside_share": spread(shares)[1],
            "bandwidths_beside_gb_per_s": turns.beside[name],
            "bandwidths_gb_per_s": turns.bandwidths,
            "in_turn": list(records),
            "idle_share_before": turns.idle,
        }
    return records


def peer_record(
    peer: Peer, passes: list[PassTimes], settings: BenchmarkOptions, bandwidth: float, kv_bytes: int, command: str
) -> Record:
    """The figures of a peer under the names that ours have."""
    _, ttft, _ = spread([t.ttft_ms for t in passes])
    low, step, high = spread([ms for t in passes for ms in t.steps_ms])
    _, rate, _ = spread([1e3 * len(t.steps_ms) / sum(t.steps_ms) for t in passes])
    floor = (peer.about["weight_bytes"] + kv_bytes) / (bandwidth * 1e9) * 1e3
    return new_record(
        "benchmark",
        f"Llama-3.2-1B shape, {peer.name}",
        command=command,
        recipe=[],
        program=peer.name,
        program_version=peer.about["version"],
        program_build=peer.about["build"],
        device="cpu",
        device_name=cpu_model(),
        dtype="bfloat16",
        random_weights=True,
        batch=1,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        runs=settings.runs,
        ttft_ms=ttft,
        prefill_tokens_per_s=1e3 * settings.prompt_tokens / ttft,
        decode_ms_median=step,
        decode_ms_p10=low,
        decode_ms_p90=high,
        decode_tokens_per_s=rate,
        floor_ms=floor,
        floor_share=floor / step,
        weight_bytes=peer.about["weight_bytes"],
        step_weight_bytes=peer.about["weight_bytes"],  # all of them tie the head to the embedding
        bandwidth_gb_per_s=bandwidth,
    )


def add_targets(records: dict[str, Record]) -> None:
    """Ratios within the run, each beside what was aimed at."""
    for name, (rivals, needed) in DECODE_TARGETS.items():
        best = max((records[r]["decode_tokens_per_s"] for r in rivals if r in records), default=None)
        if name in records and best is not None:
            against = records[name]["decode_tokens_per_s"] / best
            records[name] |= {"decode_to_llama_cpp": against, "decode_to_llama_cpp_target": needed}
    if "bf16" in records:
        dense = records["bf16"]
        dense["floor_share_target"] = FLOOR_TARGET
        if "hugging-face-eager" in records:
            theirs = records["hugging-face-eager"]["prefill_tokens_per_s"]
            dense |= {"prefill_to_hugging_face": dense["prefill_tokens_per_s"] / theirs}
        for name in ("int8", "int4"):
            if name in records:
                share = records[name]["prefill_tokens_per_s"] / dense["prefill_tokens_per_s"]
                records[name] |= {"prefill_to_bf16": share, "prefill_to_bf16_target": PREFILL_TARGET}
    for name, whole in PRUNED_FROM.items():
        if name in records and whole in records:
            speed = records[whole]["decode_ms_median"] / records[name]["decode_ms_median"]
            ratio = records[whole]["step_weight_bytes"] / records[name]["step_weight_bytes"]
            records[name] |= {"speed_up": speed, "bytes_ratio": ratio, "speed_up_of_bytes_share": speed / ratio}


def cpu(args: argparse.Namespace) -> None:
    """Everything asked for, its records, the tables."""
    if args.llama_cpp and not args.gguf:
        raise HalveError("--llama-cpp needs --gguf FOLDER for its models (6 GB)")
    if args.llama_cpp and not shutil.which(args.llama_cpp):
        raise HalveError(
            f"--llama-cpp {args.llama_cpp}: no such program; benchmarks/peers/README.md says how to make one"
        )
    if min(args.runs, args.threads) < 1 or min(args.prompt_tokens, args.new_tokens) < 2:
        raise HalveError("--runs and --threads have to be 1 or more, --prompt-tokens and --new-tokens 2 or more")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    dense = load_model(SHAPE, random_weights=True)
    written: set[str] = set()
    for names in chosen(args.only):
        records = measure(names, dense, args)
        add_targets(records)
        for name, record in records.items():
            rate, prefill = f"{record['decode_tokens_per_s']:6.1f} tokens/s", record["prefill_tokens_per_s"]
            print(
                f"{name:22} {rate}  {record['floor_beside_share']:4.0%} of the floor  prefill {prefill:4.0f} tokens/s"
            )
            if name not in written:  # bf16 is in both halves
                write_record(args.out / f"{name}.json", record)
                written.add(name)
    if args.out == RESULTS:
        update(ROOT, check=False)


def main() -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu"])
    parser.add_argument("--only", help="some of " + ", ".join((*VARIANTS, *PROGRAMS)))
    parser.add_argument("--llama-cpp", help="the Python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--gguf", help="a folder for llama.cpp's models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600, help="seconds in which a half repeats disturbed passes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    try:
        cpu(parser.parse_args())
    except HalveError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
