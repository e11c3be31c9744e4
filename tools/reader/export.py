"""Writes the bundled reader's folder: Hugging Face files, exam, texts and a model card with measured figures.

python -m halve.demo.export --run DIR --out src/halve/demo/reader
"""

import argparse
import json
import math
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional

from tools.reader import exam, stories
from tools.reader.tokens import BOS, EOS, PAD, SPECIALS, build_tokenizer
from tools.reader.train import Reader, ReaderConfig, load_checkpoint


def config_json(config: ReaderConfig) -> dict:
    """The config.json of a LlamaForCausalLM of this shape."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
        **{name: getattr(config, name) for name in names},
    }


def write_model(model: Reader, folder: Path) -> None:
    """Writes the weights (bf16), configuration and tokenizer as Hugging Face files."""
    tensors = {f"model.{name}": t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    generation_config = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    files = {"config": config_json(model.config), "tokenizer_config": tokenizer_config}
    for name, content in {**files, "generation_config": generation_config}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


SEPARATOR = "\n<|endoftext|>\n"  # between documents of a text file
HELD_OUT_SEED, CALIBRATION_SEED = 3, 4


def write_texts(folder: Path) -> None:
    """Writes the exam, the held-out stories (one a line) and the calibration text (training split, its own seed)."""
    exam.write_exam(folder)
    rng = random.Random(HELD_OUT_SEED)
    held_out = [stories.story_text(rng, 1 + i % stories.MAX_PEOPLE, "held_out") for i in range(300)]
    rng = random.Random(CALIBRATION_SEED)
    kinds = list(stories.TEXTS.values())
    calibration = [kinds[i % len(kinds)](rng, rng.randint(1, stories.MAX_PEOPLE), "train") for i in range(600)]
    for name, texts in (("held_out_stories", held_out), ("calibration", calibration)):
        (folder / f"{name}.txt").write_text(SEPARATOR.join(stories.plain(text) for text in texts) + "\n")


@torch.no_grad()
def perplexity(model: Reader, text: str, tokenizer: Tokenizer, window: int) -> dict[str, float]:
    """Perplexity of the text: non-overlapping windows, mean over all predicted tokens."""
    ids = tokenizer.encode(text).ids
    losses = []
    for start in range(0, len(ids) - 1, window):
        ids_T = torch.tensor(ids[start : start + window])
        if len(ids_T) > 1:
            losses.append(functional.cross_entropy(model(ids_T[None, :-1])[0], ids_T[1:], reduction="none"))
    return {"perplexity": round(math.exp(torch.cat(losses).mean()), 3), "tokens": len(ids), "window": window}


def measure(model: Reader, folder: Path) -> dict:
    """What the model card states: exam accuracies with and without the story, perplexity of held-out stories."""
    tokenizer = build_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    items = [exam.Item.from_race_line(line) for line in (folder / "exam.jsonl").read_text().splitlines()]
    held_out = (folder / "held_out_stories.txt").read_text().replace(SEPARATOR, "\n")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "items": {kind: sum(item.kind == kind for item in items) for kind in exam.PROTOCOLS},
        "accuracy": exam.examine(model, items, encode, BOS),
        "accuracy_without_story": exam.examine(model, [item.without_story() for item in items], encode, BOS),
        "held_out_stories": perplexity(model, held_out, tokenizer, model.config.max_position_embeddings),
    }


CARD = """# The bundled reader

A Llama-form language model of {parameters:,} parameters (bf16), trained from random weights on generated English by
`halve.demo.train` and on nothing else. It exists so that the accuracy of a compressed model can be measured without a
download: it reads a story of one to six people and answers questions about it. It knows nothing besides.

| hidden | layers | query / key-value heads x size | MLP | vocabulary | context |
|---|---|---|---|---|---|
| {hidden_size} | {num_hidden_layers} | {heads} | {intermediate_size} | {vocab_size} | {max_position_embeddings} |

The figures below were measured by `python -m halve.demo.export` on the weights as they are stored in this folder,
computed in fp32 on a CPU. They are percentages of right answers; guessing gives 25.

{accuracy_table}

- Cloze: which two sentences come next ({n_cloze} items). Question: one word of four answers it ({n_question} items).
- Perplexity of `held_out_stories.txt`: {perplexity} ({tokens:,} tokens, windows of {window}). Most of a story's facts
  are random, so this cannot come near 1.
- Training: {steps:,} steps, {tokens_seen:,} tokens; `train_log.jsonl` holds settings, losses and development figures.

Files: `exam.jsonl` (RACE's layout; `exam_cloze.jsonl` and `exam_questions.jsonl` are its halves),
`held_out_stories.txt` (for perplexity), `calibration.txt` (from the training split). No story of the exam, the held-out
stories or the development items occurs in training: a checksum of a story's facts decides where it belongs.

The tokenizer knows the generator's words as whole tokens; every other text falls back to its bytes, which the model has
not learned. What the training was and how to continue it: `docs/reader.md`.
"""


def accuracy_table(measured: dict) -> str:
    """The accuracies as a Markdown table: a row per kind and protocol, by number of people, and without the story."""
    groups = [str(n) for n in range(1, stories.MAX_PEOPLE + 1)]
    lines = ["| items | protocol | all | " + " | ".join(f"{n} people" for n in groups).replace("1 people", "1 person")]
    lines = [lines[0] + " | without the story |", "|---" * (len(groups) + 4) + "|"]
    for name, row in measured["accuracy"].items():
        figures = [row["all"], *(row[n] for n in groups), measured["accuracy_without_story"][name]["all"]]
        lines.append("| " + " | ".join([*name.split("_"), *(f"{100 * figure:.1f}" for figure in figures)]) + " |")
    return "\n".join(lines)


def model_card(model: Reader, measured: dict) -> str:
    """The README of the model's folder."""
    return CARD.format(
        **{**vars(model.config), **measured["held_out_stories"]},
        heads=f"{model.config.num_attention_heads} / {model.config.num_key_value_heads} x {model.config.head_dim}",
        parameters=measured["parameters"],
        accuracy_table=accuracy_table(measured),
        n_cloze=measured["items"]["cloze"],
        n_question=measured["items"]["question"],
        steps=measured["steps"],
        tokens_seen=measured["tokens"],
    )


def export(run: Path, out: Path) -> dict:
    """Writes the whole folder from a run's checkpoint and log; returns what was measured."""
    state = load_checkpoint(run / "checkpoint.pt")
    model = Reader(ReaderConfig(**state["reader"]))
    model.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in state["model"].items()})
    out.mkdir(parents=True, exist_ok=True)
    write_model(model, out)
    write_texts(out)
    shutil.copyfile(run / "train_log.jsonl", out / "train_log.jsonl")
    measured = {"steps": state["step"], "tokens": state["tokens_seen"], **measure(model, out)}
    (out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    (out / "README.md").write_text(model_card(model, measured))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m halve.demo.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    print(json.dumps(export(arguments.run, arguments.out)))


if __name__ == "__main__":
    main()
