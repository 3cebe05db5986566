"""Sizes of published models, from the config.json of each on Hugging Face, for estimates before anything is downloaded.

Only what shapes depend on is kept; weights are converted and trained with the model's own config.json.
"""

from pathlib import Path
from typing import Any

from megatron_offgrpo.model.hf_config import Architecture, architecture_of, read_architecture

_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
)  # fmt: skip


def _dense(family: str, *sizes: int, **more: Any) -> dict[str, Any]:
    return {"model_type": family, **dict(zip(_FIELDS, sizes, strict=True)), **more}


def _moe(expert_size: int, *sizes: int) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_size}
    return _dense("qwen3_moe", *sizes, **experts, head_dim=128, norm_topk_prob=True)


_QWEN2_5_7B = _dense("qwen2", 28, 3584, 18944, 28, 4, 152064)
_LLAMA_70B = _dense("llama", 80, 8192, 28672, 64, 8, 128256)
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _dense("qwen2", 24, 896, 4864, 14, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _dense("qwen2", 28, 1536, 8960, 12, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-14B": _dense("qwen2", 48, 5120, 13824, 40, 8, 152064),
    "OpenThinker2-7B": _QWEN2_5_7B,
    "OpenThinker3-7B": _QWEN2_5_7B,
    "AceReason-Nemotron-1.1-7B": _QWEN2_5_7B,
    "Qwen3-8B": _dense("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128),
    "DeepSeek-R1-Distill-Qwen-32B": _dense("qwen2", 64, 5120, 27648, 40, 8, 152064),
    "Mistral-7B-v0.3": _dense("mistral", 32, 4096, 14336, 32, 8, 32768, sliding_window=None),
    "Mixtral-8x7B-v0.1": _dense("mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
    "Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Qwen3-30B-A3B": _moe(768, 48, 2048, 6144, 32, 4, 151936),
    "Qwen3-235B-A22B": _moe(1536, 94, 4096, 12288, 64, 4, 151936),
}
"""Name of the Hugging Face repository (without its owner) -> the sizes in its config.json."""


def find_architecture(hf_model: str) -> tuple[Architecture, str]:
    """The architecture of a recipe's model and where it was found: its folder, or the table by the folder's name.

    Raises:
        ConfigError: no such folder, and its name is not in the table.
    """
    name = Path(hf_model).name
    if name in PUBLISHED and not (Path(hf_model) / "config.json").exists():
        return architecture_of(PUBLISHED[name], where=name), f"{name}, published sizes ({hf_model} is not there)"
    return read_architecture(hf_model), hf_model
