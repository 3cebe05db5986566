"""An architecture is what Hugging Face's own class reads from the same config.json."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.hf_config import FAMILIES, Architecture, Experts, architecture_of
from tests.unit.conversion.test_config_fields import PUBLISHED
from tests.unit.conversion.tiny_models import MODELS, config_of

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 3},
}
# Saved before there was `rope_parameters`, without what today's class adds.
OLD_KEYS = [
    {"rope_theta": 123.0},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "initializer_range": 0.5, "max_position_embeddings": 77},
    {"head_dim": 24},
]


def sizes_of(family: str) -> dict:
    """What a config.json must hold; windows are refused elsewhere."""
    return {"model_type": family, **SIZES, **EXPERTS.get(family, {}), "sliding_window": None}


def by_transformers(raw: dict) -> Architecture:
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    experts, family = None, config.model_type
    if family in EXPERTS:
        of_qwen = family == "qwen3_moe"
        size = config.moe_intermediate_size if of_qwen else config.intermediate_size
        normalise = config.norm_topk_prob if of_qwen else True
        experts = Experts(config.num_local_experts, config.num_experts_per_tok, size, normalise)
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        initializer_range=config.initializer_range,
        rope=config.rope_parameters,
        experts=experts,
    )


def assert_same(raw: dict) -> None:
    got, expected = dataclasses.asdict(architecture_of(raw)), dataclasses.asdict(by_transformers(raw))
    # The older name of `rope_type` changes nothing beside the new one.
    for rope in (got["rope"], expected["rope"]):
        rope.pop("type", None)
    assert got == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, *OLD_KEYS], ids=lambda changes: "-".join(changes) or "sizes_alone")
def test_read_as_transformers_reads_it(family, changes):
    assert_same({**sizes_of(family), **changes})


# The other families' classes fail with a null.
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "num_key_value_heads") for family in ("qwen2", "qwen3", "llama")),
        *((family, "head_dim") for family in ("llama", "mistral", "mixtral")),
    ],
)
def test_null_stands_for_what_other_sizes_give(family, name):
    assert_same({**sizes_of(family), name: None})


@pytest.mark.parametrize("name", list(MODELS))
def test_read_as_transformers_wrote_it(name):
    config = config_of(name)
    assert_same(config.to_dict())
    assert_same(config.to_diff_dict())


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs(name):
    assert_same({**sizes_of(PUBLISHED[name]["model_type"]), **PUBLISHED[name]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_that_is_missing_is_named(family):
    for name in sizes_of(family):
        left = {key: value for key, value in sizes_of(family).items() if key != name}
        if (name, family) == ("num_key_value_heads", "llama") or (name == "sliding_window" and family != "mistral"):
            assert_same(left)
        else:
            # Mistral's class has a window by default.
            expected = {"model_type": "family not supported", "sliding_window": "got 4096"}
            with pytest.raises(ConfigError, match=expected.get(name, "no such key")) as caught:
                architecture_of(left)
            assert ("num_local_experts" if name == "num_experts" else name) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"hidden_size": "96"}),
        ("qwen2", {"num_hidden_layers": 0}),
        ("qwen2", {"num_hidden_layers": 10**30}),
        ("llama", {"vocab_size": 10**30}),
        ("llama", {"rms_norm_eps": math.nan}),
        ("llama", {"rope_theta": -1.0}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}),
        ("llama", {"rope_parameters": [1]}),
        ("qwen2", {"tie_word_embeddings": "yes"}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 777.0}),
        ("llama", {"vocab_size": True}),
        ("llama", {"rms_norm_eps": None}),
        ("mixtral", {"num_local_experts": 2.5}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
        ("mixtral", {"sliding_window": 8}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
    ],
)
def test_a_value_that_cannot_be_used_is_named(family, changes):
    with pytest.raises(ConfigError) as caught:
        architecture_of({**sizes_of(family), **changes}, where="some/config.json")
    assert f"some/config.json: {list(changes)[-1]}" in str(caught.value)


def test_qwens_window_is_its_classes_where_only_its_use_is_given():
    raw = {key: value for key, value in sizes_of("qwen2").items() if key != "sliding_window"}
    with pytest.raises(ConfigError, match="sliding_window"):
        architecture_of({**raw, "use_sliding_window": True})


def test_no_transformers_is_imported():
    program = (
        "import sys, json; from megatron_offgrpo.model.hf_config import architecture_of; "
        "architecture_of(json.loads(sys.argv[1])); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(sizes_of("qwen2"))], check=True)
