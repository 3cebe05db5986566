"""Kills ranks of a training run with SIGKILL at random moments, and starts it again until it is finished."""

import random
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.system.cli import command, environment


@dataclass
class Kills:
    """What was killed, and where the run stood."""

    starts: int = 0
    one_rank: int = 0
    all_ranks: int = 0
    before_the_first_step: int = 0
    while_a_save_was_open: int = 0
    steps: list[int] = field(default_factory=list)
    """Steps logged when the kill came."""


def train_through_kills(
    arguments: list[str], output: Path, *, kills: int, seed: int, latest_seconds: float, cwd: Path, timeout: float
) -> Kills:
    """Runs `offgrpo train` with these arguments; kills it `kills` times, within `latest_seconds` of its start."""
    rng, done = random.Random(seed), Kills()
    deadline = time.monotonic() + timeout
    while True:
        assert time.monotonic() < deadline, done
        log = (cwd / "kills.log").open("a")
        process = subprocess.Popen(command(*arguments), env=environment(), cwd=cwd, stderr=log, stdout=log)
        done.starts += 1
        if done.one_rank + done.all_ranks < kills:
            _kill(process, rng, done, output, latest_seconds)
        code = process.wait(timeout=timeout)
        text = (cwd / "kills.log").read_text()
        # A reader never sees a half-written checkpoint.
        assert "passed over" not in text, text[-3000:]
        if code == 0:
            return done


def _kill(process: subprocess.Popen, rng: random.Random, done: Kills, output: Path, latest_seconds: float) -> None:
    launcher = psutil.Process(process.pid)
    while process.poll() is None and not launcher.children():
        time.sleep(0.01)
    end = time.monotonic() + rng.uniform(0, latest_seconds)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    ranks = launcher.children() if process.poll() is None else []
    if not ranks:
        return
    metrics = output / "metrics.jsonl"
    done.steps.append(metrics.read_text().count("\n") if metrics.exists() else 0)
    done.before_the_first_step += done.steps[-1] == 0
    done.while_a_save_was_open += any((output / "checkpoints").glob(".iter_*"))
    victims = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
    done.all_ranks += len(victims) > 1
    done.one_rank += len(victims) == 1
    for victim in victims:
        victim.kill()
