"""Grading with math-verify in a pool of killable processes: a bad expression costs one sample, not the run."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_offgrpo
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data_config import THINK_TAGS
from megatron_offgrpo.errors import OffgrpoError

WORKER_MODULE = "megatron_offgrpo.data.grading_worker"
START_SECONDS = 120.0
WALL_FACTOR = 4.0
"""A worker is killed by the wall clock after this many times its CPU limit: it sleeps or waits, it does not compute."""
AHEAD_PER_PROCESS = 256
"""How far the pool runs ahead of a slow sample."""


@dataclass(frozen=True)
class Grade:
    """What the rules say of one solution."""

    reward: int
    """1 where the final answer equals the reference answer, else 0."""
    status: str
    """`ok`, `judged` (by a model, see `Judge`), `no_answer`, `unreadable` (no rule can compare the two), `empty_gold`,
    `unreadable_gold`, `timeout`, `out_of_memory` or `crash`."""
    extracted: str | None
    """The final answer as it is written; None where there is none."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    index: int | None = None
    """The sample it works on."""
    buffer: bytes = b""


class GradingPool:
    """Grades with `processes` workers; use it as a context manager.

    Args:
        processes: number of workers; None takes one for each CPU this process may use.
        timeout_seconds: CPU seconds that one sample may take.
        memory_mebibytes: address space of a worker.
        think_tags: what parts the thought from the final answer; see `ThinkTags`.
    """

    def __init__(
        self,
        processes: int | None = None,
        timeout_seconds: float = 5.0,
        memory_mebibytes: int = 4096,
        worker_module: str = WORKER_MODULE,
        think_tags: Sequence[str] = THINK_TAGS,
    ) -> None:
        self.processes = processes or len(os.sched_getaffinity(0))
        self.timeout_seconds = timeout_seconds
        root = str(Path(megatron_offgrpo.__file__).parents[1])
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.thinking = ThinkTags(think_tags)
        limits = [str(timeout_seconds), str(memory_mebibytes << 20)]
        self._command = [sys.executable, "-P", "-m", worker_module, *limits, *think_tags]
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()
        self._log.close()

    def grade(self, items: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grades (reference answer, solution text) pairs; the result has their order."""
        return list(self._run({"gold": gold, "text": text} for gold, text in items))

    def extract(self, texts: Iterable[str]) -> list[Grade]:
        """The final answer of each solution in `extracted`; `reward` is 0 and means nothing."""
        return list(self._run({"gold": None, "text": text} for text in texts))

    def _run(self, requests: Iterable[dict[str, Any]]) -> Iterator[Grade]:
        source, again = enumerate(requests), deque[tuple[int, dict[str, Any]]]()
        done: dict[int, Grade] = {}
        next_out, exhausted = 0, False
        newest = -1
        for _ in range(self.processes - len(self._workers)):  # started when first needed
            self._start()
        try:
            while True:
                for worker in self._workers:
                    if not worker.ready or worker.index is not None or newest - next_out > self._ahead:
                        continue
                    task = again.popleft() if again else next(source, None)
                    if task is None:
                        exhausted = True
                        break
                    newest = max(newest, task[0])
                    if not self._send(worker, *task):
                        again.append(task)  # died while idle: the sample is not to blame
                        break
                if exhausted and not again and all(worker.index is None for worker in self._workers):
                    break
                done.update(self._wait())
                while next_out in done:
                    yield done.pop(next_out)
                    next_out += 1
        finally:
            for worker in [worker for worker in self._workers if worker.index is not None]:
                self._replace(worker)

    @property
    def _ahead(self) -> int:
        return AHEAD_PER_PROCESS * self.processes

    def _start(self) -> None:
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=self._environment
        )
        worker = _Worker(process, time.monotonic() + START_SECONDS)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)

    def _stop(self, worker: _Worker) -> int:
        assert worker.process.stdout is not None
        assert worker.process.stdin is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.process.kill()
        code = worker.process.wait()
        worker.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a request may be left in the buffer of a dead worker
            worker.process.stdin.close()
        return code

    def _replace(self, worker: _Worker) -> int:
        code = self._stop(worker)
        if not worker.ready:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines() or [f"exit status {code}"]
            raise OffgrpoError("a grading process does not start", got=lines[-1], remedy="run `offgrpo doctor`")
        self._start()
        return code

    def _send(self, worker: _Worker, index: int, request: dict[str, Any]) -> bool:
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(request).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            self._replace(worker)
            return False
        worker.index = index
        worker.deadline = time.monotonic() + WALL_FACTOR * self.timeout_seconds + 1.0
        return True

    def _wait(self) -> dict[int, Grade]:
        """Waits for an answer, a death or a deadline; the samples that this settles."""
        settled: dict[int, Grade] = {}
        nearest = min(
            (worker.deadline for worker in self._workers if worker.index is not None or not worker.ready),
            default=time.monotonic(),
        )
        for key, _ in self._selector.select(max(0.0, nearest - time.monotonic())):
            worker: _Worker = key.data
            received = os.read(key.fd, 1 << 16)
            if received:
                worker.buffer += received
                self._receive(worker, settled)
            else:
                self._bury(worker, settled)
        for worker in list(self._workers):
            busy = worker.index is not None or not worker.ready
            if busy and time.monotonic() > worker.deadline:
                index = worker.index
                self._replace(worker)
                if index is not None:
                    settled[index] = Grade(0, "timeout", None)
        return settled

    def _receive(self, worker: _Worker, settled: dict[int, Grade]) -> None:
        *lines, worker.buffer = worker.buffer.split(b"\n")
        for line in lines:
            if not worker.ready:
                worker.ready = True
            elif worker.index is not None:
                settled[worker.index] = Grade(**json.loads(line))
                worker.index = None

    def _bury(self, worker: _Worker, settled: dict[int, Grade]) -> None:
        """Replaces a worker that ended by itself; the kernel's CPU timer ends it with SIGPROF."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=1.0)  # its own exit status; a kill now would hide it
        index, code = worker.index, self._replace(worker)
        if index is not None:
            settled[index] = Grade(0, "timeout" if code == -signal.SIGPROF else "crash", None)
