"""What a table is, and the rows that the families share.

Left column: a key of a Megatron torch_dist checkpoint (Transformer Engine's names), with `{layer}` and `{expert}` where
the model repeats, and `[i/n]` for the i-th of n equal blocks of rows. Right column: an operation of `ops`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from checkpoints_conversion.ops import Op, Qkv, Same, VocabRows
from megatron_offgrpo.model.hf_config import Architecture

Row = tuple[str, Op]
LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: `model_type` in config.json.
        rows: the table for a model; a bias or a norm may depend on its configuration.
        ignored: names of buffers that old checkpoints carry and no model reads.
    """

    name: str
    rows: Callable[[Architecture], tuple[Row, ...]]
    ignored: tuple[str, ...] = (f"{HF_LAYER}.self_attn.rotary_emb.inv_freq",)


def embeddings(architecture: Architecture) -> tuple[Row, ...]:
    """Embedding, final norm and, unless it is the embedding itself, the output layer."""
    rows: tuple[Row, ...] = (
        ("embedding.word_embeddings.weight", VocabRows("model.embed_tokens.weight", "V h")),
        ("decoder.final_layernorm.weight", Same("model.norm.weight", "h")),
    )
    if not architecture.tied_embeddings:
        rows += (("output_layer.weight", VocabRows("lm_head.weight", "V h")),)
    return rows


def attention(*, qkv_bias: bool = False, head_norms: bool = False) -> tuple[Row, ...]:
    """Pre-norm self-attention."""
    ours, theirs = f"{LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    rows: list[Row] = [
        (f"{ours}.linear_qkv.layer_norm_weight", Same(f"{HF_LAYER}.input_layernorm.weight", "h")),
        (f"{ours}.linear_qkv.weight", Qkv(theirs, "weight")),
        (f"{ours}.linear_proj.weight", Same(f"{theirs}.o_proj.weight", "h q")),
    ]
    if qkv_bias:
        rows.append((f"{ours}.linear_qkv.bias", Qkv(theirs, "bias")))
    if head_norms:
        rows.append((f"{ours}.q_layernorm.weight", Same(f"{theirs}.q_norm.weight", "d")))
        rows.append((f"{ours}.k_layernorm.weight", Same(f"{theirs}.k_norm.weight", "d")))
    return tuple(rows)


def gated_mlp() -> tuple[Row, ...]:
    """Dense MLP with a gate: linear_fc1 holds the gate above the up projection."""
    ours, theirs = f"{LAYER}.mlp", f"{HF_LAYER}.mlp"
    return (
        (f"{ours}.linear_fc1.layer_norm_weight", Same(f"{HF_LAYER}.post_attention_layernorm.weight", "h")),
        (f"{ours}.linear_fc1.weight[0/2]", Same(f"{theirs}.gate_proj.weight", "f h")),
        (f"{ours}.linear_fc1.weight[1/2]", Same(f"{theirs}.up_proj.weight", "f h")),
        (f"{ours}.linear_fc2.weight", Same(f"{theirs}.down_proj.weight", "h f")),
    )


def experts(module: str, *, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Mixture of experts with gated MLPs; the same keys for Megatron's sequential and grouped experts.

    Args:
        module: the Hugging Face layer's name for the mixture; `gate`, `up`, `down`: the projections of one expert.
    """
    ours, theirs = f"{LAYER}.mlp", f"{HF_LAYER}.{module}"
    one, their_one = f"{ours}.experts.experts.{{expert}}", f"{theirs}.experts.{{expert}}"
    return (
        (f"{LAYER}.pre_mlp_layernorm.weight", Same(f"{HF_LAYER}.post_attention_layernorm.weight", "h")),
        (f"{ours}.router.weight", Same(f"{theirs}.gate.weight", "E h")),
        (f"{one}.linear_fc1.weight[0/2]", Same(f"{their_one}.{gate}.weight", "e h")),
        (f"{one}.linear_fc1.weight[1/2]", Same(f"{their_one}.{up}.weight", "e h")),
        (f"{one}.linear_fc2.weight", Same(f"{their_one}.{down}.weight", "h e")),
    )
