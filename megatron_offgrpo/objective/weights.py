"""Token weights w_t (and v_t): how the tokens of one optimizer step are averaged; NumPy only."""

import numpy as np

from megatron_offgrpo.config import WeightMode
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray


def trajectory_weights(
    mode: WeightMode,
    response_lengths_N: IntArray,
    group_N: IntArray,
    *,
    max_response_tokens: int,
    mask_N: BoolArray | None = None,
) -> FloatArray:
    """The weight of each response token of trajectory i in one optimizer step; constant within a trajectory.

    constant: 1 / (B * L_max); token: 1 / (response tokens in the step); sequence: 1 / (B * |o_i|);
    group: 1 / (number of groups * response tokens of i's group).

    Masked and empty trajectories weigh 0. Tokens of masked ones are left out of the token counts of `token` and
    `group`; B and the number of groups keep counting masked and empty trajectories, so that leaving a
    trajectory's tokens out does not raise the weight of others in the other modes.

    Args:
        response_lengths_N: int [N], |o_i| in tokens, for the B = N trajectories of the step (repeats included).
        group_N: int [N], any number that tells the groups of the step apart.
        max_response_tokens: L_max in tokens, used by `constant` only.
        mask_N: bool [N], True where the tokens must weigh 0; None masks nothing.

    Returns:
        float64 [N].

    Raises:
        ConfigError: unknown mode, or L_max below 1.

    Source: sequence is GRPO (Shao et al. 2024, eq. 3), token DAPO (Yu et al. 2025, eq. 8), constant Dr. GRPO
    (Liu et al. 2025) and the released offline-GRPO recipe.
    """
    lengths_N = np.asarray(response_lengths_N, dtype=np.float64)
    if mask_N is not None:
        lengths_N = np.where(mask_N, 0.0, lengths_N)
    num_trajectories = len(lengths_N)
    if mode == "constant":
        if max_response_tokens < 1:
            raise ConfigError(
                "must be positive", where="objective.max_response_tokens", expected=">= 1", got=max_response_tokens
            )
        denominators_N = np.full(num_trajectories, float(num_trajectories) * max_response_tokens)
    elif mode == "token":
        denominators_N = np.full(num_trajectories, lengths_N.sum())
    elif mode == "sequence":
        denominators_N = num_trajectories * lengths_N
    elif mode == "group":
        names, index_N = np.unique(group_N, return_inverse=True)
        denominators_N = len(names) * np.bincount(index_N, weights=lengths_N, minlength=len(names))[index_N]
    else:
        raise ConfigError(
            "unknown weight mode", where="objective.weight", expected="constant, token, sequence or group", got=mode
        )
    weights_N = np.zeros(num_trajectories)
    np.divide(1.0, denominators_N, out=weights_N, where=lengths_N > 0)
    return weights_N
