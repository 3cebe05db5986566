"""OpenThinker3-7B, the model of the offline GRPO release, on one node of eight 80 GB GPUs and on more."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, ModelConfig, PlanConfig, RunConfig
from recipes.objectives import blog, released
from recipes.paths import run_paths
from recipes.sizes import on_80gb


def openthinker3_7b() -> RunConfig:
    """The released settings: 8 trajectories a problem, 32 problems a step, 5 epochs, lr 1e-7; 8 x 80 GB."""
    return RunConfig(
        name="openthinker3_7b",
        objective=released(),
        paths=run_paths("openthinker3_7b", "OpenThinker3-7B"),
        plan=PlanConfig(epochs=5, groups_per_step=32, short_groups="cycle", max_pack_tokens=32768, pack_multiple=64),
        layout=LayoutConfig(tp=4, sequence_parallel=True, processes=8),
        model=ModelConfig(precision="bf16", recompute="full"),
    )


def openthinker3_7b_32x80gb() -> RunConfig:
    """The released settings on four nodes; with more GPUs nothing needs to be recomputed."""
    return on_80gb(openthinker3_7b(), 32, model={"recompute": "none"})


def openthinker3_7b_64x80gb() -> RunConfig:
    """The released settings on eight nodes."""
    return on_80gb(openthinker3_7b(), 64, model={"recompute": "none"})


def openthinker3_7b_blog() -> RunConfig:
    """The settings of the accompanying text: standardised advantages, clip, 1/|o|, beta 0.1, 3 epochs."""
    base = openthinker3_7b()
    return replace(
        base, name="openthinker3_7b_blog", objective=blog(), plan=replace(base.plan, epochs=3, short_groups="keep")
    )


def openthinker3_7b_blog_32x80gb() -> RunConfig:
    """The settings of the accompanying text on four nodes."""
    return on_80gb(openthinker3_7b_blog(), 32, model={"recompute": "none"})


def openthinker3_7b_blog_64x80gb() -> RunConfig:
    """The settings of the accompanying text on eight nodes."""
    return on_80gb(openthinker3_7b_blog(), 64, model={"recompute": "none"})
