"""What the processes of the fault tests do."""

import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import loop
from megatron_offgrpo.training.checkpoint import CheckpointWriter, load_weights
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.toy import in_folder, toy_run


def run_in(folder: str, output: str) -> RunConfig:
    run = in_folder(toy_run(epochs=2), Path(folder))
    return replace(run, paths=replace(run.paths, output=output))


def student_after_a_step(run: RunConfig) -> Student:
    """With something in its optimizer."""
    student = build_student(read_architecture(run.paths.hf_model), run)
    load_weights(student, Path(run.paths.megatron) / "release")
    student.zero_grad()
    student.optimizer.step()
    return student


def hang_in_step_1() -> None:
    """The second step of this process takes longer than any limit."""
    step, calls = loop.train_step, iter(range(10))

    def sleep_in_step_1(*arguments):
        if next(calls) == 1:
            time.sleep(100)
        return step(*arguments)

    loop.train_step = sleep_in_step_1


def save_with_a_file_size_limit(folder: str, output: str) -> None:
    """One save that succeeds; one in which rank 0 may not write a whole file, as on a full disk; nothing is left."""
    run = run_in(folder, output)
    place = runtime.start(LayoutConfig(), seed=0)
    student = student_after_a_step(run)
    writer = CheckpointWriter(Path(output) / "checkpoints", place, keep=0, asynchronous=True)
    manifest = Manifest(kind="checkpoint", fingerprint="test", inputs={})
    writer.save(student, 1, manifest)
    writer.finish()
    if place.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    writer.save(student, 2, manifest)
    with pytest.raises(CheckpointError, match="a checkpoint could not be written"):
        writer.finish()
    runtime.stop()


def hang(folder: str, output: str) -> None:
    """A run of one process that sleeps in its second step."""
    run = with_values(run_in(folder, output), fault={"timeout_seconds": 6.0})
    hang_in_step_1()
    loop.train(run, runtime.start(LayoutConfig(), seed=0))


def hang_on_rank_1(folder: str, output: str) -> None:
    """A run of two processes of which the second one sleeps in its second step; it times out first."""
    place = runtime.start(LayoutConfig(), seed=0)
    run = with_values(run_in(folder, output), fault={"timeout_seconds": 7.5 - 1.5 * place.rank})
    if place.rank == 1:
        hang_in_step_1()
    loop.train(run, place)


def roll_back(folder: str, output: str) -> None:
    """The run of test_rollback.py on these ranks."""
    from tests.distributed.test_rollback import base_run

    run = in_folder(base_run(), Path(folder))
    place = runtime.start(LayoutConfig(), seed=0)
    assert loop.train(replace(run, paths=replace(run.paths, output=output)), place) is True
    runtime.stop()
