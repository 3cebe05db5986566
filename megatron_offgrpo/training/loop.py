"""The training loop: the plan's steps, one after the other, from wherever the last checkpoint left off."""

import random
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_offgrpo.artifacts import Manifest, fingerprint_of, require_input
from megatron_offgrpo.config import RunConfig, to_dict
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model.hf_config import Architecture, read_architecture
from megatron_offgrpo.objective.compose import needs_reference, results
from megatron_offgrpo.outcome import report_step
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.plan import Plan, load_plan, require_settings
from megatron_offgrpo.progress import progress, say
from megatron_offgrpo.training import checkpoint
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.reference_cache import ReferenceCache, inputs_of, open_reference
from megatron_offgrpo.training.run_folder import MetricsLog, open_run
from megatron_offgrpo.training.signals import StopRequest
from megatron_offgrpo.training.step import StepResult, train_step
from megatron_offgrpo.training.student import Student, build_student, learning_rate

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Inputs:
    """The artefacts of a run, checked against each other."""

    store: TrajectoryStore
    plan: Plan
    reference: ReferenceCache | None
    """None where the objective does not read it."""
    initial: Path
    """Checkpoint the run starts from."""
    manifest: Manifest
    """Of the run."""
    architecture: Architecture


def open_inputs(run: RunConfig) -> Inputs:
    """Opens store, plan, reference and initial checkpoint, and refuses what does not belong together."""
    store = TrajectoryStore.open(run.paths.store)
    plan = load_plan(run.paths.plan)
    remedy = f"offgrpo plan {run.name}"
    require_input(
        plan.manifest,
        "store",
        store.manifest.fingerprint,
        where=Path(run.paths.plan),
        other=run.paths.store,
        remedy=remedy,
    )
    require_settings(plan, run.plan, run.objective, where=run.paths.plan)
    initial, weights = checkpoint.require_latest(run.paths.megatron)
    reference = None
    if needs_reference(run.objective):
        wanted = inputs_of(store, weights.fingerprint, run.model.precision)
        reference = open_reference(run.paths.reference, store, wanted, recipe=run.name)
    fingerprints = {
        "store": store.manifest.fingerprint,
        "plan": plan.manifest.fingerprint,
        "weights": weights.fingerprint,
        "tokenizer": store.manifest.inputs["tokenizer"],
    }
    if reference is not None:
        fingerprints["reference"] = reference.manifest.fingerprint
    config = to_dict(run)
    manifest = Manifest(
        kind="run",
        fingerprint=fingerprint_of(fingerprints, config),
        inputs=fingerprints,
        counts={"steps": plan.num_steps},
        config=config,
    )
    return Inputs(store, plan, reference, initial, manifest, read_architecture(run.paths.hf_model))


def train(run: RunConfig, place: Placement, *, force: bool = False) -> bool:
    """Trains to the end of the plan, or until a signal asks to stop.

    Resumes from the newest checkpoint in `paths.output`; `force` starts over.

    Returns:
        True if the plan is finished, False if a signal ended the run after a checkpoint.
    """
    stop = StopRequest()
    inputs = open_inputs(run)
    output = Path(run.paths.output)
    if place.is_writer:
        if force:
            shutil.rmtree(output, ignore_errors=True)
        open_run(output, inputs.manifest, run.name)
    dist.barrier()
    _seed(run.seed)
    student = build_student(inputs.architecture, run)
    first_step = _load(student, inputs, output / CHECKPOINTS, place)
    log = MetricsLog(output, first_step) if place.is_writer else None
    num_steps = inputs.plan.num_steps
    saved = first_step
    if place.is_writer:
        report_step(saved, num_steps)
    with progress("train", num_steps, enabled=place.is_writer) as advance:
        advance(first_step)
        for step in range(first_step, num_steps):
            started = time.perf_counter()
            result = _step(student, inputs, run, place, step)
            values = _values(result, inputs.plan, run, step, time.perf_counter() - started, place)
            if log is not None:
                log.write(values)
            advance(1, f"loss {values['loss']:.4g} grad norm {values['grad_norm']:.3g}")
            stopping = stop.agreed(place)
            every = run.checkpoint.every_steps
            if stopping or step + 1 == num_steps or (every and (step + 1) % every == 0):
                checkpoint.save(
                    student, output / CHECKPOINTS, step + 1, _checkpoint_manifest(inputs, step + 1), run.checkpoint.keep
                )
                saved = step + 1
                if place.is_writer:
                    report_step(saved, num_steps)
            if stopping and saved < num_steps:
                break
    if log is not None:
        log.close()
        if saved < num_steps:
            say(f"train: stopped by a signal after step {saved} of {num_steps}, saved; run the same command to go on")
    return saved == num_steps


def _step(student: Student, inputs: Inputs, run: RunConfig, place: Placement, step: int) -> StepResult:
    plan = inputs.plan
    packs = list(plan.packs_of_step(step))
    group = run.layout.pp if run.layout.vpp > 1 else 1
    mine = assign([float(plan.pack_padded[pack]) for pack in packs], place.dp, group)[place.dp_rank]

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            inputs.store,
            [] if pack is None else members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=inputs.reference.lookup if inputs.reference else None,
            device=place.device,
            cp=place.cp,
            cp_rank=place.cp_rank,
        )

    numbers = [None if place_in_step is None else packs[place_in_step] for place_in_step in mine]
    return train_step(student, numbers, make_batch, run, place, learning_rate(step, plan.num_steps, run.optimizer))


def _load(student: Student, inputs: Inputs, folder: Path, place: Placement) -> int:
    """Loads the newest checkpoint of the run, or the initial weights; returns the step to go on with."""
    newest = checkpoint.latest(folder)
    if newest is None:
        checkpoint.load_weights(student, inputs.initial)
        return 0
    checkpoint.verified_manifest(newest, "offgrpo train with --force starts over")
    rest = checkpoint.load_all(student, newest)
    if place.is_writer:
        say(f"train: resumed from {newest}")
    return int(rest["iteration"])


def _checkpoint_manifest(inputs: Inputs, iteration: int) -> Manifest:
    return Manifest(
        kind="checkpoint",
        # The weights of a step are a function of the run and the step.
        fingerprint=fingerprint_of(inputs.manifest.fingerprint, iteration),
        inputs={**inputs.manifest.inputs, "run": inputs.manifest.fingerprint},
        config=inputs.manifest.config,
    )


def _values(
    result: StepResult, plan: Plan, run: RunConfig, step: int, seconds: float, place: Placement
) -> dict[str, float]:
    """What a step logs; docs/objective.md has the formulas."""
    packs = plan.packs_of_step(step)
    tokens = int(plan.pack_tokens[packs.start : packs.stop].sum())
    trajectories = plan.num_trajectories_of_step(step)
    return {
        "step": step,
        **results(result.metrics),
        "grad_norm": result.grad_norm,
        "lr": learning_rate(step, plan.num_steps, run.optimizer),
        "trajectories": trajectories,
        "packs": len(packs),
        "padded_tokens": int(plan.pack_padded[packs.start : packs.stop].sum()),
        "packed_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "trajectories_per_second": trajectories / seconds,
        "peak_memory_bytes": _peak_memory_bytes(place),
    }


def _peak_memory_bytes(place: Placement) -> float:
    """Largest over ranks: allocated GPU memory, or the process's resident set on a CPU."""
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    value = torch.tensor(peak, dtype=torch.float64, device=place.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
