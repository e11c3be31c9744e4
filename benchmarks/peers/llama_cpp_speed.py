"""llama.cpp, through llama-cpp-python, in its own Python environment (which also holds `gguf` and `numpy`).

python llama_cpp_speed.py make CONFIG.json FOLDER TYPE [TYPE ...]
    write TYPE.gguf (F16, BF16, Q8_0, Q4_0, Q4_K_M, ...) of the config's shape with random weights, where missing
python llama_cpp_speed.py run FILE.gguf PROMPT_TOKENS NEW_TOKENS THREADS
    print one JSON line when ready; then, for every line on stdin, prefill and decode once and print the times:
    {"ttft_ms": ..., "steps_ms": [...]}
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def make(config_path: str, folder: str, types: list[str]) -> None:
    """The dense types are written directly, the others by llama.cpp's own quantizer from F16."""
    config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for kind in ("F16", *types):
        target = place / f"{kind}.gguf"
        if target.exists():
            continue
        temporary = target.with_suffix(".tmp")
        if kind in ("F16", "BF16"):
            write_dense(config, temporary, kind)
        else:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            source = str(place / "F16.gguf").encode()
            if llama_cpp.llama_model_quantize(source, str(temporary).encode(), ctypes.byref(params)):
                raise SystemExit(f"llama.cpp could not quantize to {kind}")
        temporary.rename(target)
        print(target, flush=True)


def write_dense(config: dict[str, Any], path: Path, kind: str) -> None:
    import gguf

    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, head = config["num_key_value_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "F16" else gguf.LlamaFileType.MOSTLY_BF16)
    generator = np.random.default_rng(0)

    def linear(name: str, rows: int, columns: int) -> None:
        numbers = (generator.standard_normal((rows, columns), dtype=np.float32) * 0.02).astype(np.float32)
        if kind == "F16":
            writer.add_tensor(name, numbers.astype(np.float16))
        else:
            words = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(name, words, raw_dtype=gguf.GGMLQuantizationType.BF16)

    linear("token_embd.weight", config["vocab_size"], hidden)  # no output.weight: the head is tied
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            ("attn_q", heads * head, hidden),
            ("attn_k", kv * head, hidden),
            ("attn_v", kv * head, hidden),
            ("attn_output", hidden, heads * head),
            ("ffn_gate", mlp, hidden),
            ("ffn_up", mlp, hidden),
            ("ffn_down", hidden, mlp),
        ):
            linear(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(path: str, prompt_tokens: int, new_tokens: int, threads: int) -> None:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = prompt_tokens + new_tokens, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    prompt = np.random.default_rng(0).integers(0, vocabulary, prompt_tokens).tolist()

    def feed(tokens: list[int]) -> int:
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        return int(logits.argmax())

    def once() -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        marks = [time.perf_counter()]
        token = feed(prompt)
        marks.append(time.perf_counter())
        for _ in range(new_tokens - 1):
            token = feed([token])
            marks.append(time.perf_counter())
        first, *steps = [(b - a) * 1e3 for a, b in pairwise(marks)]
        return {"ttft_ms": first, "steps_ms": steps}

    once()
    ready = {
        "version": metadata.version("llama-cpp-python"),
        "build": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "weight_bytes": int(llama_cpp.llama_model_size(model)),
    }
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        run(sys.argv[2], *map(int, sys.argv[3:6]))
