"""Sixty-two kills with SIGKILL: every resume is exact, at the same layout to the bit, at another one to rounding."""

import subprocess
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training.run_folder import read_metrics
from tests.distributed.toy import toy_run, write_hf_model, write_toy_store
from tests.system.cli import command, environment, offgrpo
from tests.system.kills import MOMENTS, train_through_kills
from tests.system.test_two_processes import RECIPE, settings

EPOCHS = 120
MORE = (f"plan.epochs={EPOCHS}", "checkpoint.every_steps=1", "optimizer.lr=1e-4")
RUNS = {"qwen2": ("layout.ep=1", 50), "qwen3_moe": ("layout.ep=2", 12)}
"""Of a dense model and a mixture of experts on two processes: what else is set, and the kills."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For each model its inputs, and an undisturbed run on two processes."""
    whole = tmp_path_factory.mktemp("kills")
    for kind, (layout, _) in RUNS.items():
        folder = whole / kind
        store = write_toy_store(folder / "store")
        write_hf_model(folder / "hf", kind)
        hf_to_megatron(folder / "hf", folder / "megatron")
        run = toy_run(epochs=EPOCHS)
        save_plan(build_plan(store, run.plan, run.objective), folder / "plan")
        offgrpo("reference", RECIPE, *settings(folder, *MORE, layout), cwd=folder)
        offgrpo("train", RECIPE, *settings(folder, *MORE, layout), cwd=folder, timeout_seconds=900)
    return whole


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(output)]


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("kind", RUNS)
def test_killed_runs_end_bit_identical(kind, folder, tmp_path, record_property):
    folder, output = folder / kind, tmp_path / "train"
    layout, kills = RUNS[kind]
    arguments = ["train", RECIPE, *settings(folder, f"paths.output={output}", *MORE, layout)]
    moments = list(islice(cycle(MOMENTS), kills))
    done = train_through_kills(arguments, output, moments=moments, seed=0, cwd=tmp_path, timeout=5000)
    print(f"\n{kind}: {done}")
    record_property("kills", str(done))
    assert done.total == kills
    # A save is open beside most steps, so that few kills find the run at nothing but a step.
    assert set(done.seen) == set(MOMENTS), done
    exports = []
    for run, name in ((folder / "train", "a"), (output, "b")):
        megatron_to_hf(run / "checkpoints", folder / "hf", tmp_path / name)
        exports.append(load_file(tmp_path / name / "model.safetensors"))
    expected, got = exports
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert losses(output) == losses(folder / "train")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["layout.tp=2", "layout.pp=2"])
def test_another_layout_goes_on_with_the_same_batches(layout, folder, tmp_path):
    folder, output = folder / "qwen2", tmp_path / "train"
    more = (*MORE, "checkpoint.format=reshardable")
    arguments = ["train", RECIPE, *settings(folder, f"paths.output={output}", *more)]
    process = subprocess.Popen(command(*arguments), env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < EPOCHS:
        assert process.poll() is None
        time.sleep(0.01)
    for rank in psutil.Process(process.pid).children():
        rank.kill()
    process.wait(60)
    done = offgrpo(*arguments, "--set", layout, cwd=tmp_path, timeout_seconds=900)
    assert "resumed from" in done.stderr
    np.testing.assert_allclose(losses(output), losses(folder / "train"), rtol=1e-4)
