"""The model card: README.md of a compressed model, for people and for the hub. START HERE: `write_card`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from halve._version import __version__
from halve.checkpoint.identity import model_sha256
from halve.checkpoint.manifest import Manifest
from halve.checkpoint.reader import Checkpoint, open_checkpoint
from halve.compression.plan import state_of
from halve.errors import DataError, OutputError, refuse_pipe
from halve.escapes import markdown, plain
from halve.files import check_output_path, write_text
from halve.files.contents import CARD, CHECK, is_card, leads_outside, sealed_card
from halve.files.typed import check_type, read_value
from halve.measure.records import AnyRecord, Measurement, find_records
from halve.measure.table import evaluation_setups, markdown_table
from halve.measure.units import show_bytes, show_kl, show_percent, show_perplexity
from halve.report.models import step_text

_LARGEST = 1 << 20  # bytes of a card that are read
# of the source's card, what holds for what was made of it
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model", "tags")
_OURS = "halve"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TITLES = ["measured", "figure", "value", "95 % interval"]
_NONE = "-"
Metadata = dict[str, str | list[str]]


def write_card(
    out: str | os.PathLike[str],
    records: Iterable[str | os.PathLike[str]] = (),
    *,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_left_out: Callable[[str], None] | None = None,
) -> Path:
    """Write README.md of a model that halve made: what was done, what it cost, how to load it. Returns its path.

    Figures are those of OUT/halve-check.json and of `records` (files, or folders of them) whose `model_sha256` is this
    model's. A file named itself that is of another model raises DataError; what is passed over in a folder goes to
    `on_left_out` as a sentence. What the card of `source` (the folder it was made from), or the card that is there, says of
    licence, language and base model is kept. Raises OutputError for a README.md that halve did not write, or that was changed
    since, unless `overwrite`.
    """
    folder = Path(os.path.expanduser(out))
    manifest = _manifest(folder)
    checkpoint = open_checkpoint(str(folder))
    target = _target(folder, overwrite)
    measured = _measured(folder, records, on_left_out or (lambda _: None))
    carried = _carried(target) | _carried(None if source is None else Path(source) / CARD)
    write_text(target, sealed_card(_text(checkpoint, manifest, carried, measured)))
    return target


def _manifest(folder: Path) -> Manifest:
    path = folder / "halve.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: is no model that halve compressed (it has no halve.json): name the OUT of halve compress"
        )
    value = read_value(path)
    check_type(value, Manifest, path)
    return cast(Manifest, value)


def _target(folder: Path, overwrite: bool) -> Path:
    """Where the card goes; raises OutputError where it may not."""
    target = folder / CARD
    refuse_pipe(target, OutputError)
    if target.is_file() and not is_card(target) and not overwrite:
        raise OutputError(
            f"{target}: was not written by halve, or was changed since: move it elsewhere, or replace it with --overwrite"
        )
    return check_output_path(target, "a card", lambda _: True)


def _measured(
    folder: Path, places: Iterable[str | os.PathLike[str]], on_left_out: Callable[[str], None]
) -> list[AnyRecord]:
    """The records of this model, the newest of every measurement."""
    sha256 = model_sha256(folder)
    newest: dict[Measurement, AnyRecord] = {}
    named = [Path(os.path.expanduser(place)) for place in places]
    own = folder / CHECK
    for place in [own] * own.is_file() + named:
        try:
            found = find_records([place])
        except DataError as error:
            if place != own:
                raise
            on_left_out(str(error))
            continue
        for why in found.left_out:
            on_left_out(why)
        for record in found.records:
            reason = _why_not(record, sha256)
            if reason is None:
                key = dataclasses.replace(Measurement.of(record), model="")
                if key not in newest or str(record["date"]) >= str(newest[key]["date"]):
                    newest[key] = record
            elif place.is_dir() or place == own:
                on_left_out(f"{place}: {reason}")
            else:
                raise DataError(f"{place}: {reason}")
    return list(newest.values())


def _why_not(record: AnyRecord, sha256: str) -> str | None:
    """Why a record says nothing of the model of this hash; None where it does."""
    told = f"the record of '{record['model']}' ({record['kind']})"
    if record["kind"] not in ("evaluation", "benchmark"):
        return f"{told} holds no figures of one model: give records of halve evaluate and halve benchmark"
    if "model_sha256" not in record:
        return f"{told} does not say by content what was measured: measure this model again"
    if record["model_sha256"] != sha256:
        return f"{told} is of another model, or of this one before it was changed: measure this one"
    return None


def _carried(card: Path | None) -> Metadata:
    """What a card says that holds for every model made of its model; nothing where there is none or it cannot be read."""
    if card is None or not card.is_file() or leads_outside(card.name, card.parent):
        return {}
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        with card.open("rb") as file:
            front = REGEX_YAML_BLOCK.search(file.read(_LARGEST).decode("utf-8", "replace"))
        # every scalar as text: Norwegian is written `no`, which is false elsewhere
        found = {} if front is None else yaml.load(front[2], Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in _CARRIED if _are_words(found.get(key))}


def _are_words(value: Any) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word for word in words)


def _text(checkpoint: Checkpoint, manifest: Manifest, carried: Metadata, measured: Sequence[AnyRecord]) -> str:
    config, name = checkpoint.raw, checkpoint.folder.resolve().name
    parts = [
        f"---\n{_front_matter(manifest, config, carried)}\n---\n",
        "# " + markdown(name).replace("#", r"\#") + "\n",  # a # at the end would be part of the mark
        _lead(checkpoint, manifest),
        *_done(name, manifest),
        "## What it cost\n",
        _cost(measured),
        "## How to load it\n",
        *_loading(name, config),
    ]
    return "\n".join(parts)


def _front_matter(manifest: Manifest, config: Mapping[str, Any], carried: Metadata) -> str:
    """The metadata that the hub reads (https://huggingface.co/docs/hub/model-cards)."""
    from huggingface_hub import ModelCardData

    told = dict(carried)
    if _is_hub_id(manifest["base_model"]):
        told["base_model"] = manifest["base_model"]
    tags = told.pop("tags", [])
    own = [_OURS, *(["compressed-tensors"] if "quantization_config" in config else [])]
    # the hub knows no word for a pruned model
    relation = {"base_model_relation": "quantized"} if "base_model" in told and "quantization_config" in config else {}
    data = ModelCardData(
        library_name="transformers" if _loads_in_transformers(config) else _OURS,
        tags=list(dict.fromkeys([*own, *([tags] if isinstance(tags, str) else tags)])),
        **cast(dict[str, Any], told | relation),
    )
    return data.to_yaml()


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _lead(checkpoint: Checkpoint, manifest: Manifest) -> str:
    base = markdown(manifest["base_model"])
    if _is_hub_id(manifest["base_model"]):
        base = f"[{base}](https://huggingface.co/{manifest['base_model']})"
    sentence = f"This is {base}, made smaller by halve {__version__} without retraining"
    if before := manifest.get("weight_bytes_before"):
        after = state_of(checkpoint, None).nbytes
        sentence += f": {show_bytes(before)} of weights became {show_bytes(after)} ({show_percent(after / before, 0)})"
    return f"{sentence}.\n"


def _done(name: str, manifest: Manifest) -> Iterator[str]:
    """The recipe: a row a step, and as a command."""
    yield "## What was done\n"
    rows = []
    for step in manifest["steps"]:
        done = [line for line in step["linears"] if line["action"] != "skipped"]
        sizes = [show_bytes(step["linear_bytes_before"]), show_bytes(step["linear_bytes_after"])]
        text = markdown(step_text(step.get("resolved") or step))
        rows.append([text, f"{len(done)} of {len(step['linears'])}", *sizes])
    yield markdown_table(["step", "linears", "their bytes before", "after"], rows)
    command = ["halve", "compress", manifest["base_model"], name]
    command += [word for step in manifest["recipe"] for word in ("--step", step_text(step))]
    if origin := manifest["calibration"]:
        told = {key: str(origin.get(key)) for key in ("source", "windows", "windows_asked", "window_tokens", "seed")}
        text = f"{told['windows']} windows of {told['window_tokens']} tokens of {told['source']}"
        yield f"Calibrated on {markdown(text)}, drawn with seed {markdown(told['seed'])}.\n"
        options = {"calibration": "source", "samples": "windows_asked", "window": "window_tokens", "seed": "seed"}
        command += [word for option, key in options.items() for word in (f"--{option}", told[key])]
    yield "As one command (`halve.json` says what it did to every linear):\n"
    yield _code(shlex.join(command))


def _code(*lines: str) -> str:
    """Lines as they are: indented, so that no backtick ends it."""
    return "".join(f"    {plain(line)}\n" for line in lines)


def _cost(measured: Sequence[AnyRecord]) -> str:
    if not measured:
        return (
            "Not measured yet. `halve evaluate` with `--base` and the model that this one was made from says what it cost, "
            "`halve benchmark` how fast it is; `halve card` puts their records here.\n"
        )
    setups = evaluation_setups(Measurement.of(record) for record in measured)
    rows = []
    for record in measured:
        if record["kind"] == "evaluation":
            asked, figures = setups[Measurement.of(record)], _quality(record)
        else:
            asked, figures = f"speed on {record['device_name']}, {record['dtype']}", _speed(record)
        rows += [[markdown(asked), markdown(figure), value, interval] for figure, value, interval in figures]
    return markdown_table(_TITLES, rows)


def _quality(record: AnyRecord) -> Iterator[tuple[str, str, str]]:
    """Figure, value and interval, each in words, of an evaluation."""
    base = record.get("base")
    dense = Path(base["model"]).name if base else ""
    # tokens that a file of predictions does not keep count as one
    least, most = (" (at least)", " (at most)") if base and base["kept"] else ("", "")
    factor = "{:.4g}".format
    kl, ratio, same = "kl_nats_per_token", "perplexity_ratio", "same_top_share"
    yield from _row(record, f"KL divergence from {dense}, nats a token{least}", kl, show_kl, f"{kl}_interval")
    yield from _row(record, f"same top token as {dense}", same, show_percent, f"{same}_interval")
    yield from _row(record, f"expected acceptance by {dense}{most}", "expected_acceptance", show_percent)
    if record["task"] == "perplexity":
        yield from _row(record, "perplexity", "perplexity", show_perplexity)
        yield from _row(record, f"perplexity of {dense}", "base_perplexity", show_perplexity)
        yield from _row(record, f"perplexity / that of {dense}", ratio, factor, f"{ratio}_interval")
    else:
        yield from _row(record, "accuracy", "accuracy", show_percent, "accuracy_ci95")
        yield from _row(record, f"accuracy of {dense}", "base_accuracy", show_percent)
        yield from _row(record, f"same answer as {dense}", "agreement", show_percent)
        yield from _row(record, "right to wrong, questions", "right_to_wrong", str)
        yield from _row(record, "wrong to right, questions", "wrong_to_right", str)


def _row(
    record: AnyRecord, figure: str, key: str, show: Callable[[Any], str], interval: str = ""
) -> Iterator[tuple[str, str, str]]:
    """The row of a figure, none where the record has no such figure; in words what JSON has no number for."""
    if key not in record:
        return
    low, high = record.get(interval) or (None, None)
    value = markdown(record.get("not_finite", {}).get(key, "undefined")) if record[key] is None else show(record[key])
    yield figure, value, _NONE if low is None or high is None else f"{show(low)} to {show(high)}"


def _speed(record: AnyRecord) -> Iterator[tuple[str, str, str]]:
    """The same of a benchmark."""
    yield "decode, tokens/s", f"{record['decode_tokens_per_s']:.1f}", _NONE
    yield f"time to the first token, prompt of {record['prompt_tokens']} tokens", f"{record['ttft_ms']:.1f} ms", _NONE
    if record.get("peak_memory_bytes") is not None:
        tokens = record.get("peak_memory_prompt_tokens", record["prompt_tokens"])
        yield f"peak memory, prompt of {tokens} tokens", show_bytes(record["peak_memory_bytes"]), _NONE


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of weights that share a scheme."""
    return list((config.get("quantization_config") or {}).get("config_groups", {}).values())


def _asymmetric(config: Mapping[str, Any]) -> bool:
    return any(not (group.get("weights") or {}).get("symmetric", True) for group in _groups(config))


def _loads_in_transformers(config: Mapping[str, Any]) -> bool:
    """Whether the table of docs/formats.md says so: where it expands weights as it loads, it knows one scheme a folder."""
    expanded = _asymmetric(config) or any(
        target.endswith("embed_tokens") for group in _groups(config) for target in group.get("targets", [])
    )
    return config.get("model_type") != _OURS and not (expanded and len(_groups(config)) > 1)


def _loading(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """In which programs it loads, and how (docs/formats.md, "Who can load it")."""
    if not _loads_in_transformers(config):
        yield "It loads in halve alone: transformers has no place for what was done.\n"
    else:
        needs = " with the package `compressed-tensors`" if _groups(config) else ""
        asymmetric = _asymmetric(config)
        yield f"In transformers{needs}:\n"
        path = json.dumps(plain(name), ensure_ascii=False)
        instead = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asymmetric else ""
        names = f"AutoModelForCausalLM, AutoTokenizer{', CompressedTensorsConfig' if asymmetric else ''}"
        yield _code(
            f"from transformers import {names}",
            f"model = AutoModelForCausalLM.from_pretrained({path}{instead})",
            f"tokenizer = AutoTokenizer.from_pretrained({path})",
        )
    yield "In halve:\n"
    yield _code(f'halve generate {shlex.quote(plain(name))} --prompt "Once upon a time"')
