"""Runs llm-compressor's GPTQ in its own Python environment: `python llm_compressor.py REQUEST.json`.

REQUEST: model, out (folders), windows (a safetensors file with `input_ids` int64 [N, T]), bits, groups (group size or -1
-> names of the linears that have it), damping, threads. Prints one JSON line: versions, seconds, peak resident bytes.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from importlib import metadata
from typing import Any


def weights_scheme(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    import torch

    torch.set_num_threads(request["threads"])
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    windows = load_file(request["windows"])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    groups = {
        f"group_{number}": {"targets": names, "weights": weights_scheme(request["bits"], int(size))}
        for number, (size, names) in enumerate(request["groups"].items())
    }
    dataset = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    modifier = GPTQModifier(
        config_groups=groups, ignore=["lm_head"], dampening_frac=request["damping"], actorder="static"
    )
    start, processor = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=[modifier],
        max_seq_length=windows.shape[1],
        num_calibration_samples=windows.shape[0],
        shuffle_calibration_samples=False,
        batch_size=request.get("batch_size", 1),
    )
    quantized = time.perf_counter()
    model.save_pretrained(request["out"], save_compressed=True)
    done = time.perf_counter()
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(
        json.dumps(
            {
                "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
                "seconds": done - start,
                "quantize_seconds": quantized - start,
                "cpu_seconds": time.process_time() - processor,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
