"""Qwen3-MoE: Qwen3's attention, experts in every layer."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, experts
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    mixture = experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    return (*embeddings(architecture), *attention(head_norms=True), *mixture)


QWEN3_MOE = Family("qwen3_moe", _rows)
