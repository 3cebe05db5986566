"""Qwen2 and Qwen2.5, dense: QKV bias, grouped queries, gated MLP; DeepSeek-R1-Distill-Qwen, OpenThinker, AceReason."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, gated_mlp
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    return (*embeddings(architecture), *attention(qkv_bias=True), *gated_mlp())


QWEN2 = Family("qwen2", _rows)
