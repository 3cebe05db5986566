"""Runs a Megatron model plainly, hidden states and logits included, to compare it with the original."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_conversion.safe_metadata import read_common
from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.model.hf_config import Architecture


def build_and_load(
    architecture: Architecture, layout: LayoutConfig, folder: Path, precision: str = "fp32"
) -> list[Any]:
    """This process's chunks of the model in `layout`, filled from one iteration's folder.

    Raises:
        CheckpointError: the checkpoint does not hold what the model needs.
    """
    from checkpoints_conversion.safe_load import load_tensors
    from megatron_offgrpo.model.gpt import build_model

    # Megatron reads it with the same allow-list; here it fails with one line.
    read_common(folder)
    chunks = build_model(architecture, layout, ModelConfig(precision=precision))  # type: ignore[arg-type]
    for chunk in chunks:
        wanted = {k: v for k, v in chunk.sharded_state_dict().items() if not k.endswith("_extra_state")}
        state = load_tensors({"model": wanted}, folder, validate_access_integrity=len(chunks) == 1)
        missing, unexpected = chunk.load_state_dict(state["model"], strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        assert not missing and not unexpected, (missing, unexpected)  # noqa: PT018
    return chunks


@torch.no_grad()
def run_stage(chunk: Any, ids_T: Tensor, received: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """One chunk's forward over a single sequence.

    Args:
        ids_T: [T] token ids.
        received: [T, 1, H] hidden states of the stage before, unless this is the first.

    Returns:
        [T, 1, H] hidden states it sends on (after the final norm on the last stage), and those after each of its layers
        by the layer's number, from 0.
    """
    from megatron_offgrpo.model.packing import ModelInput, PackedSegments

    layers: dict[int, Tensor] = {}
    sent: list[Tensor] = []

    def keep(layer: Any, _: Any, output: Any) -> None:
        layers[layer.layer_number - 1] = output[0] if isinstance(output, tuple) else output

    hooks = [layer.register_forward_hook(keep) for layer in chunk.decoder.layers]
    hooks.append(chunk.decoder.register_forward_hook(lambda _, __, output: sent.append(output)))
    num_tokens = ids_T.shape[0]
    rows_R = torch.arange(num_tokens, device=ids_T.device)
    segments = PackedSegments.of((0, num_tokens), ids_T.device)
    chunk.set_input_tensor([received])
    try:
        chunk(ModelInput(ids_T[None], rows_R, segments, rows_R, ids_T))
    finally:
        for hook in hooks:
            hook.remove()
    return sent[0], layers


@torch.no_grad()
def logits_of(chunk: Any, hidden: Tensor) -> Tensor:
    """[T, V] logits of the last chunk's hidden states [T, 1, H], gathered over tensor parallelism, without padding."""
    from megatron.core import parallel_state

    weight = (
        chunk.shared_embedding_or_output_weight()
        if chunk.share_embeddings_and_output_weights
        else chunk.output_layer.weight
    )
    local = hidden[:, 0] @ weight.T
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[:, : chunk.real_vocab_size]
