"""`offgrpo launch` and `offgrpo jobs`: from the command line's values to an experiment."""

import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import megatron_offgrpo
from megatron_offgrpo.errors import ConfigError, OffgrpoError
from megatron_offgrpo.launch.chain import Step, from_json
from megatron_offgrpo.launch.settings import LaunchSettings

_OF_THE_CHAIN = ("benchmark", "prepare_shards", "eval_shards", "prepare_args", "eval_args", "export_args", "steps")
_REPEATED = ("set", "input")


def launch(values: dict[str, Any]) -> tuple[list[str], int]:
    """Runs, or prints, what the options of `offgrpo launch` ask for; lines to print and exit status."""
    settings = settings_of(values)
    steps = read_chain(values, settings)
    from megatron_offgrpo.launch import experiment

    title = re.sub(r"\W+", "-", values["recipe"]).strip("-")
    with experiment.opened(steps, settings, f"{title}_{time.time_ns()}") as made:
        if values["dryrun"]:
            return [f"# {name}\n{content}" for name, content in experiment.scripts(made)], 0
        experiment.start(made, settings, detach=values["detach"], poll_seconds=values["poll_seconds"])
    found = experiment.states(made, settings.workdir)
    if values["detach"]:
        lines = [f"{task.name:<20}{task.job:<12}{task.state}" for task in found]
        return [*lines, f"offgrpo jobs status {made._id}"], 0
    return experiment.summary(made, found, settings.workdir)


def settings_of(values: dict[str, Any]) -> LaunchSettings:
    """The settings among the options.

    Raises:
        ConfigError: they contradict each other, or one that is needed is absent.
    """
    ssh = values.get("ssh")
    if ssh and not values.get("home"):
        raise ConfigError("where is the checkout on the cluster?", where="--home", expected="with --ssh a folder there")
    home = values.get("home") or str(Path(megatron_offgrpo.__file__).resolve().parents[1])
    container = values.get("container_image")
    return LaunchSettings(
        executor=values["executor"],
        home=home,
        workdir=values.get("workdir") or (home if ssh else str(Path.cwd())),
        python=values.get("python") or ("python" if container else f"{home}/.venv/bin/python"),
        nodes=values["nodes"],
        gpus_per_node=values["gpus_per_node"],
        account=values.get("account"),
        partition=values.get("partition"),
        container_image=container,
        mounts=tuple(values.get("mounts", ())),
        time=values["time"],
        environment=_pairs(values.get("env", ()), "--env"),
        sbatch=_pairs(values.get("sbatch", ()), "--sbatch"),
        ssh=ssh,
        identity=values.get("identity"),
        job_dir=values.get("job_dir"),
    )


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError("not a pair", where=option, expected="NAME=VALUE", got=text)
        pairs[name] = value
    return pairs


def read_chain(values: dict[str, Any], settings: LaunchSettings) -> list[Step]:
    """Asks the project's own environment for the chain: the launcher's has no torch, which recipes import."""
    # In a container only the jobs have that Python; the checkout's own environment answers then.
    python = f"{settings.home}/.venv/bin/python" if settings.container_image else settings.python
    command = [python, "-m", "megatron_offgrpo.cli", "chain", values["recipe"], "--format", "json"]
    for name in _OF_THE_CHAIN:
        if values.get(name):
            command.append(f"--{name.replace('_', '-')}={values[name]}")
    command += [word for name in _REPEATED for value in values.get(name, ()) for word in (f"--{name}", str(value))]
    if settings.ssh:
        identity = ["-i", settings.identity] if settings.identity else []
        user, host, port = settings.login_node()
        options = [*identity, *(["-p", str(port)] if port else []), f"{user}@{host}"]
        command = ["ssh", *options, f"cd {shlex.quote(settings.workdir)} && {shlex.join(command)}"]
    try:
        done = subprocess.run(command, cwd=None if settings.ssh else settings.workdir, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"the project's Python does not start ({error})", where="--python", remedy="make install, or --python FILE"
        ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise OffgrpoError(last[0].removeprefix("error: "))
    return from_json(done.stdout.strip().splitlines()[-1])


def manage(action: str, experiment_id: str, task: str | None, workdir: str) -> tuple[list[str], int]:
    """Status, logs or cancellation of an experiment; lines to print and exit status."""
    from megatron_offgrpo.launch import experiment

    opened = experiment.reopen(experiment_id)
    found = experiment.states(opened, workdir)
    chosen = [state for state in found if task in (None, state.name)]
    if not chosen:
        known = ", ".join(state.name for state in found)
        raise ConfigError("no such task", where=experiment_id, expected=f"one of {known}", got=task)
    if action == "status":
        return experiment.summary(opened, chosen, workdir)
    if action == "logs":
        lines = []
        for state in chosen:
            lines += [f"== {state.name} {state.state}", *experiment.last_lines(opened, state, workdir)]
        return lines, 0
    alive = [state for state in chosen if state.state not in experiment.ENDED and state.job]
    experiment.cancel(opened, [state.job for state in alive])
    return [f"cancelled: {', '.join(state.name for state in alive) or 'nothing'}"], 0
