"""Surrogates of unit trajectory and group: functions of sums over the response tokens; see `needs`.

Everywhere logp, mu and ref are [K] sums over a trajectory's response tokens, num_tokens [K] their number, advantage
[K]. `sequence` weights average trajectory values over the step, `group` weights average group values.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_offgrpo.objective.needs import needs


@needs("trajectory", behaviour="required")
def gspo(
    logp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    num_tokens: Tensor,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Tensor:
    """-min[s * A, clip(s, 1 - epsilon_low, 1 + epsilon_high) * A], s = exp((logp - mu) / num_tokens).

    Source: GSPO (Zheng et al. 2025, eq. 5 and 7), with the clip range of its experiments.
    """
    ratio = torch.exp((logp - mu) / num_tokens)
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantage)


@needs("trajectory")
def sequence_probability(logp: Tensor, mu: Tensor, advantage: Tensor, num_tokens: Tensor) -> Tensor:
    """-A * p, with p = exp(logp / num_tokens), the geometric mean of the token probabilities.

    With `signed` advantages it is the loss of PCL-Reasoner-V1.5 (Peng Cheng Laboratory 2026), r (1 - p) + (1 - r) p,
    up to a constant.
    """
    return -advantage * torch.exp(logp / num_tokens)


@needs("trajectory", behaviour="required")
def topr(logp: Tensor, mu: Tensor, advantage: Tensor, num_tokens: Tensor) -> Tensor:
    """-A * logp where A >= 0, -A * sg(min(1, exp(logp - mu))) * logp where A < 0.

    Positives count in full; a negative fades out as the student unlearns it. The ratio is that of the whole
    trajectory and the loss is its sum of log-probs, not their mean. Source: TOPR (Le Roux et al. 2025, eq. 8).
    """
    tapered = torch.exp((logp - mu).detach().clamp(max=0.0))
    return -advantage * torch.where(advantage < 0, tapered, 1.0) * logp


@needs("group", takes=("ref",))
def dpo(
    logp: Tensor, mu: Tensor, advantage: Tensor, num_tokens: Tensor, *, ref: Tensor, temperature: float = 0.1
) -> Tensor:
    """Mean over all pairs (i right, j wrong) of the group of -log sigmoid(temperature * (x_i - x_j)), x = logp - ref.

    Right: A > 0, wrong: A < 0. A group without a pair gives 0. `temperature` is the paper's beta.
    Source: DPO (Rafailov et al. 2023, eq. 7).
    """
    x = logp - ref
    pairs = (advantage > 0).to(x.dtype)[:, None] * (advantage < 0).to(x.dtype)[None, :]
    losses = -logsigmoid(temperature * (x[:, None] - x[None, :]))
    return (pairs * losses).sum() / pairs.sum().clamp(min=1.0)


@needs("group", takes=("ref",))
def kto(
    logp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    num_tokens: Tensor,
    *,
    ref: Tensor,
    temperature: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Mean over members with A != 0 of lambda * (1 - sigmoid(+-temperature * (x - z))), x = logp - ref.

    + and desirable_weight where A > 0, - and undesirable_weight where A < 0. z = sg(max(0, mean of x over the group))
    stands for KL(pi || ref). Source: KTO (Ethayarajh et al. 2024, eq. 8); there z comes from responses to other
    prompts, which the cache does not hold.
    """
    x = logp - ref
    z = x.detach().mean().clamp(min=0.0)
    sign = torch.sign(advantage)
    scale = torch.where(sign > 0, desirable_weight, undesirable_weight) * sign.abs()
    losses = scale * (1.0 - torch.sigmoid(temperature * sign * (x - z)))
    return losses.sum() / sign.abs().sum().clamp(min=1.0)
