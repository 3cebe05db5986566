"""Qwen3: a norm on each query and key head."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, gated_mlp
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    return (*embeddings(architecture), *attention(head_norms=True), *gated_mlp())


QWEN3 = Family("qwen3", _rows)
