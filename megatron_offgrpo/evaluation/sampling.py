"""Sampling that can be killed, resumed and shared out: the core of `offgrpo eval` and `offgrpo generate`."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.errors import GenerationError, OffgrpoError
from megatron_offgrpo.evaluation.generation import (
    Backend,
    BackendConfig,
    Completion,
    Request,
    SamplingSettings,
    open_backend,
    seed_of,
)
from megatron_offgrpo.evaluation.sample_log import Key, LogWriter, SampleLogs, Shard, require_idle
from megatron_offgrpo.progress import progress, say


class LazyBackend:
    """A back end that is opened when first needed and closed at the end; several benchmarks share it."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._stack = ExitStack()
        self._backend: Backend | None = None

    def __enter__(self) -> "LazyBackend":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def get(self) -> Backend:
        if self._backend is None:
            self._backend = self._stack.enter_context(open_backend(self.config))
        return self._backend


@dataclass(frozen=True)
class Wanted:
    """One sample to draw."""

    key: Key
    request: Request


@dataclass(frozen=True)
class SamplingRun:
    """K samples of each problem, under one folder of logs."""

    prompts: dict[str, tuple[int, ...]]
    """Problem id -> token ids of its prompt, in the order of the problems."""
    samples: int
    seed: int
    settings: SamplingSettings
    batch_size: int | None
    """Of the back end: see `Backend.batch_size`."""
    parts: Path
    """Folder of the logs; its name is the fingerprint of all that a sample depends on."""

    def units(self) -> list[list[Wanted]]:
        """The smallest pieces of work that can be done apart without changing any sample.

        Where a back end computes requests in batches, a sample may depend on its neighbours in the last bit of its
        logits. A unit is therefore a whole batch, cut from the whole list, whatever is left to do; else a problem.
        """
        by_problem = [
            [Wanted((name, k), Request(ids, seed_of(self.seed, name, k))) for k in range(self.samples)]
            for name, ids in self.prompts.items()
        ]
        if self.batch_size is None:
            return by_problem
        # Prompts of about the same length share a batch: less padding.
        flat = sorted((one for unit in by_problem for one in unit), key=lambda one: len(one.request.prompt_ids))
        return [flat[start : start + self.batch_size] for start in range(0, len(flat), self.batch_size)]

    def all_keys(self) -> list[Key]:
        """Every sample, in the order of the problems."""
        return [(name, k) for name in self.prompts for k in range(self.samples)]


Describe = Callable[[Key, Completion], dict[str, Any]]
"""What is logged of a sample beside its key, seed, length and finish reason."""


def draw_samples(run: SamplingRun, lazy: LazyBackend, describe: Describe, shard: Shard | None = None) -> SampleLogs:
    """Draws what is not in the logs yet: the shard's share, or without a shard everything that is missing.

    Raises:
        GenerationError: the back end failed; what it finished before is logged.
        ConfigError: a log is being written by another process.
    """
    if shard is None:
        require_idle(run.parts)
    with LogWriter(run.parts, shard) as writer:
        logs = SampleLogs(run.parts)
        units = run.units()
        mine = units if shard is None else units[shard.index :: shard.count]
        missing = [one for unit in mine for one in unit if one.key not in logs]
        total = sum(len(unit) for unit in mine)
        if len(missing) < total:
            say(f"{run.parts}: {total - len(missing)} of {total} samples are there already")
        if missing:
            open_units = [unit for unit in mine if any(one.key not in logs for one in unit)]
            whole = [one for unit in open_units for one in unit]
            _draw(run, lazy, missing if run.batch_size is None else whole, missing, writer, describe)
    return SampleLogs(run.parts)


def _draw(
    run: SamplingRun,
    lazy: LazyBackend,
    asked: Sequence[Wanted],
    missing: Sequence[Wanted],
    writer: LogWriter,
    describe: Describe,
) -> None:
    new = {one.key for one in missing}
    backend = lazy.get()
    start, tokens, done = time.monotonic(), 0, 0
    with progress("sampling", len(missing)) as advance:
        try:
            for index, completion in backend.generate([one.request for one in asked], run.settings):
                wanted = asked[index]
                if wanted.key not in new:
                    continue
                writer.add(_record(wanted, completion) | describe(wanted.key, completion))
                tokens, done = tokens + completion.num_tokens, done + 1
                advance(1, f"{tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")
        except OffgrpoError as error:
            raise _kept(error.what, done, len(missing), run.parts, error.remedy) from error
        except (RuntimeError, MemoryError) as cause:
            # torch.OutOfMemoryError and what engines raise when they die are RuntimeErrors.
            raise _kept(f"the back end failed ({_first_line(cause)})", done, len(missing), run.parts) from cause


def _kept(what: str, done: int, wanted: int, parts: Path, remedy: str | None = None) -> GenerationError:
    resume = f"the same command goes on from {parts}, where the finished samples are"
    return GenerationError(
        what, where=f"after {done} of {wanted} samples", remedy=f"{remedy}; {resume}" if remedy else resume
    )


def _first_line(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__


def _record(wanted: Wanted, completion: Completion) -> dict[str, Any]:
    problem_id, sample_id = wanted.key
    return {
        "problem_id": problem_id,
        "sample_id": sample_id,
        "tokens": completion.num_tokens,
        "finish_reason": completion.finish_reason,
        "seed": wanted.request.seed,
    }
