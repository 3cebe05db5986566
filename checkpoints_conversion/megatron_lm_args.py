"""The `args` that Megatron-LM and Megatron-Bridge look for in a checkpoint's common.pt.

Megatron-LM takes them up with `--use-checkpoint-args`; Megatron-Bridge 0.6 builds the model from them. They name no
tokenizer: Megatron-LM would take it in place of the one that its user names.
"""

from argparse import Namespace
from typing import Any

import torch

from megatron_offgrpo.model.hf_config import Architecture

DEFAULTS: dict[str, Any] = {
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "is_hybrid_model": False,
    "mtp_num_layers": None,
    "no_persist_layer_norm": False,
    "bias_swiglu_fusion": True,
    "init_method_xavier_uniform": False,
    "init_model_with_meta_device": False,
    "fp16_lm_cross_entropy": False,
    "fp8_param_gather": False,
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": False,
    "moe_use_legacy_grouped_gemm": False,
    "qk_l2_norm": False,
    "use_kitchen": False,
    "overlap_p2p_comm": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "cp_comm_type": ["p2p"],
    "config_logger_dir": "",
}
"""Arguments without which Megatron-Bridge does not build a model, at Megatron-LM's defaults: config.json says nothing
of them."""


def args_of(architecture: Architecture, dtype: torch.dtype) -> Namespace:
    """Megatron-LM's names for what config.json says; the layout is that of one process, any other loads as well.

    Args:
        dtype: that of the weights in the checkpoint.
    """
    rope, experts = architecture.rope, architecture.experts
    args: dict[str, Any] = DEFAULTS | {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "make_vocab_size_divisible_by": 128,
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "rope_scaling_factor": rope["factor"] if rope.get("rope_type") == "llama3" else 1.0,
        "rotary_seq_len_interpolation_factor": rope["factor"] if rope.get("rope_type") == "linear" else None,
        "normalization": "RMSNorm",
        "norm_epsilon": architecture.norm_epsilon,
        "init_method_std": architecture.initializer_range,
        "apply_layernorm_1p": False,
        "qk_layernorm": architecture.qk_norm,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not architecture.tied_embeddings,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "num_experts": None,
    }
    if experts is not None:
        args |= {
            "num_experts": experts.count,
            "moe_ffn_hidden_size": experts.ffn_hidden_size,
            "moe_router_topk": experts.active,
            "moe_router_pre_softmax": not experts.normalise_top_k,
            "moe_grouped_gemm": True,
        }
    return Namespace(**args)
