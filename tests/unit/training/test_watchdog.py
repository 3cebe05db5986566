"""Where the stacks of a hanging rank lie, and that its process group waits longer than its watchdog."""

import os
from datetime import timedelta

import pytest

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.watchdog import FOLDER, Watchdog


def test_the_stacks_of_an_earlier_attempt_are_kept(tmp_path):
    file = tmp_path / FOLDER / "rank_3.txt"
    with Watchdog(tmp_path, 3, 100.0):
        file.write_text("stacks of a hang")
    assert [path.name for path in file.parent.iterdir()] == ["rank_3.txt"]
    os.utime(file, (0, 1_700_000_000))
    for _ in range(2):
        with Watchdog(tmp_path, 3, 100.0):
            assert file.read_text() == ""
    (kept,) = file.parent.iterdir()
    assert kept.name == "rank_3_2023-11-14T22-13-20.txt"
    assert kept.read_text() == "stacks of a hang"


def test_without_a_file_for_the_stacks_the_run_goes_on(tmp_path, capfd):
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with Watchdog(tmp_path, 0, 100.0) as watchdog:
        watchdog.alive("step 1")
    assert "rank_0.txt cannot be opened" in capfd.readouterr().err
    assert (tmp_path / FOLDER).read_text()


@pytest.mark.parametrize(("fault_seconds", "minutes"), [(3.0, 30), (1500.0, 30), (1800.0, 35), (7201.0, 126)])
def test_every_group_waits_longer_than_the_watchdog(fault_seconds, minutes, monkeypatch):
    given = []
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda *_, timeout, **__: given.append(timeout))
    from megatron.core import parallel_state

    def stop(*, distributed_timeout_minutes, **_):
        given.append(timedelta(minutes=distributed_timeout_minutes))
        raise InterruptedError

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", stop)
    with pytest.raises(InterruptedError):
        runtime.start(LayoutConfig(), seed=0, fault_seconds=fault_seconds)
    assert given == [timedelta(minutes=minutes)] * 2
