"""llama.cpp, through llama-cpp-python, in its own Python environment (which also holds `numpy`): logits of a GGUF file.

python llama_cpp_logits.py REQUEST.json
    {"file": "m.gguf", "text": "...", "tokens": [1, 2, ...], "out": "logits.npy", "threads": 1}

writes the logits of `tokens`, float32 [tokens, vocabulary], and prints one JSON line: what it was built with, and the ids it
makes of `text` (beginning as the file says; names of special tokens are text).
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 512


def main(request: dict[str, Any]) -> None:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["file"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {request['file']}")
    tokens = request["tokens"]
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = len(tokens), BATCH, BATCH
    params.n_threads = params.n_threads_batch = request["threads"]
    # keys and values in float32 and attention in steps: what differs is the weights' arithmetic
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    found = np.concatenate([feed(context, tokens[i : i + BATCH], i, size) for i in range(0, len(tokens), BATCH)])
    np.save(request["out"], found)
    made = {
        "version": version(),
        "build": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "tokens": tokenize(vocabulary, request["text"]),
    }
    print(json.dumps(made), flush=True)


def version() -> str:
    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:  # run from its sources
        return str(getattr(llama_cpp, "__version__", "unknown"))


def feed(context: Any, tokens: list[int], first: int, size: int) -> np.ndarray:
    """The logits [tokens, vocabulary] of tokens that stand from `first` on."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, first + place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), size)).copy()
    llama_cpp.llama_batch_free(batch)
    return logits


def tokenize(vocabulary: Any, text: str) -> list[int] | None:
    """The ids of a text, None for a file without a tokenizer."""
    if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return None
    raw = text.encode()
    room = (llama_cpp.llama_token * (len(raw) + 16))()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, False)
    return list(room[:count])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
