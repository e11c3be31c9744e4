"""Documents and rows from anywhere: text files, JSON lines, RACE folders, data sets of the hub. The only reader of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halve.errors import DataError, first_line, reading, refuse_pipe

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"  # between the documents of a text file
HUB_DATASETS: dict[str, tuple[str, dict[str, str], str]] = {
    # name: (hub id, what to load of it, field of the text)
    "c4": ("allenai/c4", {"data_files": "en/c4-train.00000-of-01024.json.gz"}, "text"),
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "text"),
}
HUB_DOCUMENTS = 20_000  # documents of a set of the hub that are read


def read_file(file: Path) -> tuple[str, bytes]:
    """The text of a UTF-8 file, a byte-order mark left out and lines ended by \\n, and its bytes as they are."""
    with reading(file, DataError):
        refuse_pipe(file, DataError)
        content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text; convert the file to UTF-8") from None
    return text.replace("\r\n", "\n"), content


def files_below(folder: Path, suffix: str) -> list[Path]:
    """All files in a folder and its folders whose names end in `suffix`, in the order of their paths.

    Raises DataError for a folder that cannot be listed, where `Path.rglob` would find nothing.
    """

    def fail(error: OSError) -> None:
        raise error

    with reading(folder, DataError):
        files = (Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names)
        return sorted(file for file in files if file.name.endswith(suffix) and file.is_file())


def json_rows(text: str, source: Path | str, want: str) -> Iterator[tuple[str, Any]]:
    """Where each row of JSON lines stands, and its value; DataError that says what is wanted for a line that is none.

    Only \\n ends a line: `str.splitlines` would also cut at characters that JSON strings may hold.
    """
    replaced = 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{source}, line {number}"
            value, lone = _without_lone_surrogates(parse_json(line, where, want))
            replaced += lone
            yield where, value
    _say_replaced(replaced, source)


def json_file(text: str, source: Path | str, want: str) -> Any:
    """The one JSON value that a file holds."""
    value, lone = _without_lone_surrogates(parse_json(text, str(source), want))
    _say_replaced(lone, source)
    return value


def parse_json(text: str, where: str, want: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise DataError(f"{where}{line}: not JSON ({error.msg}, column {error.colno}); {want}") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON that can be read (nested too deeply); {want}") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{where}: not JSON that can be read ({first_line(error)}); {want}") from None


def _without_lone_surrogates(value: Any) -> tuple[Any, int]:
    """The value with every half of a surrogate pair, which no encoding takes, as U+FFFD; and how many there were."""
    if isinstance(value, str):
        halves = sum("\ud800" <= character <= "\udfff" for character in value)
        return ("".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value) if halves else value), halves
    if isinstance(value, list):
        parts = [_without_lone_surrogates(part) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        keys = [_without_lone_surrogates(key) for key in value]
        parts = [_without_lone_surrogates(part) for part in value.values()]
        both = zip((key for key, _ in keys), (part for part, _ in parts), strict=True)
        return dict(both), sum(count for _, count in (*keys, *parts))
    return value, 0


def _say_replaced(count: int, source: Path | str) -> None:
    if count:
        logger.warning("%s: %d half surrogate pairs (such as \\ud83d alone) were read as U+FFFD", source, count)


def hub_rows(dataset: str, *config: str | None, remedy: str, **selection: Any) -> Iterable[dict[str, Any]]:
    """The rows of a data set of the hub, through the optional package `datasets`, which takes `config` and `selection`.

    Raises DataError when the package is missing or the set cannot be fetched; `remedy` ends its message.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise DataError(
            f"{dataset}: reading a hub dataset needs the package 'datasets'; pip install 'halve[data]', {remedy}"
        ) from None
    try:
        with _without_retry_notes():
            yield from datasets.load_dataset(dataset, *config, **selection)
    except Exception as error:  # whatever network, hub client or dataset builder raises, the remedy is the same
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        options = [*config, *(value for key, value in selection.items() if key != "streaming")]
        chosen = ", ".join(str(option) for option in options if option is not None)
        raise DataError(f"{dataset} ({chosen}): cannot be fetched: {reason}; check the network, {remedy}") from error


@contextmanager
def _without_retry_notes() -> Iterator[None]:
    """Keep the hub client from logging a line per retry: the error that follows says it all in one."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def read_documents(source: str | Path) -> list[str]:
    """Documents of a .txt or .raw (split at <|endoftext|>), a .jsonl (`text`, or a RACE article), a RACE folder, c4 or
    wikitext2. Raises DataError naming the file and line.
    """
    path = Path(os.path.expanduser(source))
    with reading(path, DataError):
        there = path.exists()
    if not there:
        if str(source) in HUB_DATASETS:
            return _hub_documents(str(source))
        named = ", ".join(HUB_DATASETS)
        raise DataError(f"calibration {str(source)!r}: no such file, and not a named set ({named})")
    documents: list[str] = []
    for file in text_files(path):
        text, _ = read_file(file)
        documents += _documents(file, text, in_folder=path.is_dir())
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise DataError(f"{path}: holds no text: give a .txt, a .jsonl with a `text` field, or a RACE folder")
    return documents


def text_files(path: Path) -> list[Path]:
    """The files that `read_documents` reads of a file or folder."""
    return files_below(path, ".txt") if path.is_dir() else [path]


def _documents(file: Path, text: str, in_folder: bool) -> list[str]:
    want = "it needs a JSON object with `text` or `article`"
    if file.suffix in (".jsonl", ".json") or (in_folder and text.lstrip().startswith("{")):
        try:
            rows = list(json_rows(text, file, want))
        except DataError:
            if file.suffix == ".jsonl":
                raise
            rows = [(str(file), json_file(text, file, want))]  # one object over several lines
        return list(_texts_of(rows, want))
    return text.split(SEPARATOR)


def _texts_of(rows: Iterable[tuple[str, Any]], want: str) -> Iterator[str]:
    last = None
    for where, row in rows:
        if not isinstance(row, dict) or not ("text" in row or "article" in row):
            raise DataError(f"{where}: {want}")
        document = row["text"] if "text" in row else row["article"]
        if not isinstance(document, str):
            raise DataError(f"{where}: `text` or `article` must be a string, not {type(document).__name__}")
        # RACE with a question a line repeats the article for each of them
        if "text" in row or document != last:
            yield document
        last = document


def _hub_documents(name: str) -> list[str]:
    hub_id, selection, field = HUB_DATASETS[name]
    rows = hub_rows(hub_id, remedy="or give a local file instead", split="train", streaming=True, **selection)
    return [row[field] for _, row in zip(range(HUB_DOCUMENTS), rows, strict=False) if row[field].strip()]
