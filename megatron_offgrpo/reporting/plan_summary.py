"""What a plan will take on the recipe's layout, for the terminal."""

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.model.hf_config import Architecture, read_architecture
from megatron_offgrpo.planning.estimate import ModelShape, summary_lines
from megatron_offgrpo.planning.plan import Plan


def plan_lines(
    plan: Plan, run: RunConfig, *, num_gpus: int | None = None, tflops_per_gpu: float | None = None
) -> list[str]:
    """Steps, packs, padding, tokens, and the estimated memory and time."""
    return summary_lines(
        plan,
        shape=shape_of(read_architecture(run.paths.hf_model)),
        layout=run.layout,
        model=run.model,
        num_gpus=num_gpus or run.layout.processes,
        tflops_per_gpu=tflops_per_gpu,
    )


def shape_of(architecture: Architecture) -> ModelShape:
    """The sizes that the estimates depend on."""
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
