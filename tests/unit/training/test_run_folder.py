"""metrics.jsonl and TensorBoard's events on a disk that is full for a while, and after a power loss."""

import json
import resource
from contextlib import ExitStack, contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import TrackingConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.outcome import VARIABLE, report_step
from megatron_offgrpo.training.run_folder import METRICS_FILE, MetricsLog, open_run, read_metrics
from megatron_offgrpo.training.tracking import Tracking

MANIFEST = Manifest("run", "f", config={"name": "toy"})


def log(folder, first_step=0):
    return MetricsLog(folder, first_step, Tracking(folder, TrackingConfig(), MANIFEST))


def values(step):
    return {"step": step, "loss": step + 0.5}


def curve(folder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@contextmanager
def full_disk(room=0):
    """No file may have more than `room` bytes; pytest's own output may be a file, so not beyond the `with`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 24, 37, 80], ids=lambda room: f"room_for_{room}_bytes")
def test_a_full_disk_is_said_once_and_its_steps_are_written_when_there_is_room(room, tmp_path, capsys):
    with log(tmp_path) as metrics:
        with full_disk(room):
            for step in range(4):
                metrics.write(values(step))
        metrics.write(values(4))
        assert read_metrics(tmp_path) == [values(step) for step in range(5)]
    assert curve(tmp_path) == [(step, step + 0.5) for step in range(5)]
    said = capsys.readouterr().err
    assert said.count(f"{METRICS_FILE} cannot be written (File too large); training goes on") == 1
    assert "Traceback" not in said
    assert "lacks" not in said


def test_a_disk_that_stays_full_leaves_whole_lines_and_says_how_many_are_lost(tmp_path, capsys):
    with full_disk(40), log(tmp_path) as metrics:
        for step in range(3):
            metrics.write(values(step))
    assert read_metrics(tmp_path) == [values(0)]
    assert f"{METRICS_FILE} lacks its last 2 records (File too large)" in capsys.readouterr().err
    with log(tmp_path, 3) as metrics:
        metrics.write(values(3))
    assert read_metrics(tmp_path) == [values(0), values(3)]
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_a_resume_on_a_full_disk_drops_the_lines_that_are_computed_again(tmp_path):
    with log(tmp_path) as metrics:
        for step in range(3):
            metrics.write(values(step))
    with ExitStack() as entered, full_disk():
        metrics = entered.enter_context(log(tmp_path, 1))
        assert read_metrics(tmp_path) == [values(0)]
        metrics.write({"step": 1, "loss": 7.0})
    assert read_metrics(tmp_path) == [values(0), {"step": 1, "loss": 7.0}]


def test_a_folder_that_comes_back_gets_what_it_missed(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with log(folder) as metrics:
        metrics.write(values(0))
        folder.rename(tmp_path / "away")
        metrics.write(values(1))
        assert not folder.exists()
        (tmp_path / "away").rename(folder)
        metrics.write(values(2))
    assert read_metrics(folder) == [values(step) for step in range(3)]
    assert curve(folder) == [(step, step + 0.5) for step in range(3)]
    assert capsys.readouterr().err.count("cannot be written (No such file or directory)") == 2


def test_a_file_that_was_deleted_begins_anew(tmp_path):
    with log(tmp_path) as metrics:
        metrics.write(values(0))
        (tmp_path / METRICS_FILE).unlink()
        metrics.write(values(1))
    assert (tmp_path / METRICS_FILE).read_bytes() == json.dumps(values(1)).encode() + b"\n"


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\0" * 100 + b"\n", b'{"step": 2, "lo', b'{"st\n', b"\xff\n", b"[]\n"])
def test_a_broken_end_is_cut_off_and_said(tail, tmp_path, capsys):
    with log(tmp_path) as metrics:
        for step in range(2):
            metrics.write(values(step))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + tail)
    assert read_metrics(tmp_path) == [values(0), values(1)]
    assert capsys.readouterr().err == ""
    with log(tmp_path, 2) as metrics:
        metrics.write(values(2))
    assert read_metrics(tmp_path) == [values(step) for step in range(3)]
    assert capsys.readouterr().err == f"train: {path}:3: cut off a broken line\n"


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 0}\n\0\0\0\n{"step": 2}\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: a broken line; .*: delete this line"), log(tmp_path, 4):
        raise AssertionError("entered")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)
    assert path.read_bytes().count(b"\n") == 4


def test_a_broken_line_among_those_that_are_computed_again_does_not_matter(tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 0}\n{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with log(tmp_path, 1) as metrics:
        metrics.write({"step": 1})
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]


def test_tensorboard_hides_steps_that_are_computed_again(tmp_path):
    for first, loss in ((0, 1.0), (1, 2.0)):
        with log(tmp_path, first) as metrics:
            for step in range(first, 3):
                metrics.write({"step": step, "loss": loss})
    assert curve(tmp_path) == [(0, 1.0), (1, 2.0), (2, 2.0)]


def test_a_run_does_not_begin_where_nothing_can_be_written(tmp_path):
    message = r"the output folder cannot be written \(File too large\).*space, quota"
    with full_disk(), pytest.raises(ConfigError, match=message):
        open_run(tmp_path / "train", MANIFEST, start_over="offgrpo train toy --force")


def test_an_outcome_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome"))
    with full_disk():
        report_step(3, 4)
    assert "does not learn of: step 3 4" in capsys.readouterr().err
