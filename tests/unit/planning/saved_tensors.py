"""Bytes that autograd keeps between the forward and the backward pass of the real model."""

import json
import os
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.model.gpt import build_model
from megatron_offgrpo.model.hf_config import architecture_of
from megatron_offgrpo.model.packing import ModelInput, PackedSegments
from megatron_offgrpo.parallel import runtime

BOUNDS = (0, 300, 700, 960)
PROMPTS = {1: (0, 200), 2: (0, 200)}
"""Segments that continue the first one's prompt, in a pack that shares it."""
NUM_TOKENS = BOUNDS[-1]
NUM_ROWS = 480
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 301,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


def architecture(kind: str):
    return architecture_of({"model_type": kind, **SHAPE, **(EXPERTS if kind == "qwen3_moe" else {})})


def saved_bytes(kind: str, layout: LayoutConfig, model: ModelConfig, prompts: Any = MappingProxyType({})) -> int:
    """Of one pack, of which some segments continue `prompts`; each storage counts once, the weights not at all."""
    torch.manual_seed(0)
    chunk = build_model(architecture(kind), layout, model)[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])
    pack = ModelInput(
        ids_1T=torch.randint(0, 301, (1, NUM_TOKENS)),
        positions_T=positions,
        segments=PackedSegments.of(BOUNDS, torch.device("cpu"), prompts=prompts),
        rows_R=torch.arange(NUM_ROWS),
        targets_R=torch.randint(0, 301, (NUM_ROWS,)),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(pack)
    return sum(storage.nbytes() for storage in kept.values())


def saved_of_cases(cases: list[list]) -> list[float]:
    """Bytes of each case (kind, layout, recompute)."""
    found = []
    for kind, fields, granularity in cases:
        layout = LayoutConfig(**fields)
        runtime.start(layout, seed=0)
        model = ModelConfig(precision="fp32", recompute=granularity, head_chunk_mebibytes=1)
        found.append(saved_bytes(kind, layout, model))
    return found


def write_saved_bytes(output: str, cases: list[list]) -> None:
    """What this rank keeps in each case, as JSON under output/RANK."""
    found = saved_of_cases(cases)
    Path(output, os.environ["RANK"]).write_text(json.dumps(found))
    runtime.stop()
