"""What each rank does in the test of interleaved stages whose messages go in batches, Megatron's default."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model import gpt
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.step import compute_gradients
from megatron_offgrpo.training.student import build_student
from tests.distributed.layout_worker import packs_of, run_of
from tests.distributed.toy import architecture


def loss(store: TrajectoryStore, place: runtime.Placement, case: dict[str, Any], *, batched: bool) -> float:
    """The loss of step 0 with weights that depend on the rank alone."""
    run, real = run_of(case), gpt.transformer_config

    def config_of(*arguments: Any) -> Any:
        config = real(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = not batched, batched
        return config

    torch.manual_seed(place.rank)
    with mock.patch.object(gpt, "transformer_config", config_of):
        student = build_student(architecture("qwen2"), run, distributed_optimizer=False)
    numbers, make_batch = packs_of(run, store, place)
    stacked, _ = compute_gradients(student, numbers, make_batch, run, place)
    student.close()
    return float(results(to_metrics(stacked))["loss"])


def write_losses(store: str, output: str) -> None:
    """Each rank's losses, with overlapped messages and with batches of them; where a rank hangs, nothing."""
    case = {"layout": {"pp": 2, "vpp": 2}, "plan": {"max_pack_tokens": 96, "pack_multiple": 96}}
    place = runtime.start(run_of(case).layout, seed=0)
    trajectories = TrajectoryStore.open(store)
    found = [loss(trajectories, place, case, batched=batched) for batched in (False, True)]
    (Path(output) / f"{place.rank}.json").write_text(json.dumps(found))
    runtime.stop()
