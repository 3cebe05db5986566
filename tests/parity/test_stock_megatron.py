"""Megatron-Core's own GPTModel, built as Megatron-LM and Megatron-Bridge build it, loads what the converter writes.

The model is made from the `args` in the checkpoint alone, by the rules of Megatron-LM's
`core_transformer_config_from_args` and `gpt_builder` (Megatron-Bridge has the same in `training/mlm_compat`).
Nothing of this project's model is used: layers, attention and rotary embedding are Megatron's. Without Transformer
Engine its local layer stands in, whose checkpoint keys Megatron maps to Transformer Engine's.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from transformers import AutoModelForCausalLM

from checkpoints_conversion import hf_to_megatron
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.parallel import runtime
from tests.unit.conversion.tiny_models import VOCAB, save_tiny_model

PADDED_VOCAB = 128
IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(5))
# Megatron writes Llama 3.1's scaling as constants (8, 1, 4, 8192), which a tiny model cannot show.
MODELS = ("qwen2", "qwen2_tied", "qwen3", "llama_linear_rope", "mistral", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def one_process():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


def build(args: Namespace) -> GPTModel:
    """The model that these arguments describe; fusions need CUDA kernels and are off."""
    fields = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if hasattr(args, field.name)
    }
    fields |= {
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "layernorm_epsilon": args.norm_epsilon,
        "pipeline_dtype": args.params_dtype,
        "batch_p2p_comm": not args.overlap_p2p_comm,
        "num_moe_experts": args.num_experts,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "fp8_param": args.fp8_param_gather,
        "cp_comm_type": args.cp_comm_type[0],
        "activation_func": torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        "gated_linear_unit": args.swiglu,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "moe_grouped_gemm": False,
        "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }
    spec = get_gpt_layer_local_spec(
        num_experts=args.num_experts, moe_grouped_gemm=False, qk_layernorm=args.qk_layernorm, normalization="RMSNorm"
    )
    if args.num_experts:
        # The local layer's mapping is that of a dense layer; Transformer Engine's norms apart before a router.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return GPTModel(
        TransformerConfig(**fields),
        spec,
        vocab_size=PADDED_VOCAB,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    ).eval()


def load(model: GPTModel, folder: Path) -> None:
    """As Megatron-LM loads weights: padding rows are not in the checkpoint, `_extra_state` is Transformer Engine's."""
    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(folder), strict="log_all")
    model.load_state_dict(loaded["model"], strict=False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, one_process, tmp_path):
    hf_to_megatron(save_tiny_model(name, tmp_path / "hf"), tmp_path / "megatron")
    folder = tmp_path / "megatron" / "release"
    model = build(dist_checkpointing.load_common_state_dict(str(folder))["args"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load(model, folder)
    length = IDS.shape[1]
    hidden_from = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    with torch.no_grad():
        ours = model(IDS, torch.arange(length)[None], hidden_from)[..., :VOCAB]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()(IDS).logits
    assert (ours - theirs).abs().max() <= 1e-4
