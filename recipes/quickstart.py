"""The quick start: a small student on synthetic word problems, minutes on two CPU cores."""

from dataclasses import replace

from megatron_offgrpo.config import (
    CheckpointConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PathsConfig,
    PlanConfig,
    RunConfig,
)
from recipes.objectives import released


def quickstart() -> RunConfig:
    """The released objective; learning rate and run length fit a student of a million parameters."""
    root = "runs/quickstart"
    return RunConfig(
        name="quickstart",
        objective=replace(released(), max_response_tokens=192),
        paths=PathsConfig(
            hf_model=f"{root}/base_hf",
            store=f"{root}/store",
            megatron=f"{root}/base_megatron",
            reference=f"{root}/reference",
            plan=f"{root}/plan",
            output=f"{root}/train",
        ),
        plan=PlanConfig(epochs=2, groups_per_step=16, max_pack_tokens=3072, pack_multiple=64),
        optimizer=OptimizerConfig(lr=3e-4),
        layout=LayoutConfig(processes=2),
        model=ModelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=20),
    )
