"""What Megatron needs to know of a Hugging Face model, read from its configuration and from nothing else."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_offgrpo.errors import ConfigError

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral")


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts part."""

    count: int
    active: int
    ffn_hidden_size: int
    normalise_top_k: bool
    """Router probabilities of the chosen experts are normalised to sum 1."""


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder-only model; independent of how it is parallelised."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float
    rope: dict[str, Any]
    """Hugging Face's `rope_parameters`: rope_type, rope_theta and what the type needs."""
    experts: Experts | None = None

    def num_parameters(self) -> int:
        """Weights of the whole model, embeddings included (tied ones once)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        bias = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        if self.experts is None:
            mlp = 3 * self.hidden_size * self.ffn_hidden_size
        else:
            mlp = self.experts.count * 3 * self.hidden_size * self.experts.ffn_hidden_size
            mlp += self.experts.count * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + bias + norms + mlp) + embeddings + self.hidden_size


def read_architecture(hf_dir: str | Path) -> Architecture:
    """The architecture in `hf_dir/config.json`.

    Raises:
        ConfigError: no configuration, an unknown family, or a feature that Megatron's layer cannot express.
    """
    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"cannot read the model's configuration ({cause})",
            where=str(path),
            expected="a Hugging Face model folder",
            remedy="pass the folder that holds config.json and the safetensors files",
        ) from None
    return architecture_of(raw, where=str(path))


def architecture_of(raw: dict[str, Any], where: str = "config.json") -> Architecture:
    """The architecture of a parsed config.json; missing keys take the defaults of Hugging Face's class."""
    from transformers import CONFIG_MAPPING

    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            "model family not supported", where=f"{where}: model_type", expected=", ".join(FAMILIES), got=family
        )
    config = CONFIG_MAPPING[family].from_dict(raw)
    _refuse_what_megatron_cannot_express(config, where)
    heads = config.num_attention_heads
    return Architecture(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or bool(getattr(config, "attention_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        initializer_range=config.initializer_range,
        rope=dict(config.rope_parameters),
        experts=_experts(config, family),
    )


def _experts(config: Any, family: str) -> Experts | None:
    if family == "qwen3_moe":
        return Experts(
            count=getattr(config, "num_experts", None) or config.num_local_experts,
            active=config.num_experts_per_tok,
            ffn_hidden_size=config.moe_intermediate_size,
            normalise_top_k=bool(config.norm_topk_prob),
        )
    if family == "mixtral":
        return Experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, True)
    return None


def _refuse_what_megatron_cannot_express(config: Any, where: str) -> None:
    def refuse(field: str, expected: str) -> None:
        raise ConfigError(
            "cannot be expressed in this Megatron layer",
            where=f"{where}: {field}",
            expected=expected,
            got=getattr(config, field),
        )

    if config.hidden_act != "silu":
        refuse("hidden_act", "silu")
    if getattr(config, "mlp_bias", False):
        refuse("mlp_bias", "false")
    if config.model_type in ("llama", "qwen3", "qwen3_moe") and getattr(config, "attention_bias", False):
        refuse("attention_bias", "false (a bias on the output projection has no place in the layer)")
    # Mistral's and Mixtral's window is in force whenever it is set; Qwen's only with use_sliding_window.
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None:
        refuse("sliding_window", "null (full attention)")
    if getattr(config, "mlp_only_layers", None):
        refuse("mlp_only_layers", "[] (every layer has experts)")
    if getattr(config, "decoder_sparse_step", 1) != 1:
        refuse("decoder_sparse_step", "1 (every layer has experts)")


def rope_inverse_frequencies(architecture: Architecture) -> Tensor:
    """[head_dim / 2] fp32 angular frequencies of the rotary embedding (Su et al. 2021, eq. 15), scaling included.

    Raises:
        ConfigError: a scaling that also rescales the attention (yarn, longrope) or depends on the sequence (dynamic).
    """
    rope = architecture.rope
    kind = rope.get("rope_type", "default")
    base: float = rope["rope_theta"]
    inverse = base ** -(torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim)
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / rope["factor"]
    if kind == "llama3":
        return _llama3_frequencies(inverse, rope)
    raise ConfigError(
        "rotary scaling not supported",
        where="config.json: rope_parameters.rope_type",
        expected="default, linear or llama3",
        got=kind,
    )


def _llama3_frequencies(inverse: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    slowed = torch.where(wavelength > context / low, inverse / rope["factor"], inverse)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / rope["factor"] + smooth * slowed
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(is_between, between, slowed)
