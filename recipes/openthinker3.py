"""OpenThinker3-7B, the model of the offline GRPO release, on one node of eight 80 GB GPUs."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, ModelConfig, PathsConfig, PlanConfig, RunConfig
from recipes.objectives import blog, released


def openthinker3_7b() -> RunConfig:
    """The released settings: 8 trajectories a problem, 32 problems a step, 5 epochs, lr 1e-7."""
    root = "runs/openthinker3_7b"
    return RunConfig(
        name="openthinker3_7b",
        objective=released(),
        paths=PathsConfig(
            hf_model="models/OpenThinker3-7B",
            store=f"{root}/store",
            megatron=f"{root}/base_megatron",
            reference=f"{root}/reference",
            plan=f"{root}/plan",
            output=f"{root}/train",
        ),
        plan=PlanConfig(epochs=5, groups_per_step=32, short_groups="cycle", max_pack_tokens=32768, pack_multiple=64),
        layout=LayoutConfig(tp=4, sequence_parallel=True, processes=8),
        model=ModelConfig(precision="bf16", recompute="full"),
    )


def openthinker3_7b_blog() -> RunConfig:
    """The settings of the accompanying text: standardised advantages, clip, 1/|o|, beta 0.1, 3 epochs."""
    base = openthinker3_7b()
    return replace(
        base, name="openthinker3_7b_blog", objective=blog(), plan=replace(base.plan, epochs=3, short_groups="keep")
    )
