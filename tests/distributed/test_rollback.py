"""Bad steps in a row: back to the newest checkpoint, and on without the trajectories that they name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.config import LayoutConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore, write_store
from megatron_offgrpo.errors import CheckpointError, DataError, TrainingError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training import loop
from megatron_offgrpo.training.quarantine import QUARANTINE_FILE, Quarantine, read_quarantine
from megatron_offgrpo.training.run_folder import read_metrics
from tests.distributed.harness import run_ranks
from tests.distributed.toy import in_folder, toy_run, write_hf_model, write_toy_store

POISONED = (17, 27)
"""In the groups 4 and 6: of four steps of two groups each, they make the third and the fourth bad."""


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the run's own catches it."""


def base_run():
    """Four steps; no reference is read, so that stores can be compared."""
    run = toy_run(groups_per_step=2, shuffle=False, max_pack_tokens=64)
    return with_values(
        run,
        objective={"beta": 0.0},
        checkpoint={"every_steps": 1, "keep": 0},
        fault={"bad_step": "skip", "max_bad_steps": 2},
    )


def write_edited_store(path: Path, toy: TrajectoryStore, *, poisoned=(), without=()) -> TrajectoryStore:
    """The toy store; behaviour log-probs of `poisoned` let the ratio overflow, `without` do not come into it."""
    rows = []
    for group in range(toy.num_groups):
        row = toy.row(group)
        kept = [member for member in range(4) if 4 * group + member not in without]
        if not kept:
            continue
        changes = {
            name: [value[member] for member in kept]
            for name, value in vars(row).items()
            if isinstance(value, list) and name != "prompt_ids"
        }
        for place, member in enumerate(kept):
            if 4 * group + member in poisoned:
                changes["behaviour_logprobs"][place] = [-200.0] * len(row.response_ids[member])
        rows.append(replace(row, **changes))
    return write_store(path, rows, tokenizer_fingerprint="toy", inputs={}, counts={}, config={})


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, place) -> Path:
    """Inputs with two poisoned trajectories, and a run that has rolled back."""
    folder = tmp_path_factory.mktemp("rollback")
    toy = write_toy_store(folder / "toy")
    store = write_edited_store(folder / "store", toy, poisoned=POISONED)
    write_hf_model(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    run = in_folder(base_run(), folder)
    save_plan(build_plan(store, run.plan, run.objective), run.paths.plan)
    assert loop.train(run, place) is True
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """The same run into a folder of its own."""
    run = in_folder(base_run(), prepared)
    return replace(run, paths=replace(run.paths, output=str(tmp_path / "train")))


def weights(output: Path, folder: Path, export: Path) -> dict[str, torch.Tensor]:
    megatron_to_hf(output / "checkpoints", folder / "hf", export)
    return load_file(export / "model.safetensors")


def require_same(output: Path, prepared: Path, export: Path) -> None:
    """Weights, losses and quarantine to the bit."""
    expected, got = (weights(one, prepared, export / name) for one, name in ((prepared / "train", "a"), (output, "b")))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    one, other = (read_metrics(folder) for folder in (prepared / "train", output))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert (prepared / "train" / QUARANTINE_FILE).read_text() == (output / QUARANTINE_FILE).read_text()


def quarantined(folder: Path) -> Quarantine:
    return read_quarantine(folder / "train", TrajectoryStore.open(folder / "store"))


def test_two_bad_steps_in_a_row_put_their_packs_in_quarantine(prepared):
    (bad_steps,) = quarantined(prepared).rollbacks
    assert [step.step for step in bad_steps] == [2, 3]
    plan = build_plan(TrajectoryStore.open(prepared / "store"), base_run().plan, base_run().objective)
    for step, poisoned in zip(bad_steps, POISONED, strict=True):
        assert step.pack in plan.packs_of_step(step.step)
        assert list(step.trajectories) == sorted(plan.trajectory[plan.entries(step.pack)].tolist())
        assert poisoned in step.trajectories
        assert "NaN or inf" in step.reason
    text = json.loads((prepared / "train" / QUARANTINE_FILE).read_text())
    assert text["trajectories"] == sorted({*bad_steps[0].trajectories, *bad_steps[1].trajectories})
    assert text["rollbacks"][0]["bad_steps"][0]["groups"] == [f"g{index // 4}" for index in bad_steps[0].trajectories]
    lines = read_metrics(prepared / "train")
    assert [line["step"] for line in lines] == list(range(4))
    assert not any("skipped" in line for line in lines)
    missing = [8 - int(line["trajectories"]) for line in lines]
    assert missing == [0, 0, *(len(step.trajectories) for step in bad_steps)]
    made_from = read_manifest(prepared / "train" / "checkpoints" / "iter_0000004", "checkpoint", remedy="").inputs
    before = read_manifest(prepared / "train" / "checkpoints" / "iter_0000002", "checkpoint", remedy="").inputs
    assert made_from.keys() - before.keys() == {"quarantine"}


def test_a_rollback_in_the_process_is_a_new_process_that_finds_checkpoint_and_quarantine(
    prepared, run, place, tmp_path
):
    output = Path(run.paths.output)
    shutil.copytree(prepared / "train", output)
    for iteration in (3, 4):
        shutil.rmtree(output / "checkpoints" / f"iter_{iteration:07d}")
    (output / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert loop.train(run, place) is True
    require_same(output, prepared, tmp_path)


@pytest.mark.parametrize("moment", ["write_quarantine", "gc.collect"], ids=["before", "after"])
def test_a_kill_before_and_after_the_list_is_written(moment, prepared, run, place, tmp_path, monkeypatch):
    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_offgrpo.training.loop.{moment}", kill)
        with pytest.raises(Killed):
            loop.train(run, place)
    assert (Path(run.paths.output) / QUARANTINE_FILE).exists() is (moment == "gc.collect")
    assert loop.train(run, place) is True
    require_same(Path(run.paths.output), prepared, tmp_path)


def test_a_stop_between_bad_steps_saves_the_weights_before_the_first(prepared, run, place, tmp_path, monkeypatch):
    class StopAfterStep2(loop.StopRequest):
        calls = 0

        def agreed(self, place):
            self.calls += 1
            return self.calls == 3

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopAfterStep2)
        assert loop.train(run, place) is False
    found = sorted(path.name for path in (Path(run.paths.output) / "checkpoints").glob("iter_*"))
    assert found == ["iter_0000001", "iter_0000002"]
    assert [line["step"] for line in read_metrics(Path(run.paths.output))] == [0, 1, 2]
    assert loop.train(run, place) is True
    require_same(Path(run.paths.output), prepared, tmp_path)


def test_back_to_the_initial_weights_equals_a_store_that_never_had_them(prepared, run, place, tmp_path):
    """No checkpoint before the bad steps: every step is computed without their packs, as if they had never been there.

    All of group 6 may be gone: the step that it shares with group 7 is the last one, so that no step has other groups.
    """
    run = with_values(run, checkpoint={"every_steps": 0}, fault={"max_bad_steps": 1})
    assert loop.train(run, place) is True
    left_out = read_quarantine(Path(run.paths.output), TrajectoryStore.open(run.paths.store)).trajectories
    assert set(POISONED) < set(left_out)
    bare = replace(in_folder(base_run(), tmp_path), paths=replace(run.paths, store=str(tmp_path / "store")))
    toy = TrajectoryStore.open(prepared / "toy")
    store = write_edited_store(tmp_path / "store", toy, without=left_out)
    paths = replace(bare.paths, plan=str(tmp_path / "plan"), output=str(tmp_path / "bare"))
    bare = replace(bare, paths=paths)
    save_plan(build_plan(store, bare.plan, bare.objective), paths.plan)
    assert loop.train(bare, place) is True
    expected = weights(tmp_path / "bare", prepared, tmp_path / "a")
    got = weights(Path(run.paths.output), prepared, tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_bad_steps_at_the_end_of_the_plan_are_skipped(run, place, monkeypatch):
    """Two of them, where three in a row would be too many: the last checkpoint has the weights of the second one."""
    saved, save = [], loop.checkpoint.CheckpointWriter.save

    def note(writer, student, iteration, *arguments):
        saved.append(iteration)
        save(writer, student, iteration, *arguments)

    monkeypatch.setattr(loop.checkpoint.CheckpointWriter, "save", note)
    assert loop.train(with_values(run, fault={"max_bad_steps": 3}), place) is True
    folder = Path(run.paths.output)
    found = sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))
    assert found == ["iter_0000001", "iter_0000002", "iter_0000004"]
    assert saved == [1, 2, 4]
    assert [line.get("skipped") for line in read_metrics(folder)] == [None, None, 1.0, 1.0]
    assert not (folder / QUARANTINE_FILE).exists()


def test_too_many_rollbacks_end_the_run(run, place, capfd):
    hopeless = with_values(run, fault={"max_grad_norm": 1e-12, "max_bad_steps": 2, "max_rollbacks": 1})
    with pytest.raises(
        TrainingError, match=r"2 bad steps in a row after 1 rollbacks \(fault\.max_rollbacks\); the last"
    ):
        loop.train(hopeless, place)
    assert "rolling back; in quarantine from now on: trajectories [" in capfd.readouterr().err


def test_no_rollback_to_checkpoints_that_have_gone(run, place, monkeypatch):
    """It would start over from the initial weights, and perhaps on the disk of this node."""
    output, step, num_steps = Path(run.paths.output), loop.train_step, []

    def step_before_an_unmount(*arguments):
        num_steps.append(1)
        if len(num_steps) == 4:
            shutil.rmtree(output / "checkpoints")
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", step_before_an_unmount)
    with pytest.raises(CheckpointError, match="checkpoints: the folder of the checkpoints has gone; remedy: mount"):
        loop.train(with_values(run, checkpoint={"asynchronous": False}), place)
    assert len(num_steps) == 4
    assert not (output / "checkpoints").exists()
    assert not (output / QUARANTINE_FILE).exists()


def test_a_step_of_which_nothing_is_left_changes_nothing(prepared, run, place):
    output = Path(run.paths.output)
    output.mkdir()
    value = json.loads((prepared / "train" / QUARANTINE_FILE).read_text())
    value["rollbacks"][0]["bad_steps"][0]["trajectories"] = list(range(8, 16))
    value["rollbacks"][0]["bad_steps"][1]["trajectories"] = list(range(16, 32))
    (output / QUARANTINE_FILE).write_text(json.dumps(value))
    assert loop.train(run, place) is True
    lines = read_metrics(output)
    assert [line["trajectories"] for line in lines] == [8, 0, 0, 0]
    assert [line["step"] for line in lines] == list(range(4))
    assert (output / "checkpoints" / "iter_0000004").is_dir()


def test_two_ranks_roll_back_together(prepared, tmp_path):
    run_ranks("tests.distributed.fault_worker:roll_back", 2, folder=str(prepared), output=str(tmp_path / "train"))
    one, two = (read_metrics(folder) for folder in (prepared / "train", tmp_path / "train"))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-4)
    text = (tmp_path / "train" / QUARANTINE_FILE).read_text()
    assert json.loads(text)["trajectories"] == quarantined(prepared).trajectories


def test_a_damaged_quarantine_and_one_of_another_store(prepared, run, place, tmp_path):
    output = Path(run.paths.output)
    output.mkdir()
    (output / QUARANTINE_FILE).write_text('{"store": "x", "rollbacks": [{"bad_')
    with pytest.raises(DataError, match=r"unreadable quarantine .*--force"):
        loop.train(run, place)
    shutil.copy(prepared / "train" / QUARANTINE_FILE, output)
    toy = TrajectoryStore.open(prepared / "toy")
    with pytest.raises(DataError, match="a quarantine of another store's trajectories"):
        read_quarantine(output, toy)
