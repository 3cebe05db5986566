"""The training loop: the plan's steps, one after the other, from wherever the last checkpoint left off."""

import gc
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_offgrpo.artifacts import Manifest, fingerprint_of
from megatron_offgrpo.config import RunConfig, TrackingConfig
from megatron_offgrpo.errors import CheckpointError, TrainingError
from megatron_offgrpo.model.layers import require_layer
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.objective.compose import results
from megatron_offgrpo.outcome import report_step
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.progress import progress, say
from megatron_offgrpo.training import checkpoint
from megatron_offgrpo.training.checkpoint_folder import require_folder
from megatron_offgrpo.training.checkpoint_write import on_writer
from megatron_offgrpo.training.inputs import Inputs, leave_out, open_inputs
from megatron_offgrpo.training.measures import step_values
from megatron_offgrpo.training.packs import batches_of, own_packs
from megatron_offgrpo.training.quarantine import BadStep, Quarantine, Rollback, read_quarantine, write_quarantine
from megatron_offgrpo.training.run_folder import MetricsLog, clear, open_run
from megatron_offgrpo.training.signals import StopRequest
from megatron_offgrpo.training.step import BadStepError, train_step
from megatron_offgrpo.training.student import build_student, learning_rate
from megatron_offgrpo.training.tracking import Tracking, require_tracking
from megatron_offgrpo.training.validation import PREFIX, is_better, validate
from megatron_offgrpo.training.watchdog import Watchdog

CHECKPOINTS = "checkpoints"


def train(run: RunConfig, place: Placement, *, force: bool = False) -> bool:
    """Trains to the end of the plan, or until a signal asks to stop.

    Resumes from the newest whole checkpoint in `paths.output`; `force` starts over.

    Returns:
        True if the plan is finished, False if a signal ended the run after a checkpoint.

    Raises:
        TrainingError: a bad step, where the run is to halt, too many rollbacks, or not one step that was good.
        CheckpointError: the last checkpoint could not be written (an earlier failure is said, and training goes on), or
            their folder has gone when the run is to go back.
    """
    stop = StopRequest()
    require_tracking(run.tracking)
    require_layer(run.model)
    inputs = open_inputs(run)
    output = Path(run.paths.output)
    if place.is_writer:
        if force:
            clear(output)
        open_run(output, inputs.manifest, start_over=run.command("train", "--force"))
    dist.barrier()
    _seed(run.seed)
    quarantine = read_quarantine(output, inputs.store)
    with (
        Tracking(output, run.tracking if place.is_writer else TrackingConfig(), inputs.manifest) as tracking,
        Watchdog(output, place.rank, run.fault.timeout_seconds) as watchdog,
    ):
        left = leave_out(inputs, quarantine.trajectories, run)
        while True:
            training = _Training(run, place, left, quarantine, stop, watchdog, tracking)
            try:
                return training.run_to_the_end()
            except Rollback as rollback:
                quarantine = rollback.quarantine
            finally:
                training.student.close()
                del training
            # From here on as in a new process; a kill leaves either the file of before or the new one.
            watchdog.alive("rolling back")
            on_writer(partial(require_folder, output / CHECKPOINTS), place)
            left = leave_out(inputs, quarantine.trajectories, run)
            if place.is_writer:
                write_quarantine(output, quarantine, inputs.store)
            gc.collect()
            torch.cuda.empty_cache()


class _Training:
    """The state of a run in this process, from a start or a rollback on."""

    def __init__(
        self,
        run: RunConfig,
        place: Placement,
        inputs: Inputs,
        quarantine: Quarantine,
        stop: StopRequest,
        watchdog: Watchdog,
        tracking: Tracking,
    ) -> None:
        self.run, self.place, self.inputs, self.quarantine = run, place, inputs, quarantine
        self.stop, self.watchdog, self.tracking = stop, watchdog, tracking
        self.output = Path(run.paths.output)
        self.student = build_student(inputs.architecture, run)
        self.writer = checkpoint.CheckpointWriter(
            self.output / CHECKPOINTS, place, keep=run.checkpoint.keep, asynchronous=run.checkpoint.asynchronous
        )
        self.num_steps = inputs.manifest.counts["steps"]
        self.bad_steps: list[BadStep] = []
        """In a row; the weights are those before the first of them."""
        self.has_learnt = False
        """Whether there is anything to save: without an update the optimizer has no state."""
        self.save_seconds = 0.0
        """Since the last line of the log."""
        self.best: float | None = None
        """Value of the validation metric at the best checkpoint, once this is complete."""

    def run_to_the_end(self) -> bool:
        first_step = self._load()
        if self.place.is_writer:
            report_step(first_step, self.num_steps)
        done = first_step
        with (
            MetricsLog(self.output, first_step, self.tracking, enabled=self.place.is_writer) as log,
            progress("train", self.num_steps, enabled=self.place.is_writer) as advance,
        ):
            advance(first_step)
            for step in range(first_step, self.num_steps):
                try:
                    values = self._step(step)
                except (TrainingError, Rollback):
                    # Before the run ends or goes back.
                    self._settle(wait=True)
                    raise
                done = step + 1
                best = self._validate_after(step, values)
                log.write({**values, "save_seconds": self.save_seconds})
                self.save_seconds = 0.0
                advance(1, " ".join(f"{name} {values[name]:.4g}" for name in ("loss", "grad_norm") if name in values))
                stopping = self.stop.agreed(self.place)
                self._save_after(step, best, last=stopping or done == self.num_steps)
                if stopping:
                    break
        if done == self.num_steps and not self.has_learnt:
            last = f", the last: {self.bad_steps[-1].reason}" if self.bad_steps else ""
            raise TrainingError(
                "no step has changed the weights: there is nothing to save",
                where=str(self.output),
                got=f"{done} steps skipped or empty{last}",
                remedy="look at the store, fault.max_grad_norm and the learning rate, and start over with --force",
            )
        if self.place.is_writer and done < self.num_steps:
            where = f"after step {done} of {self.num_steps}"
            saved = "saved" if self.has_learnt else "with nothing to save yet"
            say(f"train: stopped by a signal {where}, {saved}; run the same command to go on")
        return done == self.num_steps

    def _load(self) -> int:
        """Loads the newest whole checkpoint of the run, or the initial weights; returns the step to go on with."""
        self.watchdog.alive("loading")
        newest = checkpoint.newest_whole(self.output / CHECKPOINTS, self.place, lambda text: say(f"train: {text}"))
        iteration = 0
        if newest is None:
            checkpoint.load_weights(self.student, self.inputs.initial)
        else:
            iteration = int(checkpoint.load_all(self.student, newest, self.run.command("train"))["iteration"])
            self.has_learnt = True
            if self.place.is_writer:
                say(f"train: resumed from {newest}")
        best = checkpoint.best_so_far(self.output / CHECKPOINTS, iteration, self.place)
        self.best = None if best is None else best.get(self.run.validation.metric)
        return iteration

    def _step(self, step: int) -> dict[str, float]:
        """One step of the plan and what it logs; a bad step that is skipped logs `skipped`."""
        self.watchdog.alive(f"step {step}")
        plan, started = self.inputs.plan, time.perf_counter()
        packs = plan.packs_of_step(step)
        if not packs:
            # All of it is in quarantine.
            return {"step": step, "trajectories": 0}
        mine = own_packs(plan, packs, self.inputs, self.run, self.place)
        make_batch = batches_of(plan, self.inputs, self.run, self.place)
        self.student.balance_over(int(plan.response_tokens[plan.step == step].sum()))
        lr = learning_rate(step, self.num_steps, self.run.optimizer)
        try:
            result = train_step(self.student, mine, make_batch, self.run, self.place, lr)
        except BadStepError as error:
            return self._bad_step(step, error)
        seconds = time.perf_counter() - started
        self.bad_steps, self.has_learnt = [], True
        shape = shape_of(self.inputs.architecture)
        measured = step_values(plan, step, shape, result, seconds, self.place, self.run.model.weight_precision)
        return {"step": step, **results(result.metrics), "grad_norm": result.grad_norm, "lr": lr, **measured}

    def _bad_step(self, step: int, error: BadStepError) -> dict[str, float]:
        """Halts, skips, or goes back to the newest checkpoint after too many in a row."""
        fault = self.run.fault
        if fault.bad_step == "halt":
            raise error
        self.bad_steps.append(BadStep(step, error.pack, error.trajectories, str(error)))
        if self.place.is_writer:
            say(f"train: skipped step {step}: {error}")
        if len(self.bad_steps) < fault.max_bad_steps:
            return {"step": step, "skipped": 1.0}
        in_a_row = f"{len(self.bad_steps)} bad steps in a row"
        before = len(self.quarantine.rollbacks)
        if before >= fault.max_rollbacks:
            raise TrainingError(
                f"{in_a_row} after {before} rollbacks (fault.max_rollbacks); the last: {error}"
            ) from None
        if self.place.is_writer:
            names = sorted({index for bad in self.bad_steps for index in bad.trajectories})
            say(f"train: {in_a_row}, rolling back; in quarantine from now on: trajectories {names}")
        raise Rollback(self.quarantine.after(self.bad_steps))

    def _validate(self) -> dict[str, float]:
        self.watchdog.alive("validation")
        plan, started = self.inputs.validation, time.perf_counter()
        assert plan is not None
        mine = own_packs(plan, range(plan.num_packs), self.inputs, self.run, self.place)
        values = validate(self.student, mine, batches_of(plan, self.inputs, self.run, self.place), self.run, self.place)
        return values | {f"{PREFIX}seconds": time.perf_counter() - started}

    def _validate_after(self, step: int, values: dict[str, float]) -> float | None:
        """Adds the validation metrics to `values` where they are due; returns a value that makes a best checkpoint."""
        every, done = self.run.validation.every_steps, step + 1
        if self.inputs.validation is None or (done < self.num_steps and (done % every or self.bad_steps)):
            return None
        values |= self._validate()
        if not is_better(values, self.best, self.run) or not self.run.validation.keep_best:
            return None
        return values[f"{PREFIX}{self.run.validation.metric}"]

    def _settle(self, *, wait: bool) -> None:
        """Completes the save that was begun last; if it failed, that is said: what comes next does not fail with it."""
        try:
            if wait:
                self.writer.finish()
            else:
                self.writer.poll()
        except CheckpointError as error:
            if self.place.is_writer:
                say(f"train: an earlier save failed: {error}")

    def _save_after(self, step: int, best: float | None, *, last: bool) -> None:
        """Saves where it is due; only the last save must succeed.

        After bad steps the weights are those before the first of them, and are saved as such, and only where the run
        stops: a checkpoint of a later step would hide them from the run that goes on from it.
        """
        every, done = self.run.checkpoint.every_steps, step + 1
        due = last or best is not None or (every > 0 and done % every == 0)
        if not self.has_learnt or (self.bad_steps and not last):
            return
        if self.bad_steps and done < self.num_steps:
            done = self.bad_steps[0].step
        self.watchdog.alive(f"saving after step {step}")
        started = time.perf_counter()
        self._settle(wait=due)
        try:
            if due:
                # What is exported rather than gone on from should load everywhere.
                format = "reshardable" if best is not None or done == self.num_steps else self.run.checkpoint.format
                manifest = _checkpoint_manifest(self.inputs, self.quarantine, done)
                named = None if best is None else (self.run.validation.metric, best)
                self.writer.save(self.student, done, manifest, format, named)
            if last or best is not None:
                self.writer.finish()
            if best is not None:
                self.best = best
        except CheckpointError as error:
            if last:
                raise
            if self.place.is_writer:
                say(f"train: {error}; training goes on, the next save tries again")
        self.save_seconds += time.perf_counter() - started
        if self.place.is_writer and self.writer.saved is not None:
            report_step(self.writer.saved, self.num_steps)


def _checkpoint_manifest(inputs: Inputs, quarantine: Quarantine, iteration: int) -> Manifest:
    run = inputs.manifest
    left_out = {"quarantine": quarantine.fingerprint} if quarantine.rollbacks else {}
    return Manifest(
        kind="checkpoint",
        # The weights of a step are a function of the run, the step and what was left out.
        fingerprint=fingerprint_of(run.fingerprint, iteration, *left_out.values()),
        inputs={**run.inputs, "run": run.fingerprint, **left_out},
        config=run.config,
    )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
