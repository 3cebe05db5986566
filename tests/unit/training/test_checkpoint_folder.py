"""A checkpoint that replaces one of the same name is there after a kill at any moment."""

from pathlib import Path

import pytest

from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.training import checkpoint_folder
from megatron_offgrpo.training.checkpoint_folder import remove_unfinished, take_place, write_tracker


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
