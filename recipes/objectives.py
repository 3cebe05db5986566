"""The published objectives; a recipe takes one and changes what it needs with `dataclasses.replace`."""

from functools import partial

from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.objective import advantages, divergences, surrogates


def released() -> ObjectiveConfig:
    """The objective of the released offline GRPO code (KRAFTON & SKT 2025, OpenThinker3-7B)."""
    return ObjectiveConfig(
        advantage=advantages.mean_only,
        surrogate=surrogates.linear,
        kl=partial(divergences.k3, clamp=10.0),
        all_positive="set",
        all_positive_bias=0.1,
        beta=0.2,
        entropy_coefficient=0.001,
        weight="constant",
        max_response_tokens=31744,
    )


def blog() -> ObjectiveConfig:
    """The objective of the accompanying text: standardised advantages plus b, a lower clip, 1/|o|, beta 0.1."""
    return ObjectiveConfig(
        advantage=partial(advantages.grpo, eps=1e-6),
        surrogate=partial(surrogates.clipped, epsilon=0.2),
        kl=partial(divergences.k3, clamp=10.0),
        all_positive="add",
        all_positive_bias=0.1,
        beta=0.1,
        entropy_coefficient=0.0,
        weight="sequence",
        max_response_tokens=31744,
    )
