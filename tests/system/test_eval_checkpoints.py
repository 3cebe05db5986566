"""`offgrpo eval --checkpoints`: each checkpoint of a run, those that are saved meanwhile included."""

import json
import shutil
import subprocess
import time

import pytest

from checkpoints_conversion import hf_to_megatron
from megatron_offgrpo.artifacts import Manifest, write_manifest
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.evaluation import checkpoints
from tests.system.cli import command, environment, offgrpo
from tools.base_student import SHIPPED
from tools.word_problems import make_benchmark, write_jsonl


@pytest.fixture
def run(tmp_path):
    """A run of three steps with its first checkpoint."""
    write_jsonl(tmp_path / "test.jsonl", make_benchmark(4, "benchmark", 0))
    train = tmp_path / "train"
    hf_to_megatron(SHIPPED, train / "checkpoints")
    (train / "checkpoints" / "release").rename(train / "checkpoints" / "iter_0000001")
    write_manifest(train, Manifest("run", "f", counts={"steps": 3}))
    return tmp_path


def evaluation(run, *more):
    options = ("--model", SHIPPED, "--checkpoints", run / "train" / "checkpoints", "--benchmark", run / "test.jsonl")
    options += ("--output", run / "eval_checkpoints", "--backend", "hf", "--samples", "1", "--max-tokens", "64")
    return ["eval", *options, *more]


def test_follows_a_run_to_its_last_step(run):
    folder, output = run / "train" / "checkpoints", run / "eval_checkpoints"
    log = (run / "log").open("w")
    process = subprocess.Popen(
        command(*evaluation(run, "--follow")), env=environment(), cwd=run, stdout=log, stderr=log
    )
    deadline = time.monotonic() + 200
    while not (output / "iter_0000001" / "metrics.json").exists():
        assert process.poll() is None, (run / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for name in ("iter_0000002", "iter_0000003"):
        shutil.copytree(folder / "iter_0000001", folder / ".new")
        (folder / ".new").rename(folder / name)
    assert process.wait(200) == 0, (run / "log").read_text()
    assert sorted(path.name for path in output.iterdir()) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert all(json.loads((path / "metrics.json").read_text())["problems"] == 4 for path in output.iterdir())
    text = (run / "log").read_text()
    assert [name in text for name in ("iter_0000001:", "iter_0000002:", "iter_0000003:")] == [True] * 3
    # A checkpoint that has been evaluated is not sampled again.
    again = offgrpo(*evaluation(run), cwd=run)
    assert again.stderr.count("reused") == 3


def test_a_checkpoint_that_training_removes_is_left_out(run, monkeypatch, capsys):
    folder = run / "train" / "checkpoints"
    shutil.copytree(folder / "iter_0000001", folder / "iter_0000002")
    convert = checkpoints.megatron_to_hf

    def removed(megatron, *rest, iteration, **more):
        if iteration == 1:
            shutil.rmtree(megatron / "iter_0000001")
        return convert(megatron, *rest, iteration=iteration, **more)

    monkeypatch.setattr(checkpoints, "megatron_to_hf", removed)
    found = [name for name, model in checkpoints.exported(folder, SHIPPED, run / "out", follow=False)]
    assert found == ["iter_0000002"]
    assert "training removed it" in capsys.readouterr().err


def test_damage_is_not_taken_for_removal(run):
    folder = run / "train" / "checkpoints"
    (folder / "iter_0000001" / ".metadata").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        list(checkpoints.exported(folder, SHIPPED, run / "out", follow=False))


def test_mistakes(run):
    done = offgrpo(*evaluation(run, "--shard", "0/2"), cwd=run, expect=1)
    assert "--shard" in done.stderr
    shutil.rmtree(run / "train" / "checkpoints" / "iter_0000001")
    done = offgrpo(*evaluation(run), cwd=run, expect=1)
    assert "no checkpoint of a training run" in done.stderr
