"""The scale-model study: one run's settings, the arms it compares and the ablations; see docs/study.md."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_offgrpo.config import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PathsConfig,
    PlanConfig,
    RunConfig,
    WeightMode,
)
from megatron_offgrpo.objective import surrogates
from recipes import objectives

MAX_RESPONSE_TOKENS = 48
EPOCHS = 4


@dataclass(frozen=True)
class Arm:
    """One line of the study's table: an objective on a store, or on rollouts made in rounds."""

    name: str
    title: str
    objective: Callable[[], ObjectiveConfig] | None
    """None: the base student as it is."""
    store: str = "teacher"
    """Which trajectories, of `tools.study.stores`; with rounds, the ones to mix in."""
    rounds: int = 0
    """Rounds an epoch of generating with the student as it is by then, labelling and training; 0 trains offline."""
    own_share: float = 1.0
    """With rounds: share of the student's own trajectories in each group; the rest are of `store`."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Fields of the plan that differ from `study()`."""


def study() -> RunConfig:
    """The released objective on the study's small student."""
    root = "runs/study"
    return RunConfig(
        name="study",
        objective=bias(),
        paths=PathsConfig(
            hf_model=f"{root}/base_hf",
            store=f"{root}/stores/teacher",
            megatron=f"{root}/base_megatron",
            reference=f"{root}/references/teacher",
            plan=f"{root}/plan",
            output=f"{root}/train",
        ),
        plan=PlanConfig(epochs=EPOCHS, groups_per_step=16, max_pack_tokens=2048, pack_multiple=64),
        optimizer=OptimizerConfig(lr=1e-3),
        model=ModelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=16, keep=0),
    )


def _sized(objective: ObjectiveConfig) -> ObjectiveConfig:
    return replace(objective, max_response_tokens=MAX_RESPONSE_TOKENS)


def bias(value: float = 0.1, rule: str = "set", beta: float = 0.2, weight: WeightMode = "constant") -> ObjectiveConfig:
    """The released objective with another all-positive bias, beta or weight mode."""
    changed = {"all_positive_bias": value, "all_positive": rule, "beta": beta, "weight": weight}
    return _sized(replace(objectives.released(), **changed))  # type: ignore[arg-type]


def no_bias() -> ObjectiveConfig:
    """The released objective without the all-positive rule."""
    return bias(0.0, "none")


def luffy_shaping() -> ObjectiveConfig:
    """The released objective with LUFFY's shaped surrogate."""
    return replace(bias(), surrogate=partial(surrogates.shaped, gamma=0.1))


ARMS: tuple[Arm, ...] = (
    Arm("base", "base student", None),
    Arm("sft", "SFT on positives", objectives.sft),
    Arm("rft", "RFT: SFT on its own right solutions", objectives.sft, store="own"),
    Arm("dft", "DFT", objectives.dft),
    Arm("asft", "ASFT: DFT + KL", objectives.asft),
    Arm("no_bias", "offline GRPO, no bias", no_bias),
    Arm("bias", "offline GRPO, bias 0.1 set (released)", bias),
    Arm("bias_add", "offline GRPO, bias 0.1 add", partial(bias, rule="add")),
    Arm("bias_05", "offline GRPO, bias 0.5 set", partial(bias, value=0.5)),
    Arm("blog", "blog form", objectives.blog),
    Arm("luffy_shaping", "LUFFY shaping", luffy_shaping),
    Arm("reinforce", "REINFORCE", objectives.reinforce),
    Arm("redi", "REDI", objectives.redi),
    Arm("asymre", "AsymRE", objectives.asymre),
    Arm("topr", "TOPR, logged log-probs", objectives.topr, store="teacher_logged"),
    Arm("ppo", "PPO-clip, logged log-probs", objectives.ppo, store="teacher_logged"),
    Arm("pcl", "PCL sequence probability", objectives.pcl),
    Arm("dpo", "DPO on pairs", objectives.dpo),
    Arm("kto", "KTO", objectives.kto),
    Arm("luffy_mix", "LUFFY, half on-policy", objectives.luffy, rounds=2, own_share=0.5),
    Arm("on_policy", "on-policy GRPO in rounds", objectives.ppo, rounds=2),
    Arm("wrong_lookup", "released code's reward lookup", bias, store="wrong_lookup"),
    Arm("shuffled", "shuffled rewards, bias 0.1", bias, store="shuffled"),
    Arm("shuffled_no_bias", "shuffled rewards, no bias", no_bias, store="shuffled"),
)
SMALL = ("base", "bias", "no_bias", "shuffled")
"""The arms of `make study-small`."""


ABLATIONS: tuple[Arm, ...] = (
    *(Arm(f"bias_{value}", f"bias {value:g}", partial(bias, value=value)) for value in (0.02, 0.2, 1.0)),
    *(Arm(f"beta_{beta}", f"beta {beta:g}", partial(bias, beta=beta)) for beta in (0.0, 0.05, 0.8)),
    *(
        Arm(f"group_{size}", f"groups of {size}", bias, plan={"trajectories_per_group": size, "epochs": epochs})
        for size, epochs in ((2, 4 * EPOCHS), (4, 2 * EPOCHS))
    ),
    *(
        Arm(f"positive_{n}", f"{n} % all-positive groups", bias, store=f"positive_{n}", plan={"epochs": 2 * EPOCHS})
        for n in (0, 25, 50, 75, 100)
    ),
    *(Arm(f"noise_{share}", f"{share} % of labels flipped", bias, store=f"noise_{share}") for share in (5, 10, 20, 40)),
    *(Arm(f"weight_{mode}", f"{mode} weights", partial(bias, weight=mode)) for mode in ("token", "sequence", "group")),
)
