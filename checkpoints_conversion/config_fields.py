"""Every field of a Hugging Face config is mapped to Megatron, known to change nothing, or refused.

What a field is mapped to stands in `megatron_offgrpo.model.hf_config` and `megatron_offgrpo.model.gpt`.
"""

from collections.abc import Mapping
from typing import Any

from megatron_offgrpo.errors import ConfigError

MAPPED = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
    }
)
MAPPED_EXPERTS = {
    "qwen3_moe": frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"})
    | {"norm_topk_prob"},
    "mixtral": frozenset({"num_local_experts", "num_experts", "num_experts_per_tok"}),
}
"""Fields of the mixture-of-experts part, by family."""

ALLOWED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
    "router_jitter_noise": (0,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "auto_map": (None, {}),
}
"""Fields with the values that Megatron's layer, as it is built here, expresses."""

ROPE_TYPES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
"""Rotary embeddings that are expressed, with the values each needs besides the base."""

HARMLESS = frozenset(
    {
        # Where the weights come from and how they are stored.
        *("_name_or_path", "name_or_path", "_model_name_or_path", "model_name_or_path", "base_model_name_or_path"),
        *(
            "transformers_version",
            "transformers.js_config",
            "_from_model_config",
            "_commit_hash",
            "dtype",
            "torch_dtype",
        ),
        *("unsloth_fixed", "unsloth_version", "_attn_implementation_autoset", "_attn_implementation"),
        *("experts_implementation", "_experts_implementation", "attn_implementation"),
        # What generation and pipelines use.
        *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("unk_token_id", "cls_token_id", "mask_token_id", "pad_token", "bos_token", "eos_token", "unk_token"),
        *(
            "max_sequence_length",
            "model_max_length",
            "padding_side",
            "tokenizer_padding_side",
            "tokenizer_model_max_length",
        ),
        *(
            "cache_implementation",
            "tokenizer_class",
            "prefix",
            "task_specific_params",
            "problem_type",
            "finetuning_task",
        ),
        *("id2label", "label2id", "num_labels", "output_hidden_states", "output_attentions", "return_dict"),
        *("output_router_logits", "torchscript", "use_bfloat16", "tf_legacy_loss", "tie_last_hidden_states"),
        *("temperature", "top_k", "top_p", "typical_p", "max_length", "min_length", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        # A numerical detail of how old code split its matrix products.
        "pretraining_tp",
        # Training of the router here has its own setting; the forward pass does not know this.
        "router_aux_loss_coef",
        # Without use_sliding_window, which is refused, it says nothing.
        "max_window_layers",
    }
)
"""Fields that change neither weights nor logits."""


def check_fields(raw: Mapping[str, Any], where: str) -> None:
    """Refuses a config.json with a field or value that Megatron cannot express or that nobody here knows.

    Raises:
        ConfigError: one error that lists all of them.
    """
    family = str(raw.get("model_type"))
    problems = []
    for field, value in raw.items():
        problem = field_problem(field, value, raw, family)
        if problem is not None:
            problems.append(f"{field} = {value!r}: {problem}")
    if problems:
        raise ConfigError(
            f"{len(problems)} fields cannot be converted:\n  " + "\n  ".join(problems) + "\n",
            where=where,
            remedy="an unknown field that does not change the model may be removed from a copy of config.json",
        )


def field_problem(field: str, value: Any, raw: Mapping[str, Any], family: str) -> str | None:
    """Why a field is refused, or None."""
    if field in MAPPED or field in HARMLESS or field in MAPPED_EXPERTS.get(family, ()):
        return None
    if field in ALLOWED:
        return None if value in ALLOWED[field] else f"expected {' or '.join(map(repr, ALLOWED[field]))}"
    if field == "architectures":
        names = [] if value is None else list(value)
        is_language_model = all(name.endswith("ForCausalLM") for name in names)
        return None if is_language_model else "expected a causal language model"
    if field in ("rope_scaling", "rope_parameters"):
        return _rope_problem(value or {})
    if field == "rope_theta":
        return None
    if field == "sliding_window":
        # Qwen's window is in force with use_sliding_window only, Mistral's and Mixtral's whenever it is set.
        in_force = value is not None and raw.get("use_sliding_window", not family.startswith("qwen"))
        return "expected None: every layer has full attention" if in_force else None
    if field == "layer_types":
        return None if set(value or ()) <= {"full_attention"} else "expected full_attention in every layer"
    return "unknown field"


def _rope_problem(rope: Mapping[str, Any]) -> str | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        return f"expected rope_type {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1) != 1:
        return "expected partial_rotary_factor 1"
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | ROPE_TYPES[kind]
    unknown = sorted(set(rope) - known)
    missing = sorted(ROPE_TYPES[kind] - set(rope))
    if unknown or missing:
        return f"unknown {unknown}, missing {missing} for rope_type {kind}"
    return None
