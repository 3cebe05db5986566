"""Surrogates of unit token: pure functions (logp, mu, advantage) -> loss per token, elementwise, any shape.

rho = exp(logp - mu), where mu is the behaviour log-prob of the token, or 0 (the log of 1) where none is known; then
rho is the probability itself. A recipe binds keywords with functools.partial. What a function needs besides is
declared (`needs`); `trajectory_surrogates` has those on whole trajectories and groups.
"""

import torch
from torch import Tensor

from megatron_offgrpo.objective.needs import needs


def linear(logp: Tensor, mu: Tensor, advantage: Tensor) -> Tensor:
    """-A * rho; gradient -A * rho * grad logp. The released recipe."""
    return -advantage * torch.exp(logp - mu)


def shaped(logp: Tensor, mu: Tensor, advantage: Tensor, *, gamma: float = 0.1) -> Tensor:
    """-A * rho / (rho + gamma), which lifts the gradient of improbable tokens (LUFFY: Yan et al. 2025)."""
    rho = torch.exp(logp - mu)
    return -advantage * rho / (rho + gamma)


def shaped_log(logp: Tensor, mu: Tensor, advantage: Tensor, *, scale: float = 1.0) -> Tensor:
    """-A * scale * log rho (LUFFY's `logp`)."""
    return -advantage * scale * (logp - mu)


def shaped_prob_log(logp: Tensor, mu: Tensor, advantage: Tensor, *, scale: float = 1.0) -> Tensor:
    """-A * (rho + scale * log rho) (LUFFY's `p_logp`)."""
    log_rho = logp - mu
    return -advantage * (torch.exp(log_rho) + scale * log_rho)


def shaped_sqrt(logp: Tensor, mu: Tensor, advantage: Tensor) -> Tensor:
    """-A * sqrt(rho) (LUFFY's `square_root`)."""
    return -advantage * torch.exp(0.5 * (logp - mu))


def shaped_pow(logp: Tensor, mu: Tensor, advantage: Tensor, *, exponent: float = 0.5) -> Tensor:
    """-A * rho^exponent (LUFFY's `pow`)."""
    return -advantage * torch.exp(exponent * (logp - mu))


def shaped_inverse(logp: Tensor, mu: Tensor, advantage: Tensor, *, gamma: float = 0.1) -> Tensor:
    """-A * gamma / (1 + gamma - rho): grows towards rho = 1 (LUFFY's 0.1 / (1.1 - rho)).

    It has a pole at rho = 1 + gamma and is meant for rho <= 1 (no behaviour log-probs). At and beyond the pole the
    value is NaN, which stops the step before the weights change.
    """
    rho = torch.exp(logp - mu)
    room = 1.0 + gamma - rho
    return -advantage * gamma / torch.where(room > 0, room, torch.nan)


def clipped(logp: Tensor, mu: Tensor, advantage: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """-min[rho * A, max(rho, 1 - epsilon) * A]: a wrong token is not pushed below 1 - epsilon (the blog's text).

    For A >= 0 this is -A * rho; for A < 0 it is -A * max(rho, 1 - epsilon), flat where rho < 1 - epsilon.
    """
    rho = torch.exp(logp - mu)
    return -torch.minimum(rho * advantage, rho.clamp(min=1.0 - epsilon) * advantage)


def reinforce(logp: Tensor, mu: Tensor, advantage: Tensor) -> Tensor:
    """-A * logp, without importance weights; mu is not used."""
    return -advantage * logp


def sft(logp: Tensor, mu: Tensor, advantage: Tensor) -> Tensor:
    """-logp where A > 0, else 0: cross-entropy on the positives; the size of A does not matter, mu is not used."""
    return torch.where(advantage > 0, -logp, torch.zeros_like(logp))


def dft(logp: Tensor, mu: Tensor, advantage: Tensor) -> Tensor:
    """-sg(pi) * logp where A > 0, else 0, with pi = exp(logp) (dynamic fine-tuning: Wu et al. 2025).

    Its gradient is that of `linear` with A = 1 and mu = 0 on positives.
    """
    return torch.where(advantage > 0, -torch.exp(logp).detach() * logp, torch.zeros_like(logp))


def redi(logp: Tensor, mu: Tensor, advantage: Tensor, *, alpha: float = 0.8) -> Tensor:
    """-logp where A > 0, alpha * logp where A < 0, else 0; the size of A does not matter, mu is not used.

    With `sequence` weights each trajectory counts by the mean over its tokens. Source: Reinforcement Distillation
    (Xu et al. 2025, eq. 6), which applies it after supervised fine-tuning, with alpha = 0.8.
    """
    return torch.where(advantage > 0, -logp, torch.where(advantage < 0, alpha * logp, torch.zeros_like(logp)))


@needs(behaviour="required")
def ppo(
    logp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min[rho * A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) * A]; where A < 0, at most -dual_clip * A.

    Args:
        epsilon_low, epsilon_high: equal in PPO (Schulman et al. 2017, eq. 7); DAPO's clip-higher has 0.2 and 0.28 (Yu
            et al. 2025, eq. 8).
        dual_clip: c > 1 of dual-clip PPO (Ye et al. 2020, eq. 5), or None.
    """
    rho = torch.exp(logp - mu)
    value = torch.minimum(rho * advantage, rho.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantage)
    if dual_clip is not None:
        value = torch.where(advantage < 0, torch.maximum(value, dual_clip * advantage), value)
    return -value


def cispo(logp: Tensor, mu: Tensor, advantage: Tensor, *, max_ratio: float = 5.0) -> Tensor:
    """-A * sg(min(rho, max_ratio)) * logp: the weight is clipped, and no token loses its gradient.

    Source: CISPO (MiniMax 2025, "MiniMax-M1", eq. 4), without a lower bound as in its experiments; 5 is the bound of
    ScaleRL (Khatri et al. 2025).
    """
    return -advantage * torch.exp(logp - mu).detach().clamp(max=max_ratio) * logp


@needs(takes=("on_policy",), behaviour="on_policy")
def mixed(
    logp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    *,
    on_policy: Tensor,
    gamma: float = 0.1,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """`ppo` on the student's own trajectories, `shaped` on the teacher's (LUFFY: Yan et al. 2025, eq. 4 and 7)."""
    own = ppo(logp, mu, advantage, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return torch.where(on_policy, own, shaped(logp, mu, advantage, gamma=gamma))
