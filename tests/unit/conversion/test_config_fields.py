"""Every field of every family's configuration class is mapped, harmless or refused."""

import dataclasses

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from checkpoints_conversion.config_fields import ALLOWED, HARMLESS, MAPPED, check_fields, field_problem
from checkpoints_conversion.families import FAMILIES
from tests.unit.conversion.tiny_models import MODELS, config_of

NAMES = [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", NAMES)
def test_every_field_of_the_class_is_known(family):
    config = CONFIG_MAPPING[family]()
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")} | config.to_dict()
    fields |= {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # A default may be a value that is refused (Mistral's window), but no field may be unknown.
    unknown = [name for name, value in fields.items() if field_problem(name, value, fields, family) == "unknown field"]
    assert not unknown


def test_the_walk_covers_the_fields_of_the_base_class_and_of_a_family():
    config = CONFIG_MAPPING["qwen2"]()
    assert {"chunk_size_feed_forward", "id2label"} <= set(vars(config))
    assert {"use_sliding_window", "max_window_layers", "rope_parameters"} <= set(vars(config))
    assert set(PreTrainedConfig().to_dict()) - {"architectures"} <= HARMLESS | MAPPED | set(ALLOWED)


def test_no_field_stands_in_two_lists():
    assert not MAPPED & HARMLESS
    assert not (MAPPED | HARMLESS) & set(ALLOWED)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_tiny_models_are_accepted(name):
    check_fields(config_of(name).to_dict(), "config.json")


# config.json of published models, fields that their class does not list included.
PUBLISHED = {
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_are_accepted(name):
    check_fields(PUBLISHED[name], "config.json")
