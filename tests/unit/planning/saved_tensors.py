"""Bytes that autograd keeps of the real model: the most at any time of a forward and a backward pass."""

import json
import os
import weakref
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.model.gpt import PackedGPTModel, build_model
from megatron_offgrpo.model.hf_config import architecture_of
from megatron_offgrpo.model.packing import ModelInput, PackedSegments, own_tokens
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.student import run_packs

NUM_TOKENS = 960
BOUNDS = (0, 300, 700, NUM_TOKENS)
PROMPTS = {1: (0, 200), 2: (0, 200)}
"""Segments that continue the first one's prompt, in a pack that shares it."""
NUM_ROWS = 480
NUM_PACKS = 8
"""More than any of the pipelines keeps at once."""
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 301,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


@dataclass(frozen=True)
class Case:
    """What is measured; JSON-able."""

    kind: str
    layout: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    precision: str = "fp32"
    bounds: tuple[int, ...] = BOUNDS

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(precision=self.precision, recompute=self.recompute, head_chunk_mebibytes=1)


def architecture(kind: str):
    return architecture_of({"model_type": kind, **SHAPE, **(EXPERTS if kind == "qwen3_moe" else {})})


class Held:
    """What stands in the graph for a tensor; the graph lets go of both at once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Bytes of the storages that are kept, now and at most; each storage counts once, the weights not at all."""

    def __init__(self, chunks: list[PackedGPTModel]) -> None:
        self.now = self.most = 0
        self._weights = {weight.untyped_storage().data_ptr() for chunk in chunks for weight in chunk.parameters()}
        self._holders: Counter[int] = Counter()

    def save(self, tensor: torch.Tensor) -> Held:
        """By autograd."""
        held = Held(tensor)
        self.keep(tensor, held)
        return held

    def keep(self, tensor: torch.Tensor, holder: Any) -> None:
        """As long as the holder lives."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(holder, self._count, storage.data_ptr(), storage.nbytes(), -1)

    def _count(self, pointer: int, size: int, holders: int) -> None:
        before = self._holders[pointer] > 0
        self._holders[pointer] += holders
        self.now += size * ((self._holders[pointer] > 0) - before)
        self.most = max(self.most, self.now)


def saved_bytes(case: Case, prompts: Any = MappingProxyType({})) -> int:
    """Of one pack, of which some segments continue `prompts`; of a pipeline the most of many packs."""
    layout = LayoutConfig(**case.layout)
    place = runtime.start(layout, seed=0)
    torch.manual_seed(0)
    chunks = build_model(architecture(case.kind), layout, case.model)
    kept = Kept(chunks)
    pack = _pack(case.bounds, prompts, place)
    for chunk in chunks[: None if layout.pp > 1 and not place.is_last_stage else -1]:
        # Megatron holds on to what it sends to the next stage until that has gone back.
        chunk.register_forward_hook(lambda _, __, output: kept.keep(output, output))
    with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda held: held.tensor):
        if layout.pp == 1:
            chunks[0](pack)
        else:
            batches = [SimpleNamespace(model_input=pack)] * NUM_PACKS
            run_packs(
                chunks,
                lambda: batches,
                NUM_PACKS,
                lambda batch, output_2R: (output_2R.sum(), None),
                max_pack_tokens=NUM_TOKENS,
            )
    return kept.most


def _pack(bounds: tuple[int, ...], prompts: Any, place: runtime.Placement) -> ModelInput:
    """This rank's share of it; the first places of the pack are response rows."""
    own = torch.from_numpy(own_tokens(NUM_TOKENS, place.cp, place.cp_rank))
    ids, targets = torch.randint(0, 301, (2, NUM_TOKENS))
    rows = torch.nonzero(own < NUM_ROWS).flatten()
    return ModelInput(
        ids_1T=ids[None, own],
        positions_T=torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[own],
        segments=PackedSegments.of(
            tuple(bounds), torch.device("cpu"), prompts=prompts, cp=place.cp, cp_rank=place.cp_rank
        ),
        rows_R=rows,
        targets_R=targets[: len(rows)],
    )


def write_saved_bytes(output: str, cases: list[dict]) -> None:
    """What this rank keeps in each case, as JSON under output/RANK."""
    found = [saved_bytes(Case(**case)) for case in cases]
    Path(output, os.environ["RANK"]).write_text(json.dumps(found))
    runtime.stop()
