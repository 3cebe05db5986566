"""Kills ranks of a training run with SIGKILL at random moments of four kinds, and starts it again until its end."""

import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from tests.system.cli import command, environment

Moment = Literal["loading", "stepping", "saving", "logging"]
MOMENTS: tuple[Moment, ...] = ("stepping", "loading", "saving", "logging")
JUST_LOGGED = 0.01
"""Seconds after which a line of metrics is no longer being written."""
MOST_STEPS = 7
"""Before a start is killed, unless it is while it loads."""


@dataclass
class Kills:
    """What was killed, and what the run was doing."""

    starts: int = 0
    one_rank: int = 0
    all_ranks: int = 0
    seen: Counter[Moment] = field(default_factory=Counter)
    """What could be seen from outside at the moment of the kill."""
    steps: list[int] = field(default_factory=list)
    """Steps logged when the kill came."""
    loading_seconds: float = 0.0
    """From the last start to the end of loading."""

    @property
    def total(self) -> int:
        return self.one_rank + self.all_ranks


@dataclass
class Watch:
    """One start of the run, seen from outside."""

    process: subprocess.Popen
    output: Path
    log: Path
    log_start: int
    metrics_size: int = 0
    started: float = field(default_factory=time.monotonic)
    resumed: float = 0.0
    logged: float = 0.0
    steps: int = 0

    def look(self) -> None:
        """Notes when loading ended, steps logged and the last one's time; returns after a few milliseconds."""
        time.sleep(0.002)
        assert self.process.poll() is None, "the run ended before it could be killed"
        now, size = time.monotonic(), self.size()
        if size > self.metrics_size:
            self.logged, self.steps = now, self.steps + 1
        self.metrics_size = size
        if not self.resumed and "resumed from" in self.log.read_text()[self.log_start :]:
            self.resumed = now

    def size(self) -> int:
        metrics = self.output / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def save_is_open(self) -> bool:
        return any((self.output / "checkpoints").glob(".iter_*"))

    def seen(self) -> Moment:
        if not self.resumed and not self.logged:
            return "loading"
        if time.monotonic() - self.logged <= JUST_LOGGED:
            return "logging"
        return "saving" if self.save_is_open() else "stepping"

    def wait_for(self, moment: Moment, rng: random.Random, loading_seconds: float) -> None:
        """Until a random moment of this kind."""
        if moment == "loading":
            end = self.started + rng.uniform(0.8, 1.0) * loading_seconds
        else:
            # Some steps pass, so that the run gets on.
            steps = rng.randint(1, MOST_STEPS)
            while self.steps < steps or (moment == "saving" and not self.save_is_open()):
                self.look()
            end = time.monotonic() + {"stepping": rng.uniform(0, 0.5), "saving": rng.uniform(0, 0.05)}.get(moment, 0.0)
        while time.monotonic() < end:
            self.look()


def train_through_kills(
    arguments: list[str], output: Path, *, moments: list[Moment], seed: int, cwd: Path, timeout: float
) -> Kills:
    """Runs `offgrpo train` with these arguments and kills it at each of these moments, one a start."""
    rng, done, log = random.Random(seed), Kills(), cwd / "kills.log"
    log.touch()
    deadline = time.monotonic() + timeout
    while True:
        assert time.monotonic() < deadline, done
        log_start = len(log.read_text())
        with log.open("a") as file:
            process = subprocess.Popen(command(*arguments), env=environment(), cwd=cwd, stderr=file, stdout=file)
        done.starts += 1
        if done.total < len(moments):
            watch = Watch(process, output, log, log_start)
            watch.metrics_size = watch.size()
            _kill(watch, moments[done.total], rng, done)
        code = process.wait(timeout=timeout)
        text = log.read_text()
        # A reader never sees a half-written checkpoint.
        assert "passed over" not in text, text[-3000:]
        if code == 0:
            return done


def _kill(watch: Watch, moment: Moment, rng: random.Random, done: Kills) -> None:
    watch.wait_for(moment, rng, done.loading_seconds)
    ranks = psutil.Process(watch.process.pid).children()
    if not ranks:
        # The launcher had not made them yet.
        ranks = [psutil.Process(watch.process.pid)]
    metrics = watch.output / "metrics.jsonl"
    done.steps.append(metrics.read_text().count("\n") if metrics.exists() else 0)
    done.seen[watch.seen()] += 1
    if watch.resumed or watch.logged:
        done.loading_seconds = (watch.resumed or watch.logged) - watch.started
    victims = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
    done.all_ranks += len(victims) > 1
    done.one_rank += len(victims) == 1
    for victim in victims:
        victim.kill()
