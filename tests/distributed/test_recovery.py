"""A run goes on from folders that a kill, a damaged file or a failed save has left, and knows its best checkpoint."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_offgrpo.config import LayoutConfig, with_values
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import checkpoint_folder, loop
from megatron_offgrpo.training.checkpoint_folder import TRACKER, latest, read_best, write_best, write_tracker
from megatron_offgrpo.training.run_folder import read_metrics
from tests.distributed.toy import in_folder, toy_run, write_inputs, write_toy_store

NUM_STEPS = 4
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


def base_run(folder: Path):
    run = with_values(in_folder(toy_run(epochs=2), folder), objective={"beta": 0.0})
    return with_values(run, checkpoint={"every_steps": 1, "keep": 0})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, place) -> Path:
    """Inputs with two validation groups, and an undisturbed run of four steps that saves after each."""
    folder = tmp_path_factory.mktemp("recovery")
    run = base_run(folder)
    store = write_toy_store(folder / "store", num_groups=10, num_validation=2)
    write_inputs(run, folder, store)
    assert loop.train(run, place) is True
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """The same run into a folder of its own."""
    base = base_run(prepared)
    return replace(base, paths=replace(base.paths, output=str(tmp_path / "train")))


def checkpoints(run) -> list[str]:
    return sorted(path.name for path in (Path(run.paths.output) / "checkpoints").glob("*iter_*"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the run's own catches it."""


def go_back(run, prepared: Path, iteration: int) -> Path:
    """The undisturbed run as it was after `iteration`; returns the folder of its checkpoints."""
    shutil.copytree(prepared / "train", run.paths.output)
    folder = Path(run.paths.output) / "checkpoints"
    for newer in range(iteration + 1, NUM_STEPS + 1):
        shutil.rmtree(folder / f"iter_{newer:07d}")
    write_tracker(folder, str(iteration))
    return folder


def validate_as(monkeypatch, *values: float) -> None:
    calls = iter(values)
    monkeypatch.setattr(loop, "validate", lambda *arguments: {"validation_surrogate": next(calls)})


def test_what_was_passed_over_goes_with_the_next_save_and_that_one_stays(run, prepared, place, monkeypatch, capfd):
    run = with_values(run, checkpoint={"every_steps": 1, "keep": 1})
    folder = go_back(run, prepared, 4)
    flip_a_bit(sorted((folder / "iter_0000004").glob("*.distcp"))[0])
    shutil.rmtree(folder / "iter_0000003")
    write_best(folder, 1, "surrogate", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "agreed", lambda stop, place: True)
        assert loop.train(run, place) is False
    assert "passed over a checkpoint" in capfd.readouterr().err
    assert checkpoints(run) == ["iter_0000001", "iter_0000003"]
    assert loop.train(run, place) is True
    assert "iter_0000003" in capfd.readouterr().err
    assert checkpoints(run) == ["iter_0000001", "iter_0000004"]


@pytest.mark.parametrize("tracker", [None, "", "7"])
def test_a_run_with_a_damaged_tracker_goes_on(tracker, run, prepared, place, capfd):
    folder = go_back(run, prepared, 4)
    (folder / TRACKER).unlink()
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    assert loop.train(run, place) is True
    assert re.search(
        rf"{TRACKER} (is missing|names no).*newest whole checkpoint is iter_0000004", capfd.readouterr().err
    )
    assert len(read_metrics(Path(run.paths.output))) == NUM_STEPS
    assert latest(folder).name == "iter_0000004"


def test_a_kill_before_the_best_is_named_validates_again(run, prepared, place, monkeypatch):
    folder = go_back(run, prepared, 1)
    run = with_values(run, validation={"every_steps": 1, "metric": "surrogate", "best": "highest"})
    validate_as(monkeypatch, 9.0, 9.0, 5.0, 1.0)

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "write_best", kill)
        with pytest.raises(Killed):
            loop.train(run, place)
    assert checkpoints(run) == ["iter_0000001", "iter_0000002"]
    assert loop.train(run, place) is True
    assert read_best(folder) == {"iteration": 2, "surrogate": 9.0}


def test_neither_nan_nor_a_checkpoint_that_was_not_saved_is_the_best(run, prepared, place, monkeypatch, capfd):
    folder = go_back(run, prepared, 1)
    run = with_values(run, validation={"every_steps": 1, "metric": "surrogate", "best": "highest"})
    validate_as(monkeypatch, float("nan"), 9.0, 5.0)
    calls = iter([10, 10**12])
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: Usage(10**12, 0, next(calls)))
    assert loop.train(with_values(run, checkpoint={"every_steps": 0}), place) is True
    assert "no room for a checkpoint" in capfd.readouterr().err
    assert read_best(folder) == {"iteration": 4, "surrogate": 5.0}
