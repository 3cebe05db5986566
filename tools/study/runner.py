"""Runs a study: what all runs share, each arm's sweep, then its seeds, over worker processes; resumable run by run."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from megatron_offgrpo.errors import OffgrpoError
from megatron_offgrpo.objective.needs import needs_reference
from megatron_offgrpo.progress import say
from recipes.study import ARMS, Arm
from tools.study.parent import end_with_parent
from tools.study.runs import Job, do, finished
from tools.study.settings import SWEEP_SEED, StudySettings
from tools.study.stores import build_shared, raise_models

Result = dict[str, Any]
Results = dict[str, Result]
"""Folder of a job, relative to the study -> its result."""
GRID_FACTOR = 3.0

_open: dict[str, Any] = {}
"""Of a worker process: the `Measuring` that stays open over its runs."""


class Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """A finished future."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **keywords))
        return future


def run_study(settings: StudySettings, arms: Sequence[Arm], *, workers: int) -> Results:
    """Does every run of these arms that is not done yet.

    Args:
        workers: processes with one thread each; 0 runs everything in this process.

    Raises:
        OffgrpoError: a stage or run failed; the runs that finished are kept.
    """
    settings.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pool: Executor = Here()
        if workers:
            # One thread a worker, also inside the libraries, whatever this process was started with.
            os.environ["OMP_NUM_THREADS"] = "1"
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        # After an error or an interruption only the runs at hand are finished.
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        stack.callback(_close)
        try:
            _prepare(settings, arms, pool)
            return _run_jobs(settings, arms, pool)
        except BrokenProcessPool:
            remedy = "too little memory? the same command goes on from the runs that are finished"
            raise OffgrpoError("a worker process ended by itself", where="study", remedy=remedy) from None


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _close() -> None:
    if "measuring" in _open:
        _open.pop("measuring").__exit__(None, None, None)


def _prepare(settings: StudySettings, arms: Sequence[Arm], pool: Executor) -> None:
    for future in [pool.submit(raise_models, settings, which) for which in ("student", "teacher")]:
        future.result()
    trained = [arm for arm in arms if arm.objective is not None]
    stores = dict.fromkeys(arm.store for arm in trained if not arm.rounds)
    referenced = {arm.store for arm in trained if arm.objective and needs_reference(arm.objective()) and not arm.rounds}
    pool.submit(build_shared, settings, tuple(stores), tuple(sorted(referenced))).result()


def _run_jobs(settings: StudySettings, arms: Sequence[Arm], pool: Executor) -> Results:
    base = next(arm for arm in ARMS if arm.objective is None)
    results: Results = {}
    first = Job(base, 0.0, SWEEP_SEED, sweep=True)
    results[name_of(first, settings)] = pool.submit(_work, first, settings).result()
    pending: dict[Future[Result], Job] = {}
    submitted = {name_of(first, settings)}

    def submit_wanted() -> None:
        for arm in arms:
            for job in wanted(arm, results, settings):
                if name_of(job, settings) not in submitted:
                    submitted.add(name_of(job, settings))
                    pending[pool.submit(_work, job, settings)] = job

    submit_wanted()
    while pending:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            job = pending.pop(future)
            results[name_of(job, settings)] = future.result()
            say(f"{_line(job, future.result())}   ({len(results)} done, {len(pending)} waiting or running)")
        submit_wanted()
    return results


def _work(job: Job, settings: StudySettings) -> Result:
    """In a worker: does a job with what is open there."""
    from tools.study.measuring import Measuring

    known = finished(job, settings)
    if known is not None:
        return known
    if _open.get("root") != settings.root or "measuring" not in _open:
        _close()
        _open["measuring"], _open["root"] = Measuring(settings).__enter__(), settings.root
    return do(job, settings, _open["measuring"])


def name_of(job: Job, settings: StudySettings) -> str:
    """The job's folder, relative to the study."""
    return str(job.folder(settings).relative_to(settings.root))


def wanted(arm: Arm, results: Results, settings: StudySettings) -> list[Job]:
    """What can be run of an arm now: the sweep until a rate is chosen, then the seeds."""
    if arm.objective is None:
        return [Job(arm, 0.0, seed, sweep=False) for seed in settings.seeds]
    lr = chosen_lr(arm, results, settings)
    if lr is None:
        return sweep_jobs(arm, results, settings)
    return [Job(arm, lr, seed, sweep=False) for seed in settings.seeds]


def sweep_jobs(arm: Arm, results: Results, settings: StudySettings) -> list[Job]:
    """The runs of the grid, by rate; once it is done and its best rate stands at an end, one rate beyond."""
    jobs = [Job(arm, lr, SWEEP_SEED, sweep=True) for lr in sorted(settings.lrs)]
    for _ in range(settings.extensions):
        scores = _scores(jobs, results, settings)
        if scores is None:
            break
        best = jobs[scores.index(max(scores))]
        if best is jobs[0]:
            jobs.insert(0, Job(arm, _rounded(best.lr / GRID_FACTOR), SWEEP_SEED, sweep=True))
        elif best is jobs[-1]:
            jobs.append(Job(arm, _rounded(best.lr * GRID_FACTOR), SWEEP_SEED, sweep=True))
    return jobs


def chosen_lr(arm: Arm, results: Results, settings: StudySettings) -> float | None:
    """The rate with the best adjusted validation accuracy, the smallest among equals; None until the sweep is done."""
    jobs = sweep_jobs(arm, results, settings)
    scores = _scores(jobs, results, settings)
    return None if scores is None else jobs[scores.index(max(scores))].lr


def _scores(jobs: Sequence[Job], results: Results, settings: StudySettings) -> list[float] | None:
    """Adjusted validation accuracy: accuracy - max(0, retention of the base - retention)."""
    base = next(arm for arm in ARMS if arm.objective is None)
    start = results[name_of(Job(base, 0.0, SWEEP_SEED, sweep=True), settings)]
    found = [results.get(name_of(job, settings)) for job in jobs]
    if any(one is None for one in found):
        return None
    return [one["accuracy"] - max(0.0, start["retention"] - one["retention"]) for one in found if one is not None]


def _rounded(lr: float) -> float:
    """One significant digit: 3e-4 * 3 is 1e-3, as in the grid."""
    digit, exponent = f"{lr:.0e}".split("e")
    return float(f"{'1' if digit == '9' else digit}e{int(exponent) + (digit == '9')}")


def _line(job: Job, result: Result) -> str:
    name = f"{job.arm.name} lr {job.lr:g} {'sweep' if job.sweep else f'seed {job.seed}'}"
    if job.sweep:
        figures = f"accuracy {result['accuracy']:.3f}, retention {result['retention']:.3f} (validation)"
    else:
        counts = result["right"]["0.6"]
        figures = f"accuracy {sum(counts['counts']) / counts['samples'] / len(counts['counts']):.3f}"
    return f"{name}: {figures}, {result['seconds']:.0f} s"
