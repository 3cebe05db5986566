"""A toy store, architectures and run for tests over several processes.

Every process of a command imports the module of its recipe: what takes long to import is imported where it is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_offgrpo.config import LayoutConfig, ModelConfig, OptimizerConfig, PathsConfig, PlanConfig, RunConfig
from megatron_offgrpo.model.hf_config import Architecture, architecture_of
from recipes.objectives import released

if TYPE_CHECKING:
    from megatron_offgrpo.data.store import TrajectoryStore

VOCAB_SIZE = 301
"""Odd, so that every layout pads it differently."""

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
}


def hf_config(kind: str) -> dict:
    """config.json of a tiny model: qwen2, qwen2_tied, qwen3 or qwen3_moe."""
    if kind == "qwen2_tied":
        return {"model_type": "qwen2", "tie_word_embeddings": True, **_SHAPE}
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        return {"model_type": "qwen3_moe", "head_dim": 16, **_SHAPE, **experts}
    return {"model_type": kind, "tie_word_embeddings": False, **_SHAPE}


def architecture(kind: str) -> Architecture:
    return architecture_of(hf_config(kind))


def write_toy_store(
    path: Path, num_groups: int = 8, seed: int = 0, num_validation: int = 0, largest_id: int = 0
) -> TrajectoryStore:
    """Groups of four random trajectories of uneven length; mixed, all-positive and all-negative ones; some mu.

    The last `num_validation` groups are set apart for validation. One token of the last group is `largest_id`.
    """
    import numpy as np

    from megatron_offgrpo.data.store import StoreRow, write_store

    rng = np.random.default_rng(seed)
    rows = []
    for group in range(num_groups):
        lengths = rng.integers(3, 24, 4)
        responses = [rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths]
        rewards = [[1.0, 0.0, 1.0, 0.0], [1.0] * 4, [0.0] * 4, [1.0, 1.0, 1.0, 0.0]][group % 4]
        known = [(-rng.random(n)).tolist() if group % 3 == 0 else None for n in lengths]
        rows.append(
            StoreRow(
                group_id=f"g{group}",
                problem="p",
                answer="1",
                prompt_ids=rng.integers(0, VOCAB_SIZE, int(rng.integers(2, 9))).tolist(),
                response_ids=responses,
                rewards=rewards,
                given_rewards=[None] * 4,
                label_statuses=["given"] * 4,
                sources=[None] * 4,
                on_policy=[False] * 4,
                truncated=[False] * 4,
                behaviour_logprobs=known,
                sample_ids=[None] * 4,
                texts=[""] * 4,
                validation=group >= num_groups - num_validation,
            )
        )
    if largest_id:
        rows[-1].response_ids[1][0] = largest_id
    return write_store(path, rows, tokenizer_fingerprint="toy", inputs={}, counts={}, config={})


def toy_run(layout: LayoutConfig | None = None, **plan: object) -> RunConfig:
    """The released objective on the toy store, fp32, two steps of four groups."""
    return RunConfig(
        name="toy",
        objective=replace(released(), max_response_tokens=24),
        plan=PlanConfig(**{"groups_per_step": 4, "max_pack_tokens": 96, "pack_multiple": 8, **plan}),
        optimizer=OptimizerConfig(lr=1e-3),
        layout=layout or LayoutConfig(),
        model=ModelConfig(precision="fp32", head_chunk_mebibytes=1),
    )


def write_hf_model(path: Path, kind: str = "qwen2", seed: int = 0) -> None:
    """A random Hugging Face model of the toy shape, without a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    raw = hf_config(kind)
    config = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in raw.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    model.save_pretrained(path)


def write_inputs(run: RunConfig, folder: Path, store: TrajectoryStore) -> None:
    """What `in_folder` names beside the store: model, checkpoint and plan."""
    from checkpoints_conversion import hf_to_megatron
    from megatron_offgrpo.planning.plan import build_plan
    from megatron_offgrpo.planning.plan_files import save_plan

    write_hf_model(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    save_plan(build_plan(store, run.plan, run.objective), run.paths.plan)


def in_folder(run: RunConfig, folder: Path) -> RunConfig:
    """The run with all its artefacts in `folder`."""
    paths = PathsConfig(
        hf_model=str(folder / "hf"),
        store=str(folder / "store"),
        megatron=str(folder / "megatron"),
        reference=str(folder / "reference"),
        plan=str(folder / "plan"),
        output=str(folder / "train"),
    )
    return replace(run, paths=paths)


def recipe() -> RunConfig:
    """The toy run for the command line; paths come from --set."""
    return toy_run()


def gsm8k_recipe() -> RunConfig:
    """Three steps on a dozen groups of real solutions."""
    return toy_run(groups_per_step=5, max_pack_tokens=8192, pack_multiple=64)
