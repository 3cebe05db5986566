"""Surrogates: pure functions (logp, mu, advantage) -> loss per token, elementwise, any shape.

rho = exp(logp - mu), where mu is the behaviour log-prob of the token, or 0 (the log of 1) where none is known; then
rho is the probability itself. A recipe binds keywords with functools.partial. A function whose unit is the
trajectory takes sums over the trajectory in place of token values; see `unit`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Unit = Literal["token", "trajectory"]
Function = TypeVar("Function", bound=Callable[..., Any])


def unit(name: Unit) -> Callable[[Function], Function]:
    """Declares what one value of a surrogate belongs to; without it, a token.

    token: f(logp, mu, advantage). trajectory: f(logp, mu, advantage, num_tokens), where logp and mu are summed over
    the num_tokens response tokens of the trajectory; each of its tokens then carries the trajectory's value, so that
    `sequence` weights 1 / (B |o_i|) average over trajectories.
    """

    def declare(function: Function) -> Function:
        function.unit = name  # type: ignore[attr-defined]
        return function

    return declare


def unit_of(surrogate: Callable[..., Any]) -> Unit:
    """The unit that a surrogate, or a functools.partial of one, declares."""
    while isinstance(surrogate, functools.partial):
        surrogate = surrogate.func
    return getattr(surrogate, "unit", "token")


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


@unit("trajectory")
def gspo(
    logp: Tensor,
    mu: Tensor,
    advantage: Tensor,
    num_tokens: Tensor,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Tensor:
    """-min[s * A, clip(s, 1 - epsilon_low, 1 + epsilon_high) * A], s = exp((sum logp - sum mu) / num_tokens).

    Args:
        logp, mu: sums over the trajectory's response tokens.
        num_tokens: its number of response tokens.

    It compares with the behaviour policy and means little without its log-probs (mu = 0 gives s = the geometric mean
    probability, which is clipped almost always). Source: Zheng et al. 2025, with the clip range of its experiments.
    """
    ratio = torch.exp((logp - mu) / num_tokens)
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantage)
