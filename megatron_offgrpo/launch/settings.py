"""Where and with what a chain runs, and the scripts of its steps."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.launch.chain import Step
from megatron_offgrpo.ranges import Count, Natural, Ranged

Executor = Literal["local", "torchrun", "slurm"]
_ADDRESS = re.compile(r"(?P<user>[^@\s]+)@(?P<host>[^@:\s]+)(:(?P<port>\d+))?")


@dataclass(frozen=True)
class LaunchSettings(Ranged, section="--"):
    """What the command line of `offgrpo launch` gives."""

    executor: Executor
    home: str
    """Checkout of this project on the machine where the jobs run."""
    workdir: str
    """Folder in which the commands run; relative paths of a recipe begin here."""
    python: str
    """Of the jobs, not of the launcher."""
    nodes: Count = 1
    gpus_per_node: Natural = 0
    """Also the number of ranks of a node; 0: one rank and no GPU."""
    account: str | None = None
    partition: str | None = None
    container_image: str | None = None
    mounts: tuple[str, ...] = ()
    time: str = "24:00:00"
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch: name -> value."""
    ssh: str | None = None
    """user@host or user@host:port of a login node; None: Slurm's commands are on this machine."""
    identity: str | None = None
    """File of the SSH key."""
    job_dir: str | None = None
    """Folder on the cluster for scripts and logs of jobs sent by SSH."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor == "torchrun" and self.gpus_per_node < 1:
            raise ConfigError("torchrun needs a number of processes", where="--gpus-per-node", expected="at least 1")
        if self.executor != "slurm" and self.nodes > 1:
            raise ConfigError("one machine only", where="--nodes", expected="1, or --executor slurm", got=self.nodes)
        if self.ssh and not (self.executor == "slurm" and self.job_dir and _ADDRESS.fullmatch(self.ssh)):
            raise ConfigError(
                "an SSH tunnel leads to a Slurm cluster",
                where="--ssh",
                expected="--executor slurm --ssh user@host --job-dir FOLDER_ON_THE_CLUSTER",
                got=self.ssh,
            )

    def login_node(self) -> tuple[str, str, int | None]:
        """(user, host, port) of `ssh`; None: the port that SSH's own configuration has for the host."""
        address = _ADDRESS.fullmatch(self.ssh or "")
        assert address
        return address["user"], address["host"], int(address["port"]) if address["port"] else None


def signal_lead(time: str) -> int:
    """Seconds before the time limit at which a job is told to save: 600, or a quarter of a short limit.

    Args:
        time: as sbatch takes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises:
        ConfigError: none of these.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > len(units):
        raise ConfigError("not a time limit", where="--time", expected="for example 12:00:00 or 2-00:00:00", got=time)
    seconds = int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return min(600, seconds // 4)


def expanded(steps: list[Step]) -> list[tuple[Step, str, tuple[str, ...], tuple[str, ...]]]:
    """(step, task name, arguments, tasks before it): a sharded step becomes one task per shard."""
    names: dict[str, tuple[str, ...]] = {}
    tasks = []
    for step in steps:
        before = tuple(name for need in step.needs for name in names[need])
        if not step.shards:
            names[step.name] = (step.name,)
            tasks.append((step, step.name, step.arguments, before))
            continue
        names[step.name] = tuple(f"{step.name}_{number}" for number in range(step.shards))
        for number, name in enumerate(names[step.name]):
            tasks.append((step, name, (*step.arguments, "--shard", f"{number}/{step.shards}"), before))
    return tasks


def local_script(
    settings: LaunchSettings, step: Step, name: str, arguments: tuple[str, ...], before: tuple[str, ...], folder: str
) -> str:
    """Runs one task on this machine, after those before it; `FOLDER/NAME.done` marks its success.

    NeMo-Run starts what comes next although a task failed, so each task looks for the marks itself.
    """
    quoted = shlex.quote(folder)
    lines = [f"mkdir -p {quoted}", f"cd {shlex.quote(settings.workdir)} || exit 1"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in settings.environment.items()]
    # torchrun buries the reason of a failure under its own report.
    lines.append(f"export OFFGRPO_OUTCOME={quoted}/{name}.outcome")
    for other in before:
        lines.append(f'[[ -e {quoted}/{other}.done ]] || {{ echo "not started: {other} did not succeed"; exit 1; }}')
    command = [settings.python]
    if settings.executor == "torchrun" and step.on_ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.gpus_per_node}"]
    command += ["-m", "megatron_offgrpo.cli", *arguments]
    lines += ["set -o pipefail", f"{shlex.join(command)} 2>&1 | tee {quoted}/{name}.log && touch {quoted}/{name}.done"]
    return "\n".join(lines) + "\n"


def slurm_script(settings: LaunchSettings, arguments: tuple[str, ...]) -> str:
    """What each task of a Slurm job runs."""
    command = shlex.join([settings.python, "-m", "megatron_offgrpo.cli", *arguments])
    return f"cd {shlex.quote(settings.workdir)} || exit 1\nexec {command}\n"


def slurm_setup(settings: LaunchSettings, logs: str) -> str:
    """Lines before the srun of a generated batch script: the rules of slurm/common.sh take its srun over."""
    return "\n".join(
        [
            "set +evx",
            f"export OFFGRPO_HOME={shlex.quote(settings.home)} OFFGRPO_LOGS={shlex.quote(logs)}",
            'source "$OFFGRPO_HOME/slurm/common.sh" || exit 1',
            'srun() { offgrpo_supervise command srun "$@"; }',
        ]
    )


def mounts_of(settings: LaunchSettings, logs: str) -> list[str]:
    """Mounts of a container: the given ones, the checkout, the work folder, and the logs."""
    own = dict.fromkeys([settings.home, settings.workdir, logs])
    return [*settings.mounts, *(f"{folder}:{folder}" for folder in own if PurePosixPath(folder).is_absolute())]
