"""Documents from anywhere: text files, JSON lines, RACE folders, named sets of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halve.errors import DataError

HUB_DATASETS = {
    # name: (hub id, config or data file, split, field)
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "train", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
}


def read_documents(source: str | Path) -> list[str]:
    """Documents of a .txt (split at <|endoftext|>), a .jsonl (`text`, or a RACE article), a RACE folder, c4 or wikitext2.

    Raises DataError naming the file and line.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if str(source) in HUB_DATASETS:
            return _hub_documents(str(source))
        named = ", ".join(HUB_DATASETS)
        raise DataError(f"calibration {str(source)!r}: no such file, and not a named set ({named})")
    files = sorted(p for p in path.rglob("*.txt") if p.is_file()) if path.is_dir() else [path]
    documents: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not readable as UTF-8 text ({error})") from error
        if file.suffix in (".jsonl", ".json") or (path.is_dir() and text.lstrip().startswith("{")):
            documents += _json_documents(file, text)
        else:
            documents += text.split("<|endoftext|>")
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise DataError(f"{path}: holds no text: give a .txt, a .jsonl with a `text` field, or a RACE folder")
    return documents


def _json_documents(file: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            document = item["text"] if "text" in item else item["article"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}:{number}: needs a JSON object with `text` or `article` ({error!r})") from error
        if not isinstance(document, str):
            raise DataError(f"{file}:{number}: `text` or `article` must be a string, not {type(document).__name__}")
        # RACE with a question a line repeats the article for each of them
        if "text" in item or not documents or documents[-1] != document:
            documents.append(document)
    return documents


def _hub_documents(name: str, limit: int = 20_000) -> list[str]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise DataError(f"calibration {name!r} needs the `datasets` package: pip install 'halve[data]'") from error
    hub_id, config, split, field = HUB_DATASETS[name]
    selector: dict[str, Any] = {"data_files": config} if config.endswith(".gz") else {"name": config}
    try:
        rows = load_dataset(hub_id, split=split, streaming=True, **selector)
        documents = [row[field] for _, row in zip(range(limit), rows, strict=False)]
    except Exception as error:  # the hub client raises its own, varied, errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"calibration {name!r} could not be fetched ({reason}): give a local file instead") from error
    return [d for d in documents if d.strip()]
