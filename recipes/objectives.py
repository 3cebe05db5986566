"""The published objectives; a recipe takes one and changes what it needs with `dataclasses.replace`."""

from dataclasses import replace
from functools import partial

from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.objective import advantages, divergences, surrogates, trajectory_surrogates


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


def _alone(**fields: object) -> ObjectiveConfig:
    """A surrogate without all-positive rule, KL and entropy terms."""
    return replace(released(), all_positive="none", beta=0.0, entropy_coefficient=0.0, **fields)  # type: ignore[arg-type]


def sft() -> ObjectiveConfig:
    """Cross-entropy on the right trajectories, averaged over the tokens of the step."""
    return _alone(advantage=advantages.raw, surrogate=surrogates.sft, weight="token")


def dft() -> ObjectiveConfig:
    """Dynamic fine-tuning on the right trajectories (Wu et al. 2025)."""
    return _alone(advantage=advantages.raw, surrogate=surrogates.dft, weight="token")


def asft() -> ObjectiveConfig:
    """Anchored fine-tuning: DFT with a KL term to the reference (Zhu et al. 2025)."""
    return replace(dft(), beta=0.05)


def reinforce() -> ObjectiveConfig:
    """-A logp with A = r - mean, averaged over trajectories."""
    return _alone(advantage=advantages.mean_only, surrogate=surrogates.reinforce, weight="sequence")


def redi() -> ObjectiveConfig:
    """Reinforcement distillation: positives in full, negatives scaled by 0.8 (Xu et al. 2025)."""
    return _alone(advantage=advantages.signed, surrogate=surrogates.redi, weight="sequence")


def asymre() -> ObjectiveConfig:
    """Asymmetric REINFORCE with the fixed baseline V = -0.1 (Arnal et al. 2025)."""
    advantage = partial(advantages.asymmetric, value=-0.1)
    return _alone(advantage=advantage, surrogate=surrogates.reinforce, weight="sequence")


def topr() -> ObjectiveConfig:
    """Tapered off-policy REINFORCE with rewards 1 and -1 (Le Roux et al. 2025); needs behaviour log-probs."""
    return _alone(advantage=advantages.signed, surrogate=trajectory_surrogates.topr, weight="sequence")


def ppo() -> ObjectiveConfig:
    """GRPO's clipped surrogate against the logged policy, with clip-higher (Yu et al. 2025)."""
    surrogate = partial(surrogates.ppo, epsilon_low=0.2, epsilon_high=0.28)
    return _alone(advantage=advantages.grpo, surrogate=surrogate, weight="token")


def cispo() -> ObjectiveConfig:
    """CISPO (MiniMax 2025): clipped importance weights on -A logp."""
    return _alone(advantage=advantages.grpo, surrogate=surrogates.cispo, weight="token")


def gspo() -> ObjectiveConfig:
    """GSPO (Zheng et al. 2025): the clipped surrogate on whole sequences; needs behaviour log-probs."""
    return _alone(advantage=advantages.grpo, surrogate=trajectory_surrogates.gspo, weight="sequence")


def pcl() -> ObjectiveConfig:
    """The sequence-probability loss of PCL-Reasoner-V1.5 (Peng Cheng Laboratory 2026)."""
    return _alone(advantage=advantages.signed, surrogate=trajectory_surrogates.sequence_probability, weight="sequence")


def luffy() -> ObjectiveConfig:
    """LUFFY (Yan et al. 2025): shaped probabilities on the teacher's trajectories, the clip on the student's own."""
    return _alone(advantage=advantages.grpo, surrogate=surrogates.mixed, weight="token")


def dpo() -> ObjectiveConfig:
    """DPO (Rafailov et al. 2023) on all right-wrong pairs of a group."""
    return _alone(advantage=advantages.signed, surrogate=trajectory_surrogates.dpo, weight="group")


def kto() -> ObjectiveConfig:
    """KTO (Ethayarajh et al. 2024) on the right and wrong members of a group."""
    return _alone(advantage=advantages.signed, surrogate=trajectory_surrogates.kto, weight="group")
