"""Hugging Face transformers in bfloat16 with random weights; runs in halve's own environment.

    python hugging_face_speed.py CONFIG_FOLDER eager|compiled PROMPT_TOKENS NEW_TOKENS THREADS

eager: dynamic cache, as `generate` does it; compiled: static cache and torch.compile for the decode steps. Prints one
JSON line when ready; then, for every line on stdin, prefills and decodes once and prints the times:
{"ttft_ms": ..., "steps_ms": [...]}. Both compute the logits of the last position only, and of a contiguous row: cut out as
`generate` does it, torch 2.13 copies the weight of the head first, which would take most of the time of a prefill.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache


def fast_random(tensor: torch.Tensor) -> None:
    """Random values in little time: what they are does not matter."""
    flat = tensor.data.view(-1)
    some = torch.randn(min(flat.numel(), 1 << 20)).mul_(0.02).to(flat.dtype)
    for start in range(0, flat.numel(), some.numel()):
        piece = flat[start : start + some.numel()]
        piece.copy_(some[: piece.numel()])


@torch.inference_mode()
def main() -> None:
    folder, mode, *numbers = sys.argv[1:]
    prompt_tokens, new_tokens, threads = map(int, numbers)
    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(rotary)(config=config)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "norm" in name else fast_random(parameter)
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.forward) if mode == "compiled" else None
    static = StaticCache(config=config, max_cache_len=prompt_tokens + new_tokens) if compiled else None

    def once() -> dict[str, Any]:
        marks = [time.perf_counter()]
        if static is not None:
            static.reset()
        cache = DynamicCache(config=config) if static is None else static
        positions = torch.arange(prompt_tokens).unsqueeze(0)
        hidden = model.model(prompt, past_key_values=cache, position_ids=positions).last_hidden_state
        token = model.lm_head(hidden[:, -1].contiguous()).argmax(-1, keepdim=True)
        marks.append(time.perf_counter())
        for step in range(new_tokens - 1):
            position = torch.tensor([[prompt_tokens + step]])
            forward = compiled or model
            logits = forward(token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            marks.append(time.perf_counter())
        first, *steps = [(b - a) * 1e3 for a, b in pairwise(marks)]
        return {"ttft_ms": first, "steps_ms": steps}

    once()
    ready = {"version": transformers.__version__, "build": f"torch {torch.__version__}, {mode}"}
    parameters = {p.data_ptr(): p.nbytes for p in model.parameters()}
    print(json.dumps(ready | {"weight_bytes": sum(parameters.values())}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    main()
