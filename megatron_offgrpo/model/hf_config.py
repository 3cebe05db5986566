"""What Megatron needs to know of a Hugging Face model, read from its configuration and from nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_offgrpo.errors import ConfigError

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral")
# What Hugging Face's classes put in the place of a missing key, where it does not depend on the model's size.
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "initializer_range": 0.02,
    "head_dim": None,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
}
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    "qwen3_moe": {"max_position_embeddings": 32768, "sliding_window": 4096},
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
}


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
    """The architecture of a parsed config.json, old or new keys, as Hugging Face's class of the family reads it.

    Where that class has a default that does not depend on the model's size, a missing key takes it; a missing size is
    an error. Transformers itself is not asked: its import takes as long as all else that a rank begins with.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            "model family not supported", where=f"{where}: model_type", expected=", ".join(FAMILIES), got=family
        )
    config = _Config(raw, where, {**_DEFAULTS, **_DEFAULTS_OF[family]})
    _refuse_what_megatron_cannot_express(config)
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    return Architecture(
        family=family,
        num_layers=config.size("num_hidden_layers", most=10_000),
        hidden_size=hidden,
        ffn_hidden_size=config.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", none=heads),
        head_dim=config.size("head_dim", none=hidden // heads),
        vocab_size=config.size("vocab_size"),
        norm_epsilon=config.number("rms_norm_eps"),
        max_positions=config.size("max_position_embeddings"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        initializer_range=config.number("initializer_range"),
        rope=_rope(config),
        experts=_experts(config, family),
    )


class _Config:
    """The keys of a config.json, with an error that names one which is missing or of another type."""

    def __init__(self, raw: dict[str, Any], where: str, defaults: dict[str, Any] | None = None) -> None:
        self.own, self.raw, self.where = raw, {**(defaults or {}), **raw}, where
        self.get = self.raw.get

    def size(self, name: str, *, none: int | None = None, most: int = 10**9) -> int:
        """A whole number above 0; `none` in the place of null. More than `most` is a damaged file."""
        got = none if name in self.raw and self.raw[name] is None else self.raw.get(name)
        if isinstance(got, bool) or not isinstance(got, int) or got < 1:
            raise self._error(name, "a whole number above 0")
        if got > most:
            raise self._error(name, f"at most {most}")
        return got

    def number(self, name: str) -> float:
        """A finite number above 0."""
        got = self.raw[name]
        if isinstance(got, bool) or not isinstance(got, int | float) or not 0 < got < math.inf:
            raise self._error(name, "a finite number above 0")
        return got

    def flag(self, name: str) -> bool:
        """True or false; false where it is missing or null."""
        got = self.raw.get(name)
        if not isinstance(got, bool | None):
            raise self._error(name, "true or false")
        return bool(got)

    def refuse_unless(self, allowed: bool, name: str, expected: str) -> None:
        """Raises where the layer cannot express a key's value."""
        if not allowed:
            raise ConfigError(
                "cannot be expressed in this Megatron layer",
                where=f"{self.where}: {name}",
                expected=expected,
                got=self.raw[name],
            )

    def _error(self, name: str, expected: str) -> ConfigError:
        return ConfigError(
            "the model's configuration cannot be used",
            where=f"{self.where}: {name}",
            expected=expected,
            got=repr(self.raw[name]) if name in self.raw else "no such key",
            remedy="take config.json from where the model is published",
        )


def _rope(config: _Config) -> dict[str, Any]:
    """Today's `rope_parameters`, also of a model that was saved with `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise config._error("rope_scaling" if config.get("rope_scaling") else "rope_parameters", "an object")
    rope = dict(rope)
    if "rope_theta" in rope:
        base = _Config(rope, f"{config.where}: rope_parameters").number("rope_theta")
        if config.own.get("rope_theta", base) != base:
            raise ConfigError(
                "two values that contradict each other",
                where=f"{config.where}: rope_theta",
                expected=f"{base}, as in rope_parameters, or no such key",
                got=config.own["rope_theta"],
                remedy="take config.json from where the model is published",
            )
    rope.setdefault("rope_theta", config.number("rope_theta"))
    # The name that the type had before.
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", config.size("max_position_embeddings"))
    return rope


def _experts(config: _Config, family: str) -> Experts | None:
    if family not in ("qwen3_moe", "mixtral"):
        return None
    of_qwen = family == "qwen3_moe"
    return Experts(
        count=config.size("num_experts" if "num_experts" in config.raw else "num_local_experts"),
        active=config.size("num_experts_per_tok"),
        ffn_hidden_size=config.size("moe_intermediate_size" if of_qwen else "intermediate_size"),
        normalise_top_k=bool(config.get("norm_topk_prob")) if of_qwen else True,
    )


def _refuse_what_megatron_cannot_express(config: _Config) -> None:
    get, family = config.get, config.get("model_type")
    config.refuse_unless(get("hidden_act") == "silu", "hidden_act", "silu")
    config.refuse_unless(not get("mlp_bias"), "mlp_bias", "false")
    # Qwen 2 has one on the projections of queries, keys and values alone, whatever its configuration says.
    without_bias = family == "qwen2" or not get("attention_bias")
    config.refuse_unless(without_bias, "attention_bias", "false (a bias on the output projection has no place)")
    # Mistral's and Mixtral's window is in force whenever it is set; Qwen's only with use_sliding_window.
    full = get("sliding_window") is None or not (family in ("mistral", "mixtral") or get("use_sliding_window"))
    config.refuse_unless(full, "sliding_window", "null (full attention)")
    config.refuse_unless(not get("mlp_only_layers"), "mlp_only_layers", "[] (every layer has experts)")
    config.refuse_unless(get("decoder_sparse_step") == 1, "decoder_sparse_step", "1 (every layer has experts)")


ARCHITECTURE = "architecture"
"""Where the manifest of a checkpoint records it, among the counts."""
KEYS = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_epsilon": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "experts.count": "num_experts",
    "experts.active": "num_experts_per_tok",
    "experts.ffn_hidden_size": "moe_intermediate_size",
    "experts.normalise_top_k": "norm_topk_prob",
}
"""config.json's names for the fields of an architecture, where they differ."""


def architecture_differences(architecture: Architecture, other: Mapping[str, Any]) -> list[str]:
    """`rms_norm_eps: 1e-06 and 1e-05` for each field that differs.

    Args:
        other: another architecture as `dataclasses.asdict` gives it; it may have been through JSON.
    """
    ours, theirs = _flat(asdict(architecture)), _flat(other)
    return [
        f"{KEYS.get(name, name)}: {ours.get(name, 'none')} and {theirs.get(name, 'none')}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values under names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


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
