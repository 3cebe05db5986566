"""Tiny random models of each family: odd vocabulary, grouped queries, head_dim unlike hidden / heads where allowed."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
QWEN3_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

# name -> (model_type, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama3_tied": ("llama", {"tie_word_embeddings": True, "head_dim": 20, "rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": ("llama", {"num_key_value_heads": 4, "rope_parameters": LINEAR_ROPE}),
    "qwen3": ("qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 20, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**QWEN3_EXPERTS, "head_dim": 20, "norm_topk_prob": True}),
    "qwen3_moe_raw_probs": ("qwen3_moe", {**QWEN3_EXPERTS, "head_dim": 16, "norm_topk_prob": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def config_of(name: str) -> Any:
    """The transformers configuration of a tiny model."""
    model_type, changes = MODELS[name]
    return CONFIG_MAPPING[model_type](**{**SIZES, **changes})


def save_tiny_model(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", seed: int = 0
) -> Path:
    """Writes a tiny random model: every weight, norms and biases included, differs from its neighbours."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15)
            if parameter.dim() == 1 and not parameter_name.endswith("bias"):
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
