"""What a plan depends on, and which settings it refuses."""

from typing import Any

from megatron_offgrpo.config import ObjectiveConfig, PlanConfig
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.needs import needs_of

OBJECTIVE_FIELDS = (
    "advantage",
    "all_positive",
    "all_positive_bias",
    "weight",
    "kl_weight",
    "max_response_tokens",
    "mask_truncated",
)
"""Fields of the objective that the plan depends on."""


def plan_settings(plan: PlanConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """The settings that a plan depends on, as they stand in its manifest."""
    values = to_dict(objective)
    wanted = {name: values[name] for name in OBJECTIVE_FIELDS} | {"unit": needs_of(objective.surrogate).unit}
    return {"plan": to_dict(plan), "objective": wanted}


def capacity(plan: PlanConfig) -> int:
    """Real tokens that a pack may hold, so that its padded length stays within max_pack_tokens."""
    return plan.max_pack_tokens // plan.pack_multiple * plan.pack_multiple


def check_settings(plan: PlanConfig) -> None:
    """Refuses values that do not go together.

    Raises:
        ConfigError: naming the field.
    """
    if plan.max_pack_tokens < plan.pack_multiple:
        raise ConfigError(
            "smaller than plan.pack_multiple",
            where="plan.max_pack_tokens",
            expected=f">= {plan.pack_multiple}",
            got=plan.max_pack_tokens,
        )


def check_silent(objective: ObjectiveConfig) -> None:
    """Refuses to drop groups that are not silent.

    Raises:
        ConfigError: the objective has a KL or entropy term.
    """
    if objective.beta or objective.entropy_coefficient:
        raise ConfigError(
            "groups without advantages still have KL and entropy terms and cannot be dropped",
            where="plan.drop_silent_groups",
            expected="objective.beta = 0 and objective.entropy_coefficient = 0",
            got=f"beta = {objective.beta}, entropy_coefficient = {objective.entropy_coefficient}",
            remedy="--set plan.drop_silent_groups=false",
        )
