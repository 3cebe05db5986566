"""Where a recipe's artefacts are."""

from megatron_offgrpo.config import PathsConfig


def run_paths(name: str, hf_model: str) -> PathsConfig:
    """All artefacts of a run under runs/NAME, the student before training in models/HF_MODEL."""
    root = f"runs/{name}"
    return PathsConfig(
        hf_model=f"models/{hf_model}",
        store=f"{root}/store",
        megatron=f"{root}/base_megatron",
        reference=f"{root}/reference",
        plan=f"{root}/plan",
        output=f"{root}/train",
    )
