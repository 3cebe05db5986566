"""One run of the study: an arm at one learning rate and seed, through the project's pipeline and training loop."""

import contextlib
import inspect
import json
import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints_conversion import megatron_to_hf
from megatron_offgrpo.artifacts import fingerprint_of, write_json_atomically
from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import OffgrpoError, TrainingError
from megatron_offgrpo.objective.needs import needs_reference
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training.loop import CHECKPOINTS, train
from megatron_offgrpo.training.run_folder import read_metrics
from recipes.study import Arm, study
from tools.study.measuring import Measuring
from tools.study.problems import write_jsonl
from tools.study.records import Record, with_logprobs, without_logprobs
from tools.study.settings import StudySettings
from tools.study.stores import (
    core_groups,
    core_questions,
    make_store,
    reference_seconds,
    rollouts,
    shared_fingerprint,
    shared_paths,
    student_folder,
)

RESULT, LOG, WORK = "result.json", "log.txt", "work"


@dataclass(frozen=True)
class Job:
    """A run that is wanted."""

    arm: Arm
    lr: float
    seed: int
    sweep: bool
    """Measured on the validation problems alone, and briefly."""

    def folder(self, settings: StudySettings) -> Path:
        """Where its result lies."""
        which = "sweep" if self.sweep else f"seed{self.seed}"
        if self.arm.objective is None:
            return settings.root / "runs" / self.arm.name / which
        return settings.root / "runs" / self.arm.name / f"lr{self.lr:g}-{which}"

    def config(self, settings: StudySettings) -> RunConfig:
        """The run without rounds, or the common part of its rounds."""
        objective, base = self.arm.objective, study()
        work = self.folder(settings) / WORK
        return replace(
            base,
            name=f"study:{self.arm.name}",
            objective=base.objective if objective is None else objective(),
            paths=replace(shared_paths(settings, self.arm.store), plan=str(work / "plan"), output=str(work / "train")),
            plan=replace(base.plan, **{**self.arm.plan, "seed": self.seed}),
            optimizer=replace(base.optimizer, lr=self.lr),
        )

    def key(self, settings: StudySettings) -> str:
        """Fingerprint of all that the result depends on, the text of the objective's functions included."""
        arm, run = self.arm, self.config(settings)
        made_of = [arm.store, arm.rounds, arm.own_share, arm.objective is None, self.sweep]
        values = to_dict(run)
        functions = [run.objective.advantage, run.objective.surrogate, run.objective.kl]
        return fingerprint_of(
            shared_fingerprint(settings),
            made_of,
            {name: values[name] for name in ("objective", "plan", "optimizer")},
            [inspect.getsource(one.func if isinstance(one, partial) else one) for one in functions],
        )


def finished(job: Job, settings: StudySettings) -> dict[str, Any] | None:
    """The result of an earlier call that ran to its end, if nothing it depends on has changed."""
    path = job.folder(settings) / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["key"] == job.key(settings) else None


def do(job: Job, settings: StudySettings, measuring: Measuring) -> dict[str, Any]:
    """Runs it, or takes the finished result. What the stages say goes to the run's log.

    Raises:
        OffgrpoError: a stage refused or a signal came.
    """
    known = finished(job, settings)
    if known is not None:
        return known
    folder = job.folder(settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    clock, cpu = time.perf_counter(), time.process_time()
    with (folder / LOG).open("w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        facts = _swept(job, settings, measuring) if job.sweep else _measured(job, settings, measuring)
    result = {
        "key": job.key(settings),
        "arm": job.arm.name,
        "lr": job.lr,
        "seed": job.seed,
        **facts,
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.perf_counter() - clock,
    }
    write_json_atomically(folder / RESULT, result)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return result


def _swept(job: Job, settings: StudySettings, measuring: Measuring) -> dict[str, Any]:
    """What the choice of the learning rate needs; a rate at which training breaks has accuracy 0."""
    try:
        model, facts, _ = _trained(job, settings, measuring)
    except TrainingError as error:
        return {"failed": str(error), "accuracy": 0.0, "retention": 0.0}
    accuracy, retention = measuring.brief(model, ("validation", "validation_skills"), job.seed)
    return {**facts, "accuracy": accuracy, "retention": retention}


def _measured(job: Job, settings: StudySettings, measuring: Measuring) -> dict[str, Any]:
    model, facts, curve = _trained(job, settings, measuring)
    return {**facts, "curve": curve, **measuring.full(model, job.seed)}


def _trained(job: Job, settings: StudySettings, measuring: Measuring) -> tuple[Path, dict[str, Any], list[Any]]:
    """(model, facts about its training, accuracy on the way) of an arm."""
    if job.arm.objective is None:
        return student_folder(settings), {"train_seconds": 0.0, "tokens": 0, "steps": 0}, []
    if job.arm.rounds:
        return _in_rounds(job, settings, measuring)
    run = job.config(settings)
    steps, model = _train(run)
    before = reference_seconds(settings, job.arm.store) if needs_reference(run.objective) else 0.0
    facts = {**_facts(steps), "reference_seconds": before}
    return model, facts, [] if job.sweep else _curve(run, steps, job, measuring, before)


def _train(run: RunConfig) -> tuple[list[dict[str, float]], Path]:
    """Plan, training and export; (logged steps, Hugging Face folder)."""
    save_plan(build_plan(TrajectoryStore.open(run.paths.store), run.plan, run.objective), run.paths.plan)
    place = runtime.start(run.layout, seed=run.seed)
    try:
        if not train(run, place, force=True):
            raise OffgrpoError("stopped by a signal", where=run.name, remedy="run the same command again")
    finally:
        runtime.stop()
        # The loop leaves its handlers behind; between runs a signal ends the process.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    return read_metrics(Path(run.paths.output)), _export(run)


def _export(run: RunConfig, iteration: int | None = None) -> Path:
    """The newest checkpoint, or that of an iteration, as a Hugging Face folder."""
    output = Path(run.paths.output)
    folder = output.with_name(f"{output.name}_hf{'' if iteration is None else iteration}")
    megatron_to_hf(output / CHECKPOINTS, Path(run.paths.hf_model), folder, iteration=iteration, overwrite=True)
    return folder


def _facts(steps: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "train_seconds": sum(step["seconds"] for step in steps),
        "tokens": int(sum(step["packed_tokens"] for step in steps)),
        "steps": len(steps),
        "train_entropy": steps[-1]["entropy"],
        "grad_norm": steps[-1]["grad_norm"],
    }


def _curve(
    run: RunConfig, steps: list[dict[str, float]], job: Job, measuring: Measuring, before: float
) -> list[dict[str, float]]:
    """Accuracy at each checkpoint, with the tokens of training up to it and the seconds, `before` included."""
    every, points = run.checkpoint.every_steps, []
    for done in range(every, len(steps) + 1, every):
        model = _export(run, done)
        facts = _facts(steps[:done])
        accuracy = measuring.accuracy(model, "test", job.seed)
        points.append({"accuracy": accuracy, "seconds": before + facts["train_seconds"], "tokens": facts["tokens"]})
        shutil.rmtree(model)
    return points


def _in_rounds(job: Job, settings: StudySettings, measuring: Measuring) -> tuple[Path, dict[str, Any], list[Any]]:
    """Generate with the student as it is, label, train; an epoch's problems are shared out over its rounds."""
    common, work = job.config(settings), job.folder(settings) / WORK
    problems, rounds = core_questions(settings), job.arm.rounds
    size = len(problems) // rounds
    teacher = {group["group_id"]: group for group in without_logprobs(core_groups(settings))}
    model, weights = student_folder(settings), common.paths.megatron
    log: list[dict[str, float]] = []
    curve: list[dict[str, float]] = []
    other_seconds, generated = 0.0, 0
    for number in range(common.plan.epochs * rounds):
        folder = work / f"round{number}"
        started = time.perf_counter()
        first = number % rounds * size
        # A problem that comes again gets samples of its own.
        seed = job.seed + 10_000 * number
        groups = _round_groups(job, settings, model, folder, problems[first : first + size], teacher, seed)
        store = make_store(settings, groups, folder / "store")
        generated += int(store.response_lengths[store.on_policy].sum())
        other_seconds += time.perf_counter() - started
        paths = replace(
            common.paths,
            store=str(folder / "store"),
            megatron=weights,
            plan=str(folder / "plan"),
            output=str(folder / "train"),
        )
        steps, model = _train(replace(common, paths=paths, plan=replace(common.plan, epochs=1)))
        weights = str(Path(paths.output) / CHECKPOINTS)
        log += steps
        if not job.sweep and (number + 1) % rounds == 0:
            facts = _facts(log)
            accuracy = measuring.accuracy(model, "test", job.seed)
            seconds = facts["train_seconds"] + other_seconds
            curve.append({"accuracy": accuracy, "seconds": seconds, "tokens": facts["tokens"] + generated})
    return model, {**_facts(log), "rollout_seconds": other_seconds, "rollout_tokens": generated}, curve


def _round_groups(
    job: Job,
    settings: StudySettings,
    model: Path,
    folder: Path,
    wanted: list[Record],
    teacher: dict[str, Record],
    seed: int,
) -> list[Record]:
    """The groups of a round: the student's own solutions, and the teacher's where the arm mixes them in."""

    own = round(settings.solutions * job.arm.own_share)
    problems = folder / "problems.jsonl"
    write_jsonl(problems, wanted)
    groups = rollouts(model, problems, folder / "groups", samples=own, seed=seed, source="student", on_policy=True)
    mixed = settings.solutions - own
    return [
        {**group, "trajectories": [*group["trajectories"], *teacher[group["group_id"]]["trajectories"][:mixed]]}
        for group in with_logprobs(groups)
    ]


def describe(job: Job) -> dict[str, Any]:
    """The arm of a job as JSON-able values."""
    values = asdict(replace(job.arm, objective=None))
    return {**values, "objective": None if job.arm.objective is None else to_dict(job.arm.objective())}
