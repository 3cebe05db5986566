"""Llama 2, 3, 3.1, 3.2: no bias, no head norms; DeepSeek-R1-Distill-Llama."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, gated_mlp
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    return (*embeddings(architecture), *attention(), *gated_mlp())


LLAMA = Family("llama", _rows)
