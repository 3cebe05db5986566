"""The study end to end at a very small size: an objective added as docs/objective.md says, two arms, then a resume."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from recipes.study import ARMS, Arm, bias
from tools.study import __main__ as command
from tools.study import runner, runs
from tools.study.models import ModelSize
from tools.study.runs import RESULT
from tools.study.settings import StudySettings

SIZE = ModelSize(hidden=32, layers=1, steps=120, batch=16, lr=0.03)


def squared(logp, mu, advantage, *, power=2.0):
    """-A * pi^power: the one function of an added objective."""
    return -advantage * torch.exp(power * logp)


def squared_objective():
    """Its recipe line."""
    return replace(bias(), surrogate=partial(squared, power=3.0), beta=0.0)


def squared_arm():
    """What `--arm` names."""
    return Arm("squared", "an added objective", squared_objective)


def run(settings: StudySettings, monkeypatch, arm: str = "tests.system.test_study:squared_arm") -> int:
    """The command line, at the small size and with the base student alone beside the added arm."""
    base = next(arm for arm in ARMS if arm.name == "base")
    monkeypatch.setattr(command, "plan_of", lambda which, root: (settings, [base]))
    return command.main(["core", "--root", str(settings.root), "--workers", "0", "--arm", arm])


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> StudySettings:
    return StudySettings(
        root=tmp_path_factory.mktemp("study"), groups=16, pool=16, all_positive_percent=None, solutions=4,
        test=8, skills=4, validation=4, validation_skills=4, seeds=(0,), lrs=(1e-3,), extensions=0, size=SIZE,
    )  # fmt: skip


def results(settings: StudySettings) -> dict[str, dict]:
    """By run, without what the clock says."""
    found = {
        path.parent.parent.name + "/" + path.parent.name: path for path in settings.root.glob(f"runs/*/*/{RESULT}")
    }
    loaded = {name: json.loads(path.read_text("utf-8")) for name, path in found.items()}
    return {
        name: {field: value for field, value in one.items() if "seconds" not in field and field != "curve"}
        for name, one in loaded.items()
    }


def test_an_added_objective_runs_resumes_and_is_reported(settings, monkeypatch):
    torch.set_num_threads(1)
    assert run(settings, monkeypatch) == 0
    first = results(settings)
    assert first.keys() == {"base/sweep", "base/seed0", "squared/lr0.001-sweep", "squared/lr0.001-seed0"}
    page = (settings.root / "study.html").read_text("utf-8")
    assert "an added objective" in page
    # A finished run is taken as it is; one whose result is missing is done again, with the same figures.
    lost = settings.root / "runs" / "squared" / "lr0.001-seed0" / RESULT
    lost.unlink()
    done = []
    monkeypatch.setattr(runner, "do", lambda job, *rest: done.append(job.arm.name) or runs.do(job, *rest))
    assert run(settings, monkeypatch) == 0
    assert done == ["squared"]
    assert results(settings) == first


def base_again():
    return Arm("base", "another of the name", squared_objective)


def no_arm():
    return "squared"


@pytest.mark.parametrize(("arm", "error"), [("base_again", "two arms of one name"), ("no_arm", "not an arm")])
def test_mistakes(arm, error, settings, monkeypatch, capsys):
    assert run(settings, monkeypatch, f"tests.system.test_study:{arm}") == 2
    assert error in capsys.readouterr().err
