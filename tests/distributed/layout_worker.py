"""What each rank does in the layout tests: one gradient in each of several layouts, written as a sharded state dict."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.objective.trajectory_surrogates import dpo, sequence_probability
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.step import MakeBatch, _largest_pack, compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.shards import fill, gradient_shards, parameter_shards, write_shards
from tests.distributed.toy import architecture, toy_run


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
    fill(student, weights)
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
    fill(student, weights)
    numbers, make_batch = packs_of(run, store, place)
    for _ in range(2):
        compute_gradients(student, numbers, make_batch, run, place)
        _, norm, _ = student.optimizer.step()
        assert norm > run.optimizer.clip_grad
    return student


def write_all(store: str, weights: str, output: str, gradients: list[dict], updates: list[dict]) -> None:
    """Each case's (name, kind, layout, plan, objective) gradients and metrics, or weights after two updates.

    They lie in output/gradients/name and output/updates/name.
    """
    trajectories = TrajectoryStore.open(store)
    for case in gradients:
        run = run_of(case)
        place = runtime.start(run.layout, seed=0)
        names, of_kind = case["name"] in NAMING, Path(weights) / case["kind"]
        student, metrics, packs = gradient(run, case["kind"], trajectories, place, of_kind, names=names)
        folder = Path(output) / "gradients" / case["name"]
        write_shards(gradient_shards(student), folder, place.rank)
        if place.is_writer:
            (folder / "metrics.json").write_text(json.dumps({**metrics, "packs_per_rank": packs}))
        student.close()
    for case in updates:
        run = run_of(case)
        place = runtime.start(run.layout, seed=0)
        student = updated(run, case["kind"], trajectories, place, Path(weights) / case["kind"])
        write_shards(parameter_shards(student), Path(output) / "updates" / case["name"], place.rank)
        student.close()
    runtime.stop()
