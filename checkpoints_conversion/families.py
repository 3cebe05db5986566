"""Which table converts a Hugging Face model, and its sizes."""

from pathlib import Path

from checkpoints_conversion.ops import Dims
from checkpoints_conversion.tables.qwen2 import QWEN2
from checkpoints_conversion.tables.rows import Family
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import Architecture

FAMILIES: tuple[Family, ...] = (QWEN2,)


def family_of(architecture: Architecture, where: Path) -> Family:
    """The family whose table converts this architecture."""
    for family in FAMILIES:
        if family.name == architecture.family:
            return family
    raise CheckpointError(
        "no conversion table for this model family",
        where=f"{where / 'config.json'}: model_type",
        expected=", ".join(family.name for family in FAMILIES),
        got=architecture.family,
        remedy="add a table (docs/conversion.md)",
    )


def dims_of(architecture: Architecture) -> Dims:
    """Sizes of the model, for the operations."""
    experts = architecture.experts
    return Dims(
        layers=architecture.num_layers,
        hidden=architecture.hidden_size,
        vocab=architecture.vocab_size,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn=architecture.ffn_hidden_size,
        experts=experts.count if experts else 0,
        expert_ffn=experts.ffn_hidden_size if experts else 0,
    )
