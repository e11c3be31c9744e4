"""Valid folders with something changed by a seeded draw, and what becomes of each: an error of halve's, or a finite result.

    python -m tests.fuzz OUT.json                    HALVE_FUZZ_COUNT mutants (5000) and a record of what became of them
    python -m tests.fuzz NUMBER [NUMBER...]          these mutants again, with what was changed and the traceback

Each mutant has a random.Random of its own, so that any of them can be made again. It runs in this process, which may take
no more than MEMORY beyond what it has (RLIMIT_AS, then ru_maxrss), in no more than SECONDS (an alarm, then the clock).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from halve import compress, convert, generate, load_model, load_tokenizer
from halve.compression.compress import plan_recipe
from halve.compression.recipe import as_steps, read_recipe
from halve.compression.step_run import Request
from halve.errors import HalveError
from halve.measure.quality.race import load_question_set
from halve.texts import read_documents
from tests.checkpoint.test_gptq_format import to_gptq
from tests.common import RAW, raw_json, write_lines
from tests.vocabularies import small_folder

SECONDS, MEMORY = 10, 1 << 30
SEED = 7


class Escape(Exception):  # noqa: N818 - not an error of a program
    """What no file may bring about."""


@dataclass(frozen=True)
class Sample:
    """A valid folder, the files that are changed, and what reads them."""

    folder: Path
    files: tuple[str, ...]
    entries: tuple[Callable[[Path], object], ...]


@dataclass(frozen=True)
class Fate:
    """What was changed in which kind of file, and the outcome: "accepted", a class of error, or "escape" and why."""

    file: str
    change: str
    outcome: str
    why: str = ""


# what reads a folder


@torch.inference_mode()
def run_model(folder: Path) -> None:
    model = load_model(folder)
    prompt = [1, 2, 5]
    (made,) = generate(model, [prompt], max_new_tokens=3)
    if not model(torch.tensor([prompt + made.tokens]))[:, -1].isfinite().all():
        raise Escape("logits are not finite")


def plan_model(folder: Path) -> None:
    plan = plan_recipe(
        Request(str(folder), folder.parent / "out", as_steps(["rtn:bits=8,targets=lm_head", "drop-layers:count=1"]))
    )
    if not 0 < plan.bytes_after < 1 << 30:
        raise Escape(f"{plan.bytes_after} bytes planned")


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the text — 日本", bos=True)
    tokenizer.decode(ids)
    tokenizer.byte_counts("the text")
    assert tokenizer.end_of_text_id is None or tokenizer.end_of_text_id >= 0


def _reads(name: str, read: Callable[[Path], Any]) -> Callable[[Path], object]:
    def entry(folder: Path) -> None:
        json.dumps(repr(read(folder / name))).encode()

    return entry


# valid folders


def make_samples(root: Path) -> dict[str, Sample]:
    """By what they hold; tiny models of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=304, num_key_value_heads=2, max_position_embeddings=64, **small)
    made = LlamaForCausalLM(config)
    dense = root / "dense"
    made.save_pretrained(dense)
    compress(dense, root / "packed", ["rtn:bits=4,group_size=8,symmetric=false", "l1-inputs:fraction=0.3"])
    to_gptq(dense, root / "both", "gptq", shuffle=True, sym=False)
    pickled = root / "pickled"
    shutil.copytree(dense, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(dict(made.state_dict()), pickled / "pytorch_model.bin")
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    small_folder(tokenizer)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(dense / name, tokenizer)
    texts = root / "texts"
    (texts / "race").mkdir(parents=True)
    (texts / "text.txt").write_text("A story — with words.\n<|endoftext|>\nAnother one.\r\n" * 5)
    article = {"article": "It rained.", "questions": ["What?", "When?"], "options": [["a", "b"], ["c", "d", "e"]]}
    rows = [{"id": f"{n}", "year": 3} | article | {"answers": ["A", "C"]} for n in range(4)]
    write_lines(texts / "text.jsonl", *({"text": f"story {n}"} for n in range(4)))
    write_lines(texts / "questions.jsonl", *rows)
    for name in ("1.txt", "2.txt"):
        (texts / "race" / name).write_text(json.dumps(rows[0]))
    steps = [
        {"prune-mlp": {"fraction": 0.25, "multiple_of": 4}},
        "gptq:bits=4,group_size=8,targets='re:.*q_proj'",
        "rtn",
    ]
    (texts / "recipe.yaml").write_text(json.dumps({"steps": steps}, indent=1))

    def plan_written(path: Path) -> int:
        return plan_recipe(Request(str(dense), path.parent / "out", list(read_recipe(path)))).bytes_after

    def convert_it(folder: Path) -> None:
        run_model(convert(folder, folder.parent / "converted", overwrite=True))

    model = (run_model, plan_model)
    samples = {
        name: Sample(
            folder, tuple(path.name for path in sorted(folder.iterdir()) if path.name != "halve-log.jsonl"), entries
        )
        for name, folder, entries in (
            ("dense", dense, model),
            ("packed", root / "packed", model),
            ("gptq", root / "both" / "gptq", model),
            ("pickled", pickled, (convert_it,)),
            ("tokenizer", tokenizer, (use_tokenizer,)),
        )
    }
    readers = {
        "text.txt": (_reads("text.txt", read_documents),),
        "text.jsonl": (_reads("text.jsonl", read_documents),),
        "questions.jsonl": tuple(
            _reads("questions.jsonl", r) for r in (read_documents, lambda p: load_question_set(p, None))
        ),
        "race/1.txt": tuple(_reads("race", r) for r in (read_documents, lambda p: load_question_set(p, None))),
        "recipe.yaml": (_reads("recipe.yaml", plan_written),),
    }
    return samples | {name: Sample(texts, (name,), entries) for name, entries in readers.items()}


# what is changed

VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    2.5,
    1e300,
    2**31,
    2**63,
    10**19,
    -(10**9),
    "",
    "3",
    "x",
    "a" * 3000,
]
VALUES += ["\ud800\x1b[1m\n", "../x", "/etc/passwd", "\0", [], {}, [[]], {"": None}, [1, "a"], ["x"] * 50, *RAW]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from places(inner)


def change_json(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One to three values replaced, left out, doubled or put under another name, in an object or in one of JSON lines."""
    lines = content.decode().strip().split("\n")
    row = draw.randrange(len(lines)) if len(lines) > 1 and lines[0].endswith("}") else None
    value, said = json.loads(content if row is None else lines[row]), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (found := list(places(value))):
            break
        container, key = draw.choice(found)
        how = draw.random()
        if how < 0.7:
            new = deepcopy(draw.choice(VALUES))
            if how > 0.6:
                new = deepcopy(draw.choice([c[k] for c, k in found]))
            container[key] = new
            said.append(f"{key}={str(new)[:40]!r}")
        elif how < 0.85 or isinstance(container, list):
            del container[key]
            said.append(f"no {key}")
        else:
            container[draw.choice(("x", "", "k" * 3000, f"{key}_", *(k for _, k in found if isinstance(k, str))))] = (
                deepcopy(container[key])
            )
            said.append(f"{key} again")
    text = raw_json(value)
    if row is not None:
        text = "\n".join([*lines[:row], text, *lines[row + 1 :]])
    return text.encode(), ", ".join(said)


def change_bytes(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes flipped, cut off, put in, or a part repeated; where a header would be more often than elsewhere."""
    end = draw.choice((len(content), min(len(content), 3000), min(len(content), 16)))
    place, how = draw.randrange(max(1, end)), draw.randrange(6)
    if how < 2:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 4, 30)) if content else 0):
            changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
        return bytes(changed), f"bits flipped before {end}"
    if how == 2:
        return content[:place], f"cut at {place}"
    if how == 3:
        part = content[place : place + draw.randrange(1, 2000)]
        return content[:place] + part * draw.choice((2, 50)) + content[place:], f"{len(part)} bytes repeated at {place}"
    odd = draw.choice(
        (
            b"\0",
            b"\xff",
            b"\xef\xbb\xbf",
            b"\xed\xa0\x80",
            b"\r",
            b"{",
            b"\n",
            b"9" * 30,
            b"'",
            b"*a",
            b"!!python/name:os",
        )
    )
    return content[:place] + odd + content[place + draw.choice((0, len(odd))) :], f"{odd!r} at {place}"


def change_header(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Of a safetensors file: fields of its header, the rest as it was."""
    length = int.from_bytes(content[:8], "little")
    header, said = change_json(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :], f"header: {said}"


def change_tensor(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Of a safetensors file: one tensor of another dtype, shape or name, gone, or with other values."""
    tensors = load(content)
    name = draw.choice(sorted(tensors))
    made, said = other_tensor(tensors.pop(name), draw)
    if made is not None:
        tensors[draw.choice((name,) * 9 + (f"{name}_", name.replace("0", "1"), name.replace("weight", "bias")))] = made
    return save(
        {key: value.contiguous().clone() for key, value in tensors.items()}, {"format": "pt"}
    ), f"{name}: {said}"


def other_tensor(tensor: Tensor, draw: random.Random) -> tuple[Tensor | None, str]:
    """None for a tensor that is left out."""
    how = draw.randrange(8)
    if how == 0:
        return None, "gone"
    if how == 1:
        dtype = draw.choice(
            (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)
        )
        return tensor.to(dtype), str(dtype)
    if how == 2:
        shapes = [
            tensor.t() if tensor.dim() == 2 else tensor[None],
            tensor.flatten(),
            tensor[:-1],
            tensor[:0],
            tensor[..., None],
        ]
        return draw.choice([*shapes, torch.zeros((), dtype=tensor.dtype), torch.cat([tensor, tensor])]), "another shape"
    flat = tensor.clone().flatten()
    place = draw.randrange(max(1, flat.numel()))
    if how == 3:
        return tensor.flip(0), "in the other order"
    if tensor.is_floating_point():
        value = draw.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 3e4, 1e-42, 0.0))
    else:
        value = draw.choice((-1, 0, 1, 2**31 - 1, -(2**31), 97, 48, 32))
    value = min(value, 6e4) if tensor.dtype == torch.float16 and value > 0 and value < 1e39 else value
    if how < 6:
        flat[place : place + draw.choice((1, 7))] = value
    else:
        flat[:] = value
    return flat.view(tensor.shape), f"{'all' if how >= 6 else place} = {value}"


def change_entry(path: Path, draw: random.Random) -> str:
    """The file itself: gone, empty, a folder, a link, a pipe, another file's content, or not permitted."""
    content = path.read_bytes()
    path.unlink()
    how = draw.choice(("gone", "empty", "folder", "link", "loop", "outside", "pipe", "other", "closed", "moved"))
    if how in ("empty", "closed"):
        path.write_bytes(b"" if how == "empty" else content)
        path.chmod(0o644 if how == "empty" else 0)
    elif how == "folder":
        path.mkdir()
    elif how in ("link", "loop", "outside"):
        path.symlink_to({"link": "missing", "loop": path.name, "outside": "/etc/hostname"}[how])
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "other" and (others := sorted(p for p in path.parent.iterdir() if p.is_file())):
        shutil.copy(draw.choice(others), path)
    elif how == "moved":
        path.with_name(f"{path.name}.copy{path.suffix}").write_bytes(content)
    return how


def mutate(path: Path, draw: random.Random) -> str:
    """Change one file and say how."""
    if draw.random() < 0.08:
        return change_entry(path, draw)
    changes = [change_bytes]
    if path.suffix == ".safetensors":
        changes += [change_header, change_tensor, change_tensor, change_tensor]
    elif path.suffix in (".json", ".jsonl", ".yaml") or path.parent.name == "race":
        changes += [change_json] * 4
    content, said = draw.choice(changes)(path.read_bytes(), draw)
    path.write_bytes(content)
    return said


# what becomes of it


def run_mutant(samples: dict[str, Sample], number: int, place: Path, seed: int = SEED, *, show: bool = False) -> Fate:
    """Make mutant `number` in the folder `place`, which is made and removed, and have it read."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choice(list(samples))
    sample = samples[kind]
    folder, name = place / kind.replace("/", "-"), draw.choice(sample.files)
    shutil.copytree(sample.folder, folder)
    change = f"{mutate(folder / name, draw)} in {name}"
    file = {".safetensors": f"weights, {kind}", ".bin": "weights, pickled"}.get((folder / name).suffix, name)
    entry = draw.choice(sample.entries)
    try:
        with bounded():
            entry(folder)
    except HalveError as error:
        if show:
            print(f"{type(error).__name__}: {error}")
        wrong = fault(str(error), folder)
        return Fate(
            file, change, "escape" if wrong else type(error).__name__, f"{wrong}: {error}"[:1500] if wrong else ""
        )
    except Exception as error:
        if show:
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Fate(file, change, "escape", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:1500])
    finally:
        shutil.rmtree(place)
    return Fate(file, change, "accepted")


def fault(message: str, folder: Path) -> str | None:
    """What is wrong with an error's text, None for nothing: one short line that names a path or a value."""
    if len(message.splitlines()) != 1:
        return "not one line"
    if len(message.replace(str(folder.parent), "")) >= 1000:
        return f"{len(message)} characters"
    return None if re.search(r"/|=|['\"]|\bstep [\w-]+|logits are not finite", message) else "names nothing"


@contextmanager
def bounded() -> Iterator[None]:
    """Escape for what takes more than SECONDS or MEMORY."""

    def stop(*_: object) -> None:
        raise Escape(f"more than {SECONDS} s")

    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if time.monotonic() - started > SECONDS:
            stop()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY // 2:
            raise Escape(f"{grown:,} bytes more")


def main() -> None:
    from halve.measure.records import new_record, write_record

    parser = argparse.ArgumentParser(description="Repeat mutants by number, or draw many and write their record.")
    parser.add_argument("wanted", nargs="+", metavar="NUMBER... | OUT.json")
    wanted, root = parser.parse_args().wanted, Path(tempfile.mkdtemp())
    try:
        samples = make_samples(root / "samples")
        if all(word.isdecimal() for word in wanted):
            for number in map(int, wanted):
                print(number, run_mutant(samples, number, root / "mutant", show=True))
            return
        count, outcomes, escapes = int(os.environ.get("HALVE_FUZZ_COUNT", "5000")), defaultdict(Counter), 0
        for number in range(count):
            (root / "number").write_text(str(number))  # which it was, should the process end
            fate = run_mutant(samples, number, root / "mutant")
            outcomes[fate.file][fate.outcome] += 1
            if fate.outcome == "escape":
                escapes += 1
                print(f"{number}: {fate}", flush=True)
        kinds = sorted({outcome for counts in outcomes.values() for outcome in counts} | {"accepted", "escape"})
        rows = [
            {"file": file, "mutants": counts.total(), **{kind: counts[kind] for kind in kinds}}
            for file, counts in sorted(outcomes.items())
        ]
        body = {
            "seed": SEED,
            "mutants": count,
            "escapes": escapes,
            "memory_bytes": MEMORY,
            "seconds": SECONDS,
            "files": rows,
        }
        command = "python -m tests.fuzz benchmarks/results/fuzz.json"
        write_record(wanted[0], new_record("fuzz", "random weights", command=command, recipe=[], **body))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
