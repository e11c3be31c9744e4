"""What is shipped computes what was measured: whatever a config says, halve and transformers agree or halve refuses it."""

from __future__ import annotations

import ast
import random
from collections import Counter
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from halve.model.families import FAMILIES, parse_config
from halve.model.fields import CHECKED, NOT_HANDLED
from halve.model.layer_rules import no_windows
from tests.model.differential import BASES, UNREAD, VALUES, draws, outcome

# A family that reads none of them leaves them out of what it writes, so that only the source does not load there.
LEFT_OUT = {kind: {"layer_types"} for kind in BASES if FAMILIES[kind].windows is no_windows}
LEFT_OUT["opt"] |= {"rope_scaling", "rope_parameters"}
LEFT_OUT["phi3"] = {
    "layer_types",
    "head_dim",
    "rope_scaling",
    "rope_parameters",
}  # of these "su", without the length that stands beside it
# heads of a size of their own that do not divide the hidden size: transformers refuses them, what halve writes says so
LEFT_OUT |= {kind: {"num_attention_heads"} for kind in ("gemma2", "gemma3_text", "vaultgemma")}
LEFT_OUT["nemotron"] |= {"num_key_value_heads"}  # as many as query heads where it is not there
SINGLES, PAIRS, SHIPPED = 26, 12, 0.25


@pytest.mark.parametrize("kind", BASES)
def test_every_field_of_the_config_class_is_drawn(kind: str) -> None:
    assert {field.name for field in fields(CONFIG_MAPPING[kind])} <= VALUES.keys()


@pytest.mark.parametrize("kind", BASES)
def test_drawn_configs_agree_or_are_refused(kind: str, tmp_path: Path) -> None:
    singles = [changes for changes in draws(kind, 0, 0) if not changes.keys() & UNREAD]
    pairs = list(draws(kind, PAIRS, 5))[-PAIRS:]
    chosen = random.Random(kind)
    count: Counter[str] = Counter()
    for changes in [{}, *chosen.sample(singles, SINGLES), *pairs]:
        found, why = outcome(kind, changes, tmp_path, ship=chosen.random() < SHIPPED)
        allowed = {"equal", "refused"} | ({"unloadable"} if changes.keys() & LEFT_OUT.get(kind, set()) else set())
        assert found in allowed, f"{kind} {changes}: {found}: {why}"
        count[found] += 1
    assert count["equal"] > count.total() / 3, count


@pytest.mark.parametrize("kind", BASES)
def test_what_transformers_does_not_read_changes_nothing(kind: str, tmp_path: Path) -> None:
    changes = {field: VALUES[field][0] for field in UNREAD}
    assert outcome(kind, changes, tmp_path, ship=True) == ("equal", "")


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 9.0}}, "equal"),
        ("qwen2", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 77.0}, "equal"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 8}, "equal"),
        ("mistral", {"layer_types": None, "head_dim": 8, "sliding_window": 5}, "equal"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "refused"),
        ("llama", {"sliding_window": 5}, "equal"),
        ("llama", {"is_causal": False}, "refused"),
        ("qwen3", {"per_layer_config": {"0": {"intermediate_size": 12}}}, "refused"),
        ("opt", {"head_dim": 16}, "equal"),
        ("opt", {"word_embed_proj_dim": 16, "model_name": "a"}, "equal"),
    ],
)
def test_configs_that_were_once_misread(kind: str, changes: dict, expected: str, tmp_path: Path) -> None:
    assert outcome(kind, changes, tmp_path, ship=True)[0] == expected


# Names that the code common to all models reads, and that change no logits of these families.
_COMMON = """_attn_implementation _attn_implementation_internal _experts_implementation _experts_implementation_internal
    _name_or_path name_or_path model_type attn_implementation experts_implementation num_labels output_attentions
    torch_dtype dtype quantization_config pad_token_id sep_token_id eos_token_id bos_token_id initializer_factor
    initializer_range init_std distributed_config gradient_checkpointing per_layer_config is_heterogeneous number_of_conv_states
    attention_chunk_size sliding_window layer_types tie_last_hidden_states backbone_config""".split()
_OTHERS = "load_config generation_config kernel_config quantization_config fusion_config distributed_config".split()
_FOLDERS = {"gemma3_text": "gemma3"}
# read there for parts that are not of the text model
_OTHER_PARTS = set(
    "text_config vision_config image_size patch_size layer_norm_eps image_token_id mm_tokens_per_image".split()
)
_FILES = ("modeling_utils", "cache_utils", "masking_utils", "integrations/sdpa_attention")


def _read_of_configs(file: Path) -> set[str]:
    """The fields that code reads of a name or attribute that ends in `config`."""

    def is_config(node: ast.expr) -> bool:
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name.endswith("config") and name not in _OTHERS

    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            target, key = node.args[0], node.args[1]
            if is_config(target) and isinstance(key, ast.Constant):
                found.add(str(key.value))
    return found


class _Recorded(dict):
    """A config that remembers which of its fields were asked for."""

    def __init__(self, raw: dict) -> None:
        super().__init__(raw)
        self.asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


@pytest.mark.parametrize("kind", BASES)
def test_whatever_the_code_of_transformers_reads_is_handled(kind: str) -> None:
    """A field that a new transformers reads for a family, or for all, fails here until somebody has looked at it."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    module = home / "models" / _FOLDERS.get(kind, kind)
    files = [home / f"{name}.py" for name in _FILES] + sorted(module.glob("modeling_*.py"))
    read = set().union(*map(_read_of_configs, files))
    raw = _Recorded(BASES[kind] | {"model_type": kind})
    parse_config(raw, "config.json")
    methods = set(dir(CONFIG_MAPPING[kind])) - {field.name for field in fields(CONFIG_MAPPING[kind])}
    other = _OTHER_PARTS if kind in _FOLDERS else set()
    unknown = read - other - raw.asked - CHECKED.keys() - NOT_HANDLED.keys() - set(_COMMON) - methods
    assert not unknown, f"transformers reads {sorted(unknown)} of the config of a {kind}: handle or refuse them"
