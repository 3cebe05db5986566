"""Mistral: weights as Llama's."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, gated_mlp
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    return (*embeddings(architecture), *attention(), *gated_mlp())


MISTRAL = Family("mistral", _rows)
