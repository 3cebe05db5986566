"""FLOPs of the packs of a plan."""

import numpy as np

from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.types import FloatArray

HEAD = 8.0
"""FLOPs of the head per parameter and response token: logits forward, again in the backward pass, two gradients.

An upper bound: 6 in packs whose logits fit into `model.head_chunk_mebibytes`."""


def pack_flops(
    plan: Plan, shape: ModelShape, *, recompute: bool | None = None, packs: range | None = None
) -> FloatArray:
    """FLOPs of a training step on each pack, forward and backward.

    Per token 6 per matrix parameter of the layers (2 forward, 4 backward; padding tokens included), per trajectory
    of l tokens 6 * num_layers * query_size * l^2 (QK^T and PV, causal: half of 12, after Narayanan et al. 2021), or
    l^2 - p^2 for l^2 where it shares the p tokens of its prompt with the trajectory before it, and
    6 * hidden * vocabulary per response token for the head.

    Args:
        recompute: None counts the mathematics (for MFU). A bool counts what is computed: the head's logits twice
            (8 for 6), and with True the layers' forward pass twice (8 for 6).
        packs: of these packs, by default of all.

    Returns:
        float64 [num_packs].
    """
    layers = 8.0 if recompute else 6.0
    head = 6.0 if recompute is None else HEAD
    packs = packs or range(plan.num_packs)
    first, last = np.searchsorted(plan.pack, [packs.start, packs.stop])
    lengths = plan.tokens[first:last].astype(np.float64)
    prompts = (lengths - plan.response_tokens[first:last]) * plan.continues(slice(first, last))
    entries = layers * shape.num_layers * shape.query_size * (lengths**2 - prompts**2)
    entries += head * shape.embedding * plan.response_tokens[first:last]
    of_packs = np.bincount(plan.pack[first:last] - packs.start, weights=entries, minlength=len(packs))
    return of_packs + layers * shape.matmul_parameters_per_token * plan.pack_padded[packs.start : packs.stop]
