"""Qwen2 and Qwen2.5: QKV bias; DeepSeek-R1-Distill-Qwen, OpenThinker, AceReason-Nemotron."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, gated_mlp
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    return (*embeddings(architecture), *attention(qkv_bias=True), *gated_mlp())


QWEN2 = Family("qwen2", _rows)
