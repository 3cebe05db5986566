"""A chain as a NeMo-Run experiment; the only module that imports NeMo-Run."""

import glob
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo.errors import ConfigError, OffgrpoError
from megatron_offgrpo.launch.chain import Step
from megatron_offgrpo.launch.settings import (
    LaunchSettings,
    expanded,
    local_script,
    mounts_of,
    signal_lead,
    slurm_script,
    slurm_setup,
)
from megatron_offgrpo.progress import say

try:
    import nemo_run
    from invoke.exceptions import UnexpectedExit
except ImportError as cause:
    raise ConfigError(
        f"NeMo-Run is not installed here ({cause})",
        where="offgrpo launch",
        remedy="make install-launch, then .venv-launch/bin/offgrpo launch",
    ) from None

State = Literal["waiting", "running", "succeeded", "failed", "cancelled", "unknown"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
_STATES: dict[str, State] = {
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "RUNNING": "running",
    "PENDING": "waiting",
    "SUBMITTED": "waiting",
}
UNKNOWN_POLLS = 30
"""Questions in a row that Slurm's accounting may leave unanswered before a task counts as failed."""
LOG_LINES = 15


@dataclass(frozen=True)
class TaskState:
    """One task of an experiment."""

    name: str
    state: State
    job: str = ""
    """Slurm's job id."""


@contextmanager
def opened(steps: Sequence[Step], settings: LaunchSettings, experiment_id: str) -> Iterator[Any]:
    """The experiment, not yet started; local tasks have ended on leaving. `experiment_id` is TITLE_NUMBER."""
    if settings.executor == "slurm":
        _refuse_special_name(settings)
    title = experiment_id.rpartition("_")[0]
    experiment = nemo_run.Experiment(
        title, id=experiment_id, log_level="WARN", enable_goodbye_message=False, skip_status_at_exit=True,
        clean_mode=True,
    )  # fmt: skip
    logs = f"{settings.workdir}/logs/{experiment_id}"
    with experiment:
        for step, name, arguments, before in expanded(list(steps)):
            if settings.executor == "slurm":
                script, executor = slurm_script(settings, arguments), _slurm(settings, step, logs)
            else:
                script = local_script(settings, step, name, arguments, before, logs)
                executor = nemo_run.LocalExecutor(packager=nemo_run.Packager())
            experiment.add(nemo_run.Script(inline=script), executor=executor, name=name, dependencies=list(before))
        yield experiment


def _refuse_special_name(settings: LaunchSettings) -> None:
    """NeMo-Run replaces `/nemo_run` by a job's folder wherever it stands in a script."""
    for name, path in (
        ("NEMORUN_HOME", nemo_run.config.get_nemorun_home()),
        ("--workdir", settings.workdir),
        ("--home", settings.home),
        ("--python", settings.python),
    ):
        if "/nemo_run" in path:
            raise ConfigError("NeMo-Run gives /nemo_run a meaning of its own", where=name, got=path, remedy="rename it")


def _slurm(settings: LaunchSettings, step: Step, logs: str) -> Any:
    wants_gpu = step.on_ranks or step.script == "eval"
    ranks = max(1, settings.gpus_per_node) if step.on_ranks else 1
    gpus = settings.gpus_per_node if step.on_ranks else min(1, settings.gpus_per_node)
    if settings.ssh:
        user, host, port = settings.login_node()
        tunnel = nemo_run.SSHTunnel(
            host=host, user=user, port=port, job_dir=settings.job_dir, identity=settings.identity
        )
    else:
        tunnel = nemo_run.LocalTunnel(job_dir="")
    return nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        nodes=settings.nodes if step.on_ranks else 1,
        ntasks_per_node=ranks,
        gpus_per_node=gpus if wants_gpu and gpus else None,
        time=settings.time,
        signal=f"B:USR1@{signal_lead(settings.time)}",
        container_image=settings.container_image,
        container_mounts=mounts_of(settings, logs) if settings.container_image else [],
        env_vars={name: shlex.quote(value) for name, value in settings.environment.items()},
        additional_parameters={"requeue": True, "kill_on_invalid_dep": "yes", **settings.sbatch},
        setup_lines=slurm_setup(settings, logs),
        job_name_prefix="offgrpo.",
        tunnel=tunnel,
        packager=nemo_run.Packager(),
        poll_estimated_start_time=False,
    )


def scripts(experiment: Any) -> list[tuple[str, str]]:
    """(file name, content) of all that would run; nothing is started."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    files = []
    for job in experiment.jobs:
        files += [folder / f"{job.id}_sbatch.sh", folder / job.id / "scripts" / f"{job.id}.sh"]
    found = [(str(path.relative_to(folder)), path.read_text(encoding="utf-8")) for path in files if path.exists()]
    shutil.rmtree(folder)
    return found


def start(experiment: Any, settings: LaunchSettings, *, detach: bool, poll_seconds: float) -> None:
    """Starts the tasks; on Slurm, waits for their end unless `detach`.

    Waiting is ours: NeMo-Run neither raises for a failed job nor says which of them was the first.
    """
    is_slurm = settings.executor == "slurm"
    if detach and not is_slurm:
        raise ConfigError("only Slurm goes on without the launcher", where="--detach", expected="--executor slurm")
    say(f"launch: experiment {experiment._id}")
    try:
        experiment.run(detach=is_slurm)
    except UnexpectedExit as refused:
        said = " ".join(refused.result.stderr.split())
        jobs = [job.handle.rpartition("/")[2] for job in experiment.jobs if job.launched]
        if jobs:
            say(f"launch: {said}; cancelling {', '.join(jobs)}")
        cancel(experiment, jobs)
        raise OffgrpoError(
            "a command of Slurm failed; what was submitted has been cancelled",
            where=refused.result.command,
            got=said,
            remedy="see --account, --partition, --time, --sbatch",
        ) from None
    if is_slurm and not detach:
        follow(experiment, poll_seconds)


def cancel(experiment: Any, jobs: Sequence[str]) -> None:
    """Cancels jobs by Slurm's ids.

    NeMo-Run does nothing for a job of which the accounting has not heard yet, and swallows what scancel says.

    Raises:
        OffgrpoError: scancel refused.
    """
    if not jobs:
        return
    tunnel = experiment.jobs[0].executor.tunnel
    tunnel.connect()
    done = tunnel.run(f"scancel --quiet {' '.join(jobs)}", hide=True, warn=True)
    if done.exited:
        raise OffgrpoError(
            "the jobs may still be there",
            where="scancel",
            got=" ".join(done.stderr.split()),
            remedy=f"scancel {' '.join(jobs)}",
        )


def follow(experiment: Any, poll_seconds: float) -> None:
    """Waits until every task has ended, and says what changes."""
    before: dict[str, State] = {}
    unknown: dict[str, int] = {}
    while True:
        found = states(experiment)
        for task in found:
            if before.get(task.name) != task.state:
                say(f"launch: {task.name:<20}{task.job:<12}{task.state}")
            before[task.name] = task.state
            unknown[task.name] = unknown.get(task.name, 0) + 1 if task.state == "unknown" else 0
        if all(task.state in ENDED or unknown[task.name] >= UNKNOWN_POLLS for task in found):
            return
        time.sleep(poll_seconds)


def states(experiment: Any, workdir: str = "") -> list[TaskState]:
    """What Slurm's accounting says of each task, or what a local one left behind in `workdir`."""
    if any(isinstance(job.executor, nemo_run.LocalExecutor) for job in experiment.jobs):
        return _local_states(experiment, workdir)
    found = experiment.status(return_dict=True)
    return [
        TaskState(job.id, _STATES.get(found[job.id]["status"].name, "unknown"), found[job.id]["job_id"])
        for job in experiment.jobs
    ]


def _local_states(experiment: Any, workdir: str) -> list[TaskState]:
    """A mark of success, or only a log, or neither."""
    logs = Path(workdir) / "logs" / experiment._id
    found = []
    for job in experiment.jobs:
        state: State = "cancelled"
        if (logs / f"{job.id}.done").exists():
            state = "succeeded"
        elif (logs / f"{job.id}.log").exists():
            state = "failed"
        found.append(TaskState(job.id, state))
    return found


def last_lines(experiment: Any, task: TaskState, workdir: str) -> list[str]:
    """The end of a task's log."""
    job = next((job for job in experiment.jobs if job.id == task.name), None)
    if job is None:
        known = ", ".join(job.id for job in experiment.jobs)
        raise ConfigError("no such task", where=experiment._id, expected=f"one of {known}", got=task.name)
    if isinstance(job.executor, nemo_run.LocalExecutor):
        stem = f"{workdir}/logs/{experiment._id}/{task.name}"
        patterns = [f"{stem}.log", f"{stem}.outcome"]
    else:
        # The batch script's own remarks last: they name the reason.
        folder = f"{job.executor.tunnel.job_dir}/{task.name}"
        patterns = [f"{folder}/log-*_{task.job}_*.out", f"{folder}/sbatch_*_{task.job}.out"]
        if isinstance(job.executor.tunnel, nemo_run.SSHTunnel):
            job.executor.tunnel.connect()
            done = job.executor.tunnel.run(f"tail -q -n {LOG_LINES} {' '.join(patterns)}", warn=True)
            return str(done.stdout).splitlines()
    lines = []
    for pattern in patterns:
        for path in sorted(glob.glob(pattern))[-1:]:
            lines += Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return lines or [f"(no log; sacct -j {task.job} -o State,ExitCode,Reason)" if task.job else "(no log)"]


def reopen(experiment_id: str) -> Any:
    """The experiment of an earlier launch.

    Raises:
        ConfigError: none of that id.
    """
    try:
        experiment = nemo_run.Experiment.from_id(experiment_id)
    except (AssertionError, FileNotFoundError):
        raise ConfigError("no such experiment", where=experiment_id, expected="the id that launch printed") from None
    return experiment


def summary(experiment: Any, found: Sequence[TaskState], workdir: str) -> tuple[list[str], int]:
    """Table of the tasks with the first failure's last lines, and the exit status: 0 if all succeeded."""
    lines = [f"{task.name:<20}{task.job:<12}{task.state}" for task in found]
    bad = [task for task in found if task.state in ("failed", "unknown")] or [
        task for task in found if task.state == "cancelled"
    ]
    if bad:
        lines += [f"{bad[0].name} {bad[0].state}; the last lines of its log:"]
        lines += [f"    {line}" for line in last_lines(experiment, bad[0], workdir)]
    return lines, int(any(task.state in ("failed", "cancelled", "unknown") for task in found))
