"""`offgrpo reference` and `offgrpo train` started plainly on two processes: signals, resume, other layouts."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from tests.distributed.toy import in_folder, toy_run, write_hf_model, write_toy_store
from tests.system.cli import command, environment, offgrpo
from tests.system.kills import train_through_kills

RECIPE = "tests.distributed.toy:recipe"
STEPS = 12


def settings(folder: Path, *more: str) -> list[str]:
    """--set arguments that put the toy run into `folder`, on two data-parallel processes."""
    paths = to_dict(in_folder(toy_run(), folder).paths)
    values = [f"paths.{name}={value}" for name, value in paths.items()]
    values += ["layout.processes=2", "plan.epochs=6", "checkpoint.every_steps=0", *more]
    return [argument for value in values for argument in ("--set", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Inputs, a reference made on two processes, and an undisturbed run of twelve steps."""
    folder = tmp_path_factory.mktemp("two")
    store = write_toy_store(folder / "store")
    write_hf_model(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    run = toy_run(epochs=6)
    save_plan(build_plan(store, run.plan, run.objective), folder / "plan")
    for stage in ("reference", "train"):
        said = offgrpo(stage, RECIPE, *settings(folder), cwd=folder)
        (folder / f"{stage}.txt").write_text(said.stdout + said.stderr)
    return folder


def weights(folder: Path, output: Path, export: Path) -> dict[str, torch.Tensor]:
    megatron_to_hf(output / "checkpoints", folder / "hf", export)
    return load_file(export / "model.safetensors")


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["reference", "train"])
def test_nothing_of_a_library_reaches_the_terminal(folder, stage):
    lines = (folder / f"{stage}.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith(f"{stage}: ")] == []


def test_step_0_equals_the_reference_to_the_bit(folder):
    steps = metrics(folder / "train")
    assert len(steps) == STEPS
    assert steps[0]["max_abs_logp_difference"] == 0.0


def test_a_signal_saves_and_exits_0_and_the_rest_is_bit_identical(folder, tmp_path):
    output = tmp_path / "train"
    arguments = ["train", RECIPE, *settings(folder, f"paths.output={output}")]
    process = subprocess.Popen(command(*arguments), env=environment(), cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not metrics_written(output):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    saved = int((output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < STEPS
    assert f"stopped by a signal after step {saved} of {STEPS}" in errors
    offgrpo(*arguments, cwd=folder)
    expected, got = weights(folder, folder / "train", tmp_path / "a"), weights(folder, output, tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [step["loss"] for step in metrics(output)] == [step["loss"] for step in metrics(folder / "train")]


def test_killed_ranks_leave_a_run_that_goes_on_bit_identical(folder, tmp_path):
    """One kill here; `make soak` has fifty."""
    output = tmp_path / "train"
    arguments = ["train", RECIPE, *settings(folder, f"paths.output={output}", "checkpoint.every_steps=1")]
    kills = train_through_kills(arguments, output, moments=["saving"], seed=1, cwd=tmp_path, timeout=240)
    assert (kills.starts, kills.total) == (2, 1)
    expected, got = weights(folder, folder / "train", tmp_path / "a"), weights(folder, output, tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [step["loss"] for step in metrics(output)] == [step["loss"] for step in metrics(folder / "train")]


def metrics_written(output: Path) -> bool:
    return (output / "metrics.jsonl").read_text().count("\n") >= 1


def test_another_layout_reproduces_the_reference_within_rounding(folder, tmp_path):
    output = tmp_path / "train"
    layout = ["layout.tp=2", "layout.sequence_parallel=true", f"paths.output={output}"]
    offgrpo("train", RECIPE, *settings(folder, *layout), cwd=folder)
    steps = metrics(output)
    assert 0.0 <= steps[0]["max_abs_logp_difference"] <= 1e-5
    one = [step["loss"] for step in metrics(folder / "train")]
    np.testing.assert_allclose([step["loss"] for step in steps], one, rtol=1e-4)


def test_an_error_of_all_ranks_is_said_once_without_a_traceback(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    done = offgrpo("train", RECIPE, *settings(folder, f"paths.plan={tmp_path / 'nothing'}"), cwd=folder, expect=1)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "no finished plan here" in lines[0]
    assert "offgrpo plan" in lines[0]


def test_processes_that_do_not_fit_the_layout(folder):
    done = offgrpo("train", RECIPE, *settings(folder, "layout.tp=4"), cwd=folder, expect=1)
    assert "a multiple of tp*pp*cp = 4*1*1 = 4; got 2 processes" in done.stderr
    assert "Traceback" not in done.stderr
