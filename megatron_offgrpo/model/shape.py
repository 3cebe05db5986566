"""The sizes of an architecture that the plan's estimates depend on."""

from megatron_offgrpo.model.hf_config import Architecture
from megatron_offgrpo.planning.shape import ModelShape


def shape_of(architecture: Architecture) -> ModelShape:
    """The sizes that parameters, FLOPs and memory depend on."""
    experts = architecture.experts
    return ModelShape(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=experts.ffn_hidden_size if experts else architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        vocab_size=architecture.vocab_size,
        tied_embeddings=architecture.tied_embeddings,
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        num_experts=experts.count if experts else 0,
        experts_per_token=experts.active if experts else 0,
    )
