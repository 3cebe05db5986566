"""The architecture that a Megatron checkpoint was written with, compared with that of a Hugging Face folder."""

from argparse import Namespace
from typing import Any

import torch

from checkpoints_conversion.megatron_lm_args import args_of
from checkpoints_conversion.megatron_reader import MegatronWeights
from checkpoints_conversion.safe_metadata import read_common
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import ARCHITECTURE, Architecture, architecture_differences

_SHAPES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_VALUES = ("norm_epsilon", "rotary_base", "qk_layernorm", "add_qkv_bias", "untie_embeddings_and_output_weights")
_ROPE = ("use_rope_scaling", "rotary_seq_len_interpolation_factor")
_EXPERTS = ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax")


def recorded_differences(architecture: Architecture, weights: MegatronWeights) -> list[str] | None:
    """`name: VALUE and VALUE` for each difference, config.json's value first; None where nothing is recorded.

    A checkpoint of this project records every field; Megatron-LM's has the arguments that the forward pass depends on.
    """
    record = weights.manifest.counts.get(ARCHITECTURE) if weights.manifest else None
    if record is not None:
        return architecture_differences(architecture, record)
    args = read_common(weights.folder).get("args")
    return None if args is None else _argument_differences(vars(args_of(architecture, torch.float32)), args)


def require_recorded(architecture: Architecture, weights: MegatronWeights, hf: str) -> None:
    """Refuses a config.json with another architecture than the checkpoint's.

    Raises:
        CheckpointError: it lists the differences.
    """
    found = recorded_differences(architecture, weights)
    if found:
        raise CheckpointError(
            f"{hf}/config.json is not that of this checkpoint (config.json and checkpoint):\n  "
            + "\n  ".join(found)
            + "\n",
            where=str(weights.folder),
            remedy="pass the Hugging Face folder that this checkpoint was made from; nothing has been written",
        )


def _argument_differences(ours: dict[str, Any], args: Namespace) -> list[str]:
    theirs = dict(vars(args))
    if not theirs.get("group_query_attention", True):
        theirs["num_query_groups"] = theirs.get("num_attention_heads")
    names = [*_SHAPES, *_VALUES, *_ROPE, *(_EXPERTS if ours["num_experts"] else ("num_experts", "ffn_hidden_size"))]
    if ours["use_rope_scaling"]:
        names.append("rope_scaling_factor")
    if theirs.get("rotary_seq_len_interpolation_factor") == 1:
        theirs["rotary_seq_len_interpolation_factor"] = None
    return [
        f"{name}: {ours[name]} and {theirs[name]}" for name in names if name in theirs and ours[name] != theirs[name]
    ]
