"""What each rank does in the layout tests: one gradient in each of several layouts, written as a sharded state dict."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.objective.trajectory_surrogates import dpo, sequence_probability
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.checkpoint import load_weights
from megatron_offgrpo.training.checkpoint_state import sharding
from megatron_offgrpo.training.step import MakeBatch, _largest_pack, compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.toy import architecture, toy_run


def gradient_state(student: Student) -> dict:
    """The student's sharded state dict with gradients in the place of weights, so that any layout can load it."""
    state = {}
    for number, (model, wrapped) in enumerate(zip(student.models, student.wrapped, strict=True)):
        gradients = {id(parameter): parameter.main_grad for parameter in wrapped.parameters()}
        for key, value in model.sharded_state_dict(metadata=sharding()).items():
            if isinstance(value, ShardedBase) and isinstance(value.data, torch.Tensor) and id(value.data) in gradients:
                value.data = gradients[id(value.data)]
                state[f"{number}.{key}"] = value
    return state


def fake_reference(trajectory: int, length: int) -> np.ndarray:
    """Some fixed log-probs near those of a random model."""
    return (-5.7 + 0.3 * np.sin(trajectory + np.arange(length))).astype(np.float32)


# Objectives by the name that a case gives; units above the token need sums over context-parallel ranks.
OBJECTIVES: dict[str, dict] = {
    "released": {},
    "sequence_probability": {"surrogate": sequence_probability, "weight": "sequence"},
    "dpo": {"surrogate": dpo, "weight": "group", "beta": 0.0},
}


NAMING = ("qwen2-shared", "qwen2-pp2", "qwen2-vpp2", "qwen2-dp2")
"""Cases with the same packs, in which the one with the largest gradient is looked for."""


def run_of(case: dict) -> RunConfig:
    """The toy run of a case (layout, plan, objective, model)."""
    run = toy_run(LayoutConfig(**case.get("layout", {})), **case.get("plan", {}))
    run = with_values(run, model=case.get("model", {}))
    return replace(run, objective=replace(run.objective, **OBJECTIVES[case.get("objective", "released")]))


def gradient(
    run: RunConfig, kind: str, store: TrajectoryStore, place: runtime.Placement, weights: Path, *, names: bool = False
) -> tuple:
    """Student and metrics after the backward pass of step 0; `names` adds the pack with the largest gradient."""
    student = build_student(architecture(kind), run, distributed_optimizer=False)
    load_weights(student, weights)
    numbers, make_batch = packs_of(run, store, place)
    largest = {"largest_pack": _largest_pack(student, numbers, make_batch, run, place)} if names else {}
    stacked, bad = compute_gradients(student, numbers, make_batch, run, place)
    assert bad is None
    return student, {**results(to_metrics(stacked)), **largest}, len(numbers)


def packs_of(run: RunConfig, store: TrajectoryStore, place: runtime.Placement) -> tuple[list[int | None], MakeBatch]:
    """This rank's packs of step 0, and what makes their batches."""
    plan = build_plan(store, run.plan, run.objective)
    packs = list(plan.packs_of_step(0))
    mine = assign([1.0] * len(packs), place.dp, run.layout.pp if run.layout.vpp > 1 else 1)[place.dp_rank]

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            store,
            [] if pack is None else members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=lambda t: fake_reference(t, int(store.response_lengths[t])),
            device=place.device,
            cp=place.cp,
            cp_rank=place.cp_rank,
        )

    return [None if n is None else packs[n] for n in mine], make_batch


def updated(run: RunConfig, kind: str, store: TrajectoryStore, place: runtime.Placement, weights: Path) -> Student:
    """The student after two updates on step 0; the optimizer's state is spread over its ranks."""
    # With a large epsilon an update is smooth in the gradient, else the sign of rounding noise moves a weight.
    run = with_values(run, optimizer={"lr": 1e-2, "eps": 1e-5, "clip_grad": 1e-3})
    student = build_student(architecture(kind), run, distributed_optimizer=place.world_size > 1)
    load_weights(student, weights)
    numbers, make_batch = packs_of(run, store, place)
    for _ in range(2):
        compute_gradients(student, numbers, make_batch, run, place)
        _, norm, _ = student.optimizer.step()
        assert norm > run.optimizer.clip_grad
    return student


def weight_state(student: Student) -> dict:
    """The weights, so that any layout can load them."""
    chunks = enumerate(student.models)
    return {f"{n}.{key}": v for n, model in chunks for key, v in model.sharded_state_dict(metadata=sharding()).items()}


def write_weights(store: str, weights: str, output: str, cases: list[dict]) -> None:
    """Runs each case as `write_gradients` does, with two updates, and writes its weights under output/name."""
    for case in cases:
        run = run_of(case)
        place = runtime.start(run.layout, seed=0)
        student = updated(run, case["kind"], TrajectoryStore.open(store), place, Path(weights) / case["kind"])
        folder = Path(output) / case["name"]
        if place.is_writer:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(weight_state(student), str(folder))
        student.close()
    runtime.stop()


def write_gradients(store: str, weights: str, output: str, cases: list[dict]) -> None:
    """Runs each case (name, kind, layout, plan, objective) and writes its gradients and metrics under output/name."""
    for case in cases:
        run = run_of(case)
        place = runtime.start(run.layout, seed=0)
        student, metrics, num_packs = gradient(
            run,
            case["kind"],
            TrajectoryStore.open(store),
            place,
            Path(weights) / case["kind"],
            names=case["name"] in NAMING,
        )
        folder = Path(output) / case["name"]
        if place.is_writer:
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({**metrics, "packs_per_rank": num_packs}))
        torch.distributed.barrier()
        dist_checkpointing.save(gradient_state(student), str(folder))
        student.close()
    runtime.stop()
