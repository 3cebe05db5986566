"""Saves that fail, on one rank alone too: one error, nothing left behind, and the next save is written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_offgrpo.config import LayoutConfig, with_values
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import checkpoint, loop, reference
from megatron_offgrpo.training.checkpoint_folder import latest
from tests.distributed.harness import run_ranks
from tests.distributed.save_worker import WRITES_OF_ONE_RANK, fail_once
from tests.distributed.toy import in_folder, toy_run, write_inputs, write_toy_store


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, place) -> Path:
    """The inputs of a run of two steps."""
    folder = tmp_path_factory.mktemp("failing_saves")
    run = in_folder(toy_run(epochs=1), folder)
    store = write_toy_store(folder / "store")
    write_inputs(run, folder, store)
    reference.compute_reference(run, place)
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """Saves after each step."""
    run = with_values(in_folder(toy_run(epochs=1), prepared), checkpoint={"every_steps": 1, "keep": 0})
    return replace(run, paths=replace(run.paths, output=str(tmp_path / "train")))


def checkpoints(run) -> list[str]:
    return sorted(path.name for path in (Path(run.paths.output) / "checkpoints").glob("*iter_*"))


@pytest.mark.parametrize("failing", WRITES_OF_ONE_RANK)
def test_the_last_save_is_written_after_one_that_failed(failing, run, place, monkeypatch, capfd):
    fail_once(monkeypatch.setattr, failing)
    assert loop.train(run, place) is True
    assert "No space left on device" in capfd.readouterr().err
    assert checkpoints(run) == ["iter_0000002"]


def test_an_error_of_one_rank_alone_is_an_error_of_all(run, prepared):
    run_ranks("tests.distributed.save_worker:fail_on_rank_0", 2, folder=str(prepared), output=run.paths.output)
    # One save went well after each that failed, and the last of them is kept.
    assert checkpoints(run) == [f"iter_{len(WRITES_OF_ONE_RANK) + 1:07d}"]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_vanished_is_not_made_again(comes_back, run, place, monkeypatch, capfd):
    folder = Path(run.paths.output) / "checkpoints"
    step, num_steps = loop.train_step, []

    def step_after_an_unmount(*arguments):
        num_steps.append(1)
        if len(num_steps) == 1:
            shutil.rmtree(folder)
        elif comes_back:
            folder.mkdir()
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", step_after_an_unmount)
    if comes_back:
        assert loop.train(run, place) is True
        assert latest(folder).name == "iter_0000002"
    else:
        with pytest.raises(CheckpointError, match="checkpoints: the folder of the checkpoints has gone; remedy: mount"):
            loop.train(run, place)
        assert not folder.exists()
    assert "has gone; remedy: mount or make it again; training goes on" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_ends_the_start(place, tmp_path, monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoints: Permission denied; remedy: .*permissions"):
        checkpoint.CheckpointWriter(tmp_path / "checkpoints", place, keep=0, asynchronous=True)
