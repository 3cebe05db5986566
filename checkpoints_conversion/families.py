"""Which table converts a Hugging Face model, and its sizes."""

from collections.abc import Mapping
from typing import Any

from checkpoints_conversion.ops import Dims
from checkpoints_conversion.tables.llama import LLAMA
from checkpoints_conversion.tables.mistral import MISTRAL
from checkpoints_conversion.tables.mixtral import MIXTRAL
from checkpoints_conversion.tables.qwen2 import QWEN2
from checkpoints_conversion.tables.qwen3 import QWEN3
from checkpoints_conversion.tables.qwen3_moe import QWEN3_MOE
from checkpoints_conversion.tables.rows import Family
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.hf_config import Architecture

FAMILIES: tuple[Family, ...] = (QWEN2, QWEN3, QWEN3_MOE, LLAMA, MISTRAL, MIXTRAL)


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family whose table converts the model with this config.json."""
    for family in FAMILIES:
        if family.name == raw.get("model_type"):
            return family
    raise ConfigError(
        "no conversion table for this model family",
        where=f"{where}: model_type",
        expected=", ".join(family.name for family in FAMILIES),
        got=raw.get("model_type"),
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
