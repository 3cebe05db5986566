"""`--force` starts from an empty folder, or not at all."""

import pytest

from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.training import run_folder
from megatron_offgrpo.training.run_folder import clear


def write_run(folder):
    (folder / "checkpoints" / "iter_0000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / MANIFEST).write_text("{}")
    return folder


def test_a_folder_behind_a_link_is_emptied(tmp_path):
    write_run(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    clear(tmp_path / "link")
    assert list((tmp_path / "there").iterdir()) == []
    clear(tmp_path / "new")


def test_what_cannot_be_deleted_is_an_error_and_keeps_its_manifest(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder.shutil, "rmtree", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot delete what is there \(Permission denied\); remedy: delete .*by hand"
    ):
        clear(write_run(tmp_path / "run"))
    assert (tmp_path / "run" / MANIFEST).exists()
