"""Damaged checkpoints, failing saves, bad steps, hanging ranks, and validation with its best checkpoint."""

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import megatron_to_hf
from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.config import LayoutConfig, with_values
from megatron_offgrpo.errors import CheckpointError, ConfigError, TrainingError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import load_plan, save_plan
from megatron_offgrpo.training import checkpoint_folder, loop, reference
from megatron_offgrpo.training.checkpoint_folder import latest, read_best, sha256_of
from megatron_offgrpo.training.run_folder import read_metrics
from megatron_offgrpo.training.student import Student
from tests.distributed.harness import REPOSITORY, run_ranks
from tests.distributed.toy import in_folder, toy_run, write_inputs, write_toy_store

NUM_STEPS = 4
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, place) -> Path:
    """Inputs with two validation groups, and an undisturbed run of four steps that saves after each."""
    folder = tmp_path_factory.mktemp("faults")
    run = with_values(in_folder(toy_run(epochs=2), folder), checkpoint={"every_steps": 1, "keep": 0})
    store = write_toy_store(folder / "store", num_groups=10, num_validation=2)
    write_inputs(run, folder, store)
    reference.compute_reference(run, place)
    assert loop.train(run, place) is True
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """The same run into a folder of its own."""
    base = in_folder(toy_run(epochs=2), prepared)
    base = with_values(base, checkpoint={"every_steps": 1, "keep": 0})
    return replace(base, paths=replace(base.paths, output=str(tmp_path / "train")))


def checkpoints(run) -> list[str]:
    return sorted(path.name for path in (Path(run.paths.output) / "checkpoints").glob("*iter_*"))


def weights(output: Path, prepared: Path, export: Path) -> dict[str, torch.Tensor]:
    megatron_to_hf(output / "checkpoints", prepared / "hf", export)
    return load_file(export / "model.safetensors")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_file_has_its_checksum(prepared):
    folder = prepared / "train" / "checkpoints" / "iter_0000002"
    recorded = read_manifest(folder, "checkpoint", remedy="").counts["file_sha256"]
    assert recorded == {path.name: sha256_of(path) for path in folder.iterdir() if path.name != "manifest.json"}
    assert {".metadata", "common.pt", "__0_0.distcp"} <= recorded.keys()


def test_a_damaged_checkpoint_is_passed_over_and_said(run, prepared, place, tmp_path, capfd):
    loop.train(run, place)
    folder = Path(run.paths.output) / "checkpoints"
    flip_a_bit(sorted((folder / "iter_0000004").glob("*.distcp"))[0])
    sorted((folder / "iter_0000003").glob("*.distcp"))[0].unlink()
    capfd.readouterr()
    assert loop.train(run, place) is True
    said = capfd.readouterr().err
    assert len(re.findall("passed over a checkpoint: .*iter_000000[34]", said)) == 2
    assert "resumed from" in said
    assert "iter_0000002" in said
    expected = weights(prepared / "train", prepared, tmp_path / "a")
    got = weights(Path(run.paths.output), prepared, tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [s["loss"] for s in read_metrics(Path(run.paths.output))] == [
        s["loss"] for s in read_metrics(prepared / "train")
    ]


def test_no_whole_checkpoint_left(run, place):
    loop.train(with_values(run, checkpoint={"every_steps": 0, "keep": 1}), place)
    flip_a_bit(sorted((Path(run.paths.output) / "checkpoints" / "iter_0000004").glob("*.distcp"))[0])
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left; got .*damaged checkpoint.*--force"):
        loop.train(run, place)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_leaves_the_older_checkpoints_and_training_goes_on(
    asynchronous, run, prepared, place, tmp_path, monkeypatch, capfd
):
    calls = iter([10**12, 10, 10**12, 10**12])
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: Usage(10**12, 0, next(calls)))
    loop.train(with_values(run, checkpoint={"asynchronous": asynchronous}), place)
    assert "no room for a checkpoint" in capfd.readouterr().err
    assert checkpoints(run) == ["iter_0000001", "iter_0000003", "iter_0000004"]
    expected, got = (
        weights(prepared / "train", prepared, tmp_path / "a"),
        weights(Path(run.paths.output), prepared, tmp_path / "b"),
    )
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_last_save_must_succeed(run, place, monkeypatch):
    calls = iter([10**12, 10**12, 10**12, 10])
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda path: Usage(10**12, 0, next(calls)))
    with pytest.raises(CheckpointError, match=r"no room for a checkpoint; expected [\d,]+ bytes free; got 10 bytes"):
        loop.train(run, place)
    assert checkpoints(run) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    monkeypatch.undo()
    assert loop.train(run, place) is True


def test_a_write_error_of_one_rank_is_an_error_of_all(prepared, tmp_path):
    run_ranks(
        "tests.distributed.fault_worker:save_with_a_file_size_limit",
        2,
        folder=str(prepared),
        output=str(tmp_path / "train"),
    )
    found = (tmp_path / "train" / "checkpoints").iterdir()
    assert sorted(path.name for path in found) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_rank_that_hangs_leaves_its_stacks(prepared, tmp_path):
    with pytest.raises(AssertionError) as rank:
        run_ranks("tests.distributed.fault_worker:hang", 1, folder=str(prepared), output=str(tmp_path / "train"))
    assert re.search(r"rank 0: error: no progress for 6 s in step 1; its stacks are in .*rank_0\.txt", str(rank.value))
    assert "(hung)" not in str(rank.value)
    stacks = (tmp_path / "train" / "stacks" / "rank_0.txt").read_text()
    assert "in sleep_in_step_1" in stacks
    assert "in train_step" not in stacks.split("Thread")[0]


def test_a_rank_that_waits_for_a_hanging_one_leaves_its_stacks_too(prepared, tmp_path):
    with pytest.raises(AssertionError) as ranks:
        run_ranks(
            "tests.distributed.fault_worker:hang_on_rank_1", 2, folder=str(prepared), output=str(tmp_path / "train")
        )
    assert len(re.findall(r"rank [01]: error: no progress for [\d.]+ s in step 1", str(ranks.value))) == 2
    waiting, hanging = ((tmp_path / "train" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2))
    assert "in sleep_in_step_1" in hanging
    assert "in sleep_in_step_1" not in waiting
    assert "in train_step" in waiting


def test_a_finished_run_leaves_no_stacks(prepared):
    assert list((prepared / "train" / "stacks").iterdir()) == []


def test_a_bad_step_is_skipped_or_halts(run, place, capfd):
    first = [step["grad_norm"] for step in read_metrics(Path(in_folder(toy_run(), run_folder(run)).paths.output))]
    bound = sorted(first)[-2] * 1.001
    spiky = with_values(run, fault={"max_grad_norm": bound})
    with pytest.raises(TrainingError, match=r"the largest in pack \d+ \(trajectories .*fault\.max_grad_norm"):
        loop.train(spiky, place)
    capfd.readouterr()
    skipping = with_values(spiky, fault={"bad_step": "skip", "max_bad_steps": 100})
    skipping = replace(skipping, paths=replace(skipping.paths, output=skipping.paths.output + "_skip"))
    assert loop.train(skipping, place) is True
    steps = read_metrics(Path(skipping.paths.output))
    skipped = [step["step"] for step in steps if step.get("skipped")]
    assert skipped[0] == first.index(max(first))
    assert "skipped step" in capfd.readouterr().err
    assert all(step["grad_norm"] <= bound for step in steps if not step.get("skipped"))


def run_folder(run) -> Path:
    return Path(run.paths.store).parent


def test_a_run_of_which_every_step_was_skipped_is_an_error(run, place, tmp_path):
    hopeless = with_values(run, fault={"max_grad_norm": 1e-12, "bad_step": "skip", "max_bad_steps": 100})
    with pytest.raises(TrainingError, match=r"nothing to save; got 4 steps skipped .*largest in pack .*remedy: look"):
        loop.train(hopeless, place)
    assert [line["skipped"] for line in read_metrics(Path(run.paths.output))] == [1.0] * NUM_STEPS


def test_a_sum_of_finite_gradients_that_is_not_finite_is_a_bad_step(run, place, monkeypatch, capfd):
    finite = iter([False])
    monkeypatch.setattr(Student, "gradients_are_finite", lambda student: next(finite, True))
    assert loop.train(with_values(run, fault={"bad_step": "skip"}), place) is True
    said = capfd.readouterr().err
    assert re.search(r"skipped step 0: the largest in pack \d+ \(trajectories .*each pack's gradient is finite", said)
    assert [line.get("skipped") for line in read_metrics(Path(run.paths.output))] == [1.0, None, None, None]


def test_the_pack_with_the_largest_gradient_is_named(run, place):
    plan = load_plan(run.paths.plan)
    bounded = with_values(run, fault={"max_grad_norm": 1e-12})
    with pytest.raises(TrainingError) as error:
        loop.train(bounded, place)
    pack = int(re.search(r"pack (\d+)", error.value.where).group(1))
    assert pack in plan.packs_of_step(0)


def test_validation_is_logged_and_the_best_checkpoint_kept(run, place):
    validated = with_values(
        run,
        validation={"every_steps": 1, "metric": "surrogate", "best": "highest"},
        checkpoint={"every_steps": 2, "keep": 1},
        optimizer={"lr": 1e-2},
    )
    loop.train(validated, place)
    steps = read_metrics(Path(run.paths.output))
    values = [step["validation_surrogate"] for step in steps]
    assert len(set(values)) == NUM_STEPS
    assert {"validation_kl", "validation_probability_margin", "validation_seconds"} <= steps[0].keys()
    best = values.index(max(values)) + 1
    assert read_best(Path(run.paths.output) / "checkpoints") == {"iteration": best, "surrogate": max(values)}
    assert set(checkpoints(run)) == {f"iter_{best:07d}", f"iter_{NUM_STEPS:07d}"}
    assert latest(Path(run.paths.output) / "checkpoints").name == f"iter_{NUM_STEPS:07d}"


def test_validation_does_not_change_training(run, prepared, place):
    loop.train(with_values(run, validation={"every_steps": 2, "keep_best": False}), place)
    losses = [step["loss"] for step in read_metrics(Path(run.paths.output))]
    assert losses == [step["loss"] for step in read_metrics(prepared / "train")]


def test_validation_without_groups_or_with_an_unknown_metric(run, place, tmp_path):
    with pytest.raises(ConfigError, match=r"validation\.metric: no such .*probability_margin.*got accuracy"):
        loop.train(with_values(run, validation={"every_steps": 1, "metric": "accuracy"}), place)
    write_toy_store(tmp_path / "store")
    bare = replace(run, paths=replace(run.paths, store=str(tmp_path / "store"), plan=str(tmp_path / "plan")))
    bare = with_values(bare, validation={"every_steps": 1}, objective={"beta": 0.0})
    from megatron_offgrpo.data.store import TrajectoryStore

    save_plan(build_plan(TrajectoryStore.open(tmp_path / "store"), bare.plan, bare.objective), bare.paths.plan)
    with pytest.raises(ConfigError, match=r"no group apart for validation.*--validation-share"):
        loop.train(bare, place)


def test_every_logged_metric_stands_in_the_table_of_the_docs(run, place):
    loop.train(with_values(run, validation={"every_steps": 4, "keep_best": False}), place)
    metrics = (REPOSITORY / "docs" / "objective.md").read_text().split("\n## Metrics")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in metrics.splitlines() if line.startswith("|")]
    table = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    lines = read_metrics(Path(run.paths.output))
    logged = {name for line in lines for name in line}
    assert {"forward_backward_seconds", "validation_loss", "model_flops_per_second"} < logged
    assert {name.removeprefix("validation_") for name in logged} - {"mfu"} <= table
    for line in lines:
        stages = [line[f"{stage}_seconds"] for stage in ("batch", "forward_backward", "optimizer")]
        assert min(stages) > 0
        assert sum(stages) == pytest.approx(line["seconds"])
        assert line["model_flops_per_second"] > 0
