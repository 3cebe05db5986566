"""Weights & Biases through a module in its place: what it is sent, and what its failures do."""

import sys
import types

import pytest

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import TrackingConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.training import tracking
from megatron_offgrpo.training.run_folder import MetricsLog, read_metrics
from megatron_offgrpo.training.tracking import Tracking, require_tracking

PROJECT = TrackingConfig(wandb_project="project")
MANIFEST = Manifest("run", "f", config={"name": "toy", "plan": {"epochs": 2}})


class FakeWandb(types.ModuleType):
    """Records calls; `problems` are raised by one call of `init` after the other."""

    def __init__(self, problems=()):
        super().__init__("wandb")
        self.calls, self.problems, self.broken = [], list(problems), False
        error = type("Error", (Exception,), {})
        usage = type("UsageError", (error,), {})
        communication = type("CommError", (error,), {})
        authentication = type("AuthenticationError", (communication,), {})
        self.errors = types.SimpleNamespace(
            Error=error, UsageError=usage, CommError=communication, AuthenticationError=authentication
        )

    def Settings(self, **values):
        return values

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        if self.problems:
            raise getattr(self.errors, self.problems.pop(0))("no route to the server")
        return self

    def teardown(self):
        self.calls.append(("teardown",))

    def define_metric(self, name, step_metric):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, values):
        if self.broken:
            raise BrokenPipeError("gone")
        self.calls.append(("log", values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.fixture
def fake(monkeypatch):
    def install(*problems):
        module = FakeWandb(problems)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def test_every_line_of_the_log_is_sent_and_a_resumed_run_is_the_same_one(fake, tmp_path):
    wandb = fake()
    for first in (0, 2):
        with Tracking(tmp_path, PROJECT, MANIFEST) as sent, MetricsLog(tmp_path, first, sent) as log:
            log.write({"step": first, "loss": 1.0})
    starts = [call[1] for call in wandb.calls if call[0] == "init"]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    assert starts[0]["id"] == (tmp_path / tracking.RUN_ID_FILE).read_text().strip()
    assert (starts[0]["project"], starts[0]["name"], starts[0]["resume"]) == ("project", "toy", "allow")
    assert starts[0]["config"] == MANIFEST.config
    assert starts[0]["mode"] is None
    sent = [call[1] for call in wandb.calls if call[0] == "log"]
    assert sent == read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert ("define_metric", "*", "step") in wandb.calls
    assert wandb.calls[-1] == ("finish", 0)


def test_another_folder_is_another_run(fake, tmp_path):
    wandb = fake()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Tracking(tmp_path / name, PROJECT, MANIFEST)
    ids = {call[1]["id"] for call in wandb.calls if call[0] == "init"}
    assert len(ids) == 2


def test_without_a_project_nothing_is_imported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_tracking(TrackingConfig())
    with Tracking(tmp_path, TrackingConfig(), MANIFEST) as sent:
        sent.write({"step": 0})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_a_mistake_with_its_remedy(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_project: the package wandb is not installed.*\[tracking\]"):
        require_tracking(PROJECT)


def test_a_server_that_does_not_answer_leaves_the_run_on_disk(fake, tmp_path, capfd):
    wandb = fake("CommError")
    with Tracking(tmp_path, PROJECT, MANIFEST) as sent:
        sent.write({"step": 0})
    assert [call[0] for call in wandb.calls] == ["init", "teardown", "init", "define_metric", "log", "finish"]
    assert [call[1]["mode"] for call in wandb.calls if call[0] == "init"] == [None, "offline"]
    assert "W&B does not answer (no route to the server); the run is kept in" in capfd.readouterr().err


@pytest.mark.parametrize("problem", ["UsageError", "AuthenticationError"])
def test_what_the_user_can_mend_is_an_error(problem, fake, tmp_path):
    fake(problem)
    with pytest.raises(ConfigError, match=r"W&B refuses .*wandb login"):
        Tracking(tmp_path, PROJECT, MANIFEST)


def test_a_failure_in_the_middle_is_said_once_and_training_goes_on(fake, tmp_path, capfd):
    wandb = fake()
    with Tracking(tmp_path, PROJECT, MANIFEST) as sent, MetricsLog(tmp_path, 0, sent) as log:
        wandb.broken = True
        log.write({"step": 0})
        log.write({"step": 1})
    assert capfd.readouterr().err.count("W&B has failed (gone); training goes on without it") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_run_that_fails_is_marked_as_failed(fake, tmp_path):
    wandb = fake()
    with pytest.raises(ValueError, match="bad"), Tracking(tmp_path, PROJECT, MANIFEST):
        raise ValueError("bad")
    assert wandb.calls[-1] == ("finish", 1)


def test_lines_from_the_first_step_on_are_computed_again(tmp_path):
    for first in (0, 1):
        with MetricsLog(tmp_path, first, Tracking(tmp_path, TrackingConfig(), MANIFEST)) as log:
            for step in range(first, 3):
                log.write({"step": step, "start": first})
    assert read_metrics(tmp_path) == [{"step": step, "start": min(step, 1)} for step in range(3)]


def test_other_ranks_write_nothing(tmp_path):
    tracked = Tracking(tmp_path, TrackingConfig(), MANIFEST)
    with MetricsLog(tmp_path, 0, tracked, enabled=False) as log:
        log.write({"step": 0})
    assert list(tmp_path.iterdir()) == []
