"""Mixtral: Mistral's attention, experts in every layer."""

from checkpoints_conversion.tables.rows import Family, Row, attention, embeddings, experts
from megatron_offgrpo.model.hf_config import Architecture


def _rows(architecture: Architecture) -> tuple[Row, ...]:
    mixture = experts("block_sparse_moe", gate="w1", up="w3", down="w2")
    return (*embeddings(architecture), *attention(), *mixture)


MIXTRAL = Family("mixtral", _rows)
