"""The training loop: the plan's steps, one after the other, from wherever the last checkpoint left off."""

import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_offgrpo.artifacts import Manifest, fingerprint_of
from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.errors import CheckpointError, TrainingError
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.objective.compose import results
from megatron_offgrpo.outcome import report_step
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.progress import progress, say
from megatron_offgrpo.training import checkpoint
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.checkpoint_folder import read_best, write_best
from megatron_offgrpo.training.inputs import Inputs, open_inputs
from megatron_offgrpo.training.run_folder import MetricsLog, open_run
from megatron_offgrpo.training.signals import StopRequest
from megatron_offgrpo.training.step import MakeBatch, StepResult, train_step
from megatron_offgrpo.training.student import build_student, learning_rate
from megatron_offgrpo.training.validation import PREFIX, is_better, validate
from megatron_offgrpo.training.watchdog import Watchdog

CHECKPOINTS = "checkpoints"


def train(run: RunConfig, place: Placement, *, force: bool = False) -> bool:
    """Trains to the end of the plan, or until a signal asks to stop.

    Resumes from the newest whole checkpoint in `paths.output`; `force` starts over.

    Returns:
        True if the plan is finished, False if a signal ended the run after a checkpoint.

    Raises:
        TrainingError: a bad step, where the run is to halt, or too many in a row.
        CheckpointError: the last checkpoint could not be written; an earlier failure is said, and training goes on.
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
    with Watchdog(output, place.rank, run.fault.timeout_seconds) as watchdog:
        return _Training(run, place, inputs, stop, watchdog).run_to_the_end()


class _Training:
    """The state of a run in this process."""

    def __init__(self, run: RunConfig, place: Placement, inputs: Inputs, stop: StopRequest, watchdog: Watchdog) -> None:
        self.run, self.place, self.inputs, self.stop, self.watchdog = run, place, inputs, stop, watchdog
        self.output = Path(run.paths.output)
        self.student = build_student(inputs.architecture, run)
        self.writer = checkpoint.CheckpointWriter(
            self.output / CHECKPOINTS, place, keep=run.checkpoint.keep, asynchronous=run.checkpoint.asynchronous
        )
        self.num_steps = inputs.plan.num_steps
        self.bad_steps = 0
        """In a row."""
        self.has_learnt = False
        """Whether there is anything to save: without an update the optimizer has no state."""
        best = read_best(self.output / CHECKPOINTS)
        self.best: float | None = None if best is None else best.get(run.validation.metric)

    def run_to_the_end(self) -> bool:
        first_step = self._load()
        log = MetricsLog(self.output, first_step) if self.place.is_writer else None
        if self.place.is_writer:
            report_step(first_step, self.num_steps)
        done = first_step
        with progress("train", self.num_steps, enabled=self.place.is_writer) as advance:
            advance(first_step)
            for step in range(first_step, self.num_steps):
                try:
                    values = self._step(step)
                except TrainingError:
                    self.writer.finish()
                    raise
                done = step + 1
                better = self._validate_after(step, values)
                if log is not None:
                    log.write(values)
                advance(1, " ".join(f"{name} {values[name]:.4g}" for name in ("loss", "grad_norm") if name in values))
                stopping = self.stop.agreed(self.place)
                self._save_after(step, better, last=stopping or done == self.num_steps)
                if stopping:
                    break
        if log is not None:
            log.close()
            if done < self.num_steps:
                where = f"after step {done} of {self.num_steps}"
                say(f"train: stopped by a signal {where}, saved; run the same command to go on")
        return done == self.num_steps

    def _load(self) -> int:
        """Loads the newest whole checkpoint of the run, or the initial weights; returns the step to go on with."""
        self.watchdog.alive("loading")
        newest = checkpoint.newest_whole(self.output / CHECKPOINTS, self.place, lambda text: say(f"train: {text}"))
        if newest is None:
            checkpoint.load_weights(self.student, self.inputs.initial)
            return 0
        rest = checkpoint.load_all(self.student, newest)
        self.has_learnt = True
        if self.place.is_writer:
            say(f"train: resumed from {newest}")
        return int(rest["iteration"])

    def _step(self, step: int) -> dict[str, float]:
        """One step of the plan and what it logs; a bad step that is skipped logs `skipped`."""
        self.watchdog.alive(f"step {step}")
        plan, started = self.inputs.plan, time.perf_counter()
        mine = self._own_packs(plan, plan.packs_of_step(step))
        try:
            lr = learning_rate(step, plan.num_steps, self.run.optimizer)
            result = train_step(self.student, mine, self._batches(plan), self.run, self.place, lr)
        except TrainingError as error:
            self.bad_steps += 1
            if self.run.fault.bad_step == "halt":
                raise
            if self.bad_steps >= self.run.fault.max_bad_steps:
                raise TrainingError(f"{self.bad_steps} bad steps in a row; the last: {error}") from None
            if self.place.is_writer:
                say(f"train: skipped step {step}: {error}")
            return {"step": step, "skipped": 1.0}
        self.bad_steps, self.has_learnt = 0, True
        return _values(result, plan, self.run, step, time.perf_counter() - started, self.place)

    def _own_packs(self, plan: Plan, packs: range) -> list[int | None]:
        """This rank's share of the packs, by the plan's numbers; None is a zero-weight pack."""
        group = self.run.layout.pp if self.run.layout.vpp > 1 else 1
        shape, recompute = shape_of(self.inputs.architecture), self.run.model.recompute == "full"
        costs = pack_flops(plan, shape, recompute=recompute, packs=packs)
        mine = assign(costs, self.place.dp, group)[self.place.dp_rank]
        return [None if place is None else packs[place] for place in mine]

    def _batches(self, plan: Plan) -> MakeBatch:
        def make_batch(pack: int | None) -> Batch:
            return build_batch(
                self.inputs.store,
                [] if pack is None else members_of(plan, pack),
                pack=pack,
                pack_multiple=self.run.plan.pack_multiple,
                reference=self.inputs.reference.lookup if self.inputs.reference else None,
                device=self.place.device,
                cp=self.place.cp,
                cp_rank=self.place.cp_rank,
            )

        return make_batch

    def _validate(self) -> dict[str, float]:
        self.watchdog.alive("validation")
        plan, started = self.inputs.validation, time.perf_counter()
        assert plan is not None
        mine = self._own_packs(plan, range(plan.num_packs))
        values = validate(self.student, mine, self._batches(plan), self.run, self.place)
        return values | {f"{PREFIX}seconds": time.perf_counter() - started}

    def _validate_after(self, step: int, values: dict[str, float]) -> bool:
        """Adds the validation metrics to `values` where they are due; True where they are the best so far."""
        every = self.run.validation.every_steps
        if self.inputs.validation is None or ((step + 1) % every and step + 1 < self.num_steps):
            return False
        values |= self._validate()
        if not is_better(values, self.best, self.run):
            return False
        self.best = values[f"{PREFIX}{self.run.validation.metric}"]
        return self.run.validation.keep_best

    def _save_after(self, step: int, better: bool, *, last: bool) -> None:
        """Saves where it is due; only the last save must succeed."""
        if not self.has_learnt:
            return
        self.watchdog.alive(f"saving after step {step}")
        every = self.run.checkpoint.every_steps
        try:
            self.writer.poll()
            if last or better or (every and (step + 1) % every == 0):
                # What is exported rather than gone on from should load everywhere.
                kept = better or step + 1 == self.num_steps
                format = "reshardable" if kept else self.run.checkpoint.format
                self.writer.save(self.student, step + 1, _checkpoint_manifest(self.inputs, step + 1), format)
            if better:
                self.writer.finish()
                if self.place.is_writer and self.best is not None:
                    write_best(self.output / CHECKPOINTS, step + 1, self.run.validation.metric, self.best)
            if last:
                self.writer.finish()
        except CheckpointError as error:
            if last:
                raise
            if self.place.is_writer:
                say(f"train: {error}; training goes on, the next save tries again")
        if self.place.is_writer and self.writer.saved is not None:
            report_step(self.writer.saved, self.num_steps)


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
