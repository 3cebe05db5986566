"""Estimates of KL(pi || ref) per token from the log-probs of the sampled tokens, elementwise, any shape.

x = ref - logp throughout. On tokens drawn from pi, k1 and k3 are unbiased and k2 has low variance; on a teacher's
tokens they are penalties that vanish at logp = ref. Source: Schulman 2020, "Approximating KL divergence".
"""

import torch
from torch import Tensor


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """-x = logp - ref; may be negative, gradient 1."""
    return logp - ref


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """x^2 / 2; gradient logp - ref."""
    return 0.5 * (ref - logp).square()


def k3(logp: Tensor, ref: Tensor, *, clamp: float | None = 10.0) -> Tensor:
    """clamp(expm1(x) - x, -clamp, clamp), never negative; gradient 1 - exp(x), and 0 where the value is clamped.

    Args:
        clamp: the bound of the value, as in the released code; None for none.
    """
    x = ref - logp
    value = torch.expm1(x) - x
    return value if clamp is None else value.clamp(-clamp, clamp)
