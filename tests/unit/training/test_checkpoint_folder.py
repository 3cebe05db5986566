"""The folder after kills at any moment, with damaged trackers, and what is deleted from it."""

from pathlib import Path

import pytest

from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.training import checkpoint_folder
from megatron_offgrpo.training.checkpoint_folder import (
    BEST_FILE,
    TRACKER,
    best_up_to,
    candidates,
    read_best,
    remove_old,
    remove_unfinished,
    take_place,
    write_best,
    write_tracker,
)


def checkpoint(path: Path, content: str, *, complete: bool = True) -> Path:
    path.mkdir()
    (path / "data").write_text(content)
    if complete:
        (path / MANIFEST).write_text("{}")
    return path


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_while_a_checkpoint_is_replaced(tmp_path, monkeypatch, moves):
    target = checkpoint(tmp_path / "iter_0000012", "old")
    write_tracker(tmp_path, "12")
    new = checkpoint(tmp_path / ".iter_0000012.1700000000.tmp", "new")
    left, replace = iter(range(moves)), checkpoint_folder.os.replace

    def die_later(source, destination):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, destination)

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.os, "replace", die_later)
        patch.setattr(checkpoint_folder.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            take_place(new, target)
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000012", checkpoint_folder.TRACKER]
    assert (target / "data").read_text() == ("old" if moves == 0 else "new")


def test_a_save_that_was_cut_off_goes(tmp_path):
    checkpoint(tmp_path / "iter_0000012", "whole")
    write_tracker(tmp_path, "12")
    checkpoint(tmp_path / ".iter_0000013.1700000000.tmp", "part", complete=False)
    # Complete, but the tracker has not moved: the run goes on from 12 and writes it again.
    checkpoint(tmp_path / ".iter_0000014.1700000001.tmp", "complete")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000012", checkpoint_folder.TRACKER]


def numbers(paths) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in paths]


def write_checkpoints(folder: Path, *iterations: int) -> None:
    for iteration in iterations:
        checkpoint(folder / f"iter_{iteration:07d}", str(iteration))


@pytest.mark.parametrize(
    ("there", "keep", "best", "newest", "left"),
    [
        ([50, 60, 100], 1, 50, 60, [50, 60]),
        ([50, 60, 100], 0, None, 60, [50, 60]),
        ([10, 20, 30, 40], 2, 10, 40, [10, 30, 40]),
        ([10, 20], 5, None, 20, [10, 20]),
        ([9_999_999, 10_000_000], 1, None, 10_000_000, [10_000_000]),
    ],
)
def test_what_is_deleted_after_a_save(tmp_path, capsys, there, keep, best, newest, left):
    write_checkpoints(tmp_path, *there)
    if best:
        write_best(tmp_path, best, "kl", 1.0)
    remove_old(tmp_path, keep, newest)
    assert sorted(numbers(tmp_path.glob("iter_*"))) == left
    assert ("deletes" in capsys.readouterr().err) is (100 in there)


@pytest.mark.parametrize(
    ("tracker", "found", "problem"),
    [
        ("20", [20, 10], None),
        ("", [30, 20, 10], "names no checkpoint that is there: got ''"),
        ("40", [30, 20, 10], "names no checkpoint that is there: got '40'"),
        ("2\0", [30, 20, 10], "names no checkpoint"),
        (None, [30, 20, 10], "is missing"),
    ],
)
def test_the_tracker_is_a_hint(tmp_path, tracker, found, problem):
    write_checkpoints(tmp_path, 10, 20, 30)
    if tracker is not None:
        write_tracker(tmp_path, tracker)
    paths, said = candidates(tmp_path)
    assert numbers(paths) == found
    assert (said is None) if problem is None else (problem in said and TRACKER in said)


def test_a_new_folder_has_no_candidates_and_no_problem(tmp_path):
    assert candidates(tmp_path / "new") == ([], None)
    write_tracker(tmp_path, "10")
    assert candidates(tmp_path)[0] == []
    assert "names no checkpoint that is there: got '10'" in candidates(tmp_path)[1]


def test_a_kill_while_the_only_checkpoint_is_replaced_needs_no_tracker(tmp_path):
    checkpoint(tmp_path / ".iter_0000012.old.tmp", "old")
    checkpoint(tmp_path / ".iter_0000012.1700000000.tmp", "new")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000012"]
    assert (tmp_path / "iter_0000012" / "data").read_text() == "new"


def test_a_best_checkpoint_that_was_left_or_is_gone_is_forgotten(tmp_path, capsys):
    write_checkpoints(tmp_path, 50, 100)
    write_best(tmp_path, 50, "kl", 1.0)
    assert best_up_to(tmp_path, 60) == {"iteration": 50, "kl": 1.0}
    assert capsys.readouterr().err == ""
    for iteration, reason in [(100, "newer than 60"), (55, "is not there")]:
        write_best(tmp_path, iteration, "kl", 1.0)
        assert best_up_to(tmp_path, 60) is None
        assert reason in capsys.readouterr().err
        assert read_best(tmp_path) is None
    for text in ["", "[1]", "{}"]:
        (tmp_path / BEST_FILE).write_text(text)
        assert best_up_to(tmp_path, 60) is None
        assert "unreadable" in capsys.readouterr().err
