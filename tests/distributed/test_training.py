"""Training in one process: exact resume after every step, refusals, and values that must stop a run."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf, verify
from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.cli import training as cli
from megatron_offgrpo.config import LayoutConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.objective import surrogates
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import load_plan, save_plan
from megatron_offgrpo.training import loop, reference
from megatron_offgrpo.training.checkpoint import load_all
from megatron_offgrpo.training.checkpoint_folder import latest
from megatron_offgrpo.training.run_folder import read_metrics
from megatron_offgrpo.training.signals import StopRequest
from megatron_offgrpo.training.student import build_student
from tests.distributed.toy import VOCAB_SIZE, in_folder, toy_run, write_hf_model, write_inputs, write_toy_store

NUM_STEPS = 4


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, place) -> Path:
    """Everything a run needs, with a plan of four steps, and the run itself undisturbed."""
    folder = tmp_path_factory.mktemp("training")
    run = in_folder(toy_run(epochs=2), folder)
    store = write_toy_store(folder / "store")
    write_inputs(run, folder, store)
    reference.compute_reference(run, place)
    assert loop.train(run, place) is True
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """The prepared run, writing into a folder of its own."""
    return replace(in_folder(toy_run(epochs=2), prepared), paths=with_output(prepared, tmp_path / "train"))


def with_output(prepared: Path, output: Path):
    return replace(in_folder(toy_run(), prepared).paths, output=str(output))


def trained_weights(output: Path, prepared: Path, export: Path) -> dict[str, torch.Tensor]:
    megatron_to_hf(output / "checkpoints", prepared / "hf", export)
    return load_file(export / "model.safetensors")


def stop_after(monkeypatch, steps: int) -> None:
    """As if a signal arrived during the given step of this start."""
    calls = iter(range(1, 1000))
    monkeypatch.setattr(StopRequest, "agreed", lambda self, place: next(calls) == steps)


def test_training_moves_the_weights_and_lowers_the_loss(prepared):
    before = load_file(prepared / "hf" / "model.safetensors")
    after = trained_weights(prepared / "train", prepared, prepared / "exported")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    steps = read_metrics(prepared / "train")
    assert [step["step"] for step in steps] == list(range(NUM_STEPS))
    # Steps 0 and 2, 1 and 3 do not hold the same groups, an epoch does.
    assert steps[2]["loss"] + steps[3]["loss"] < steps[0]["loss"] + steps[1]["loss"]


def test_step_0_reproduces_the_reference_to_the_bit(prepared):
    steps = read_metrics(prepared / "train")
    assert steps[0]["max_abs_logp_difference"] == 0.0
    assert steps[0]["kl"] == 0.0
    assert steps[1]["max_abs_logp_difference"] > 0.0


def test_resume_is_exact_after_every_step(run, prepared, place, tmp_path, monkeypatch):
    expected = trained_weights(prepared / "train", prepared, tmp_path / "expected")
    for stop in range(1, NUM_STEPS):
        output = tmp_path / f"stop{stop}"
        resumed = replace(run, paths=with_output(prepared, output))
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert loop.train(resumed, place) is False
        assert latest(output / "checkpoints").name == f"iter_{stop:07d}"
        assert loop.train(resumed, place) is True
        got = trained_weights(output, prepared, tmp_path / f"exported{stop}")
        assert all(torch.equal(expected[name], got[name]) for name in expected), f"stopped after step {stop}"
        undisturbed = [step["loss"] for step in read_metrics(prepared / "train")]
        assert [step["loss"] for step in read_metrics(output)] == undisturbed


def test_resume_is_exact_in_bf16_with_fp32_master_weights(run, prepared, place, tmp_path, monkeypatch):
    paths = replace(run.paths, reference=str(tmp_path / "reference"))
    whole = with_values(replace(run, paths=replace(paths, output=str(tmp_path / "whole"))), model={"precision": "bf16"})
    reference.compute_reference(whole, place)
    assert loop.train(whole, place) is True
    assert read_metrics(tmp_path / "whole")[0]["max_abs_logp_difference"] == 0.0
    halves = replace(whole, paths=replace(paths, output=str(tmp_path / "halves")))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert loop.train(halves, place) is False
    assert loop.train(halves, place) is True
    exports = []
    for name in ("whole", "halves"):
        megatron_to_hf(tmp_path / name / "checkpoints", prepared / "hf", tmp_path / f"hf_{name}", dtype="fp32")
        exports.append(load_file(tmp_path / f"hf_{name}" / "model.safetensors"))
    master, again = exports
    assert all(torch.equal(master[name], again[name]) for name in master)
    # The export holds the optimizer's fp32 weights, which bf16 cannot hold.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in master.values())


def test_a_finished_run_started_again_changes_nothing(run, prepared, place):
    finished = replace(run, paths=with_output(prepared, prepared / "train"))
    before = (prepared / "train" / "metrics.jsonl").read_text()
    assert loop.train(finished, place) is True
    assert (prepared / "train" / "metrics.jsonl").read_text() == before


def test_old_checkpoints_go_and_the_newest_stay(run, prepared, place, tmp_path):
    kept = with_values(run, checkpoint={"every_steps": 1, "keep": 2})
    loop.train(kept, place)
    names = sorted(path.name for path in (tmp_path / "train" / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000003", "iter_0000004"]


def test_a_folder_with_another_run_is_refused(run, prepared, place):
    other = with_values(replace(run, paths=with_output(prepared, prepared / "train")), optimizer={"lr": 5e-4})
    with pytest.raises(ConfigError, match=r"optimizer\.lr.*expected 0\.001; got 0\.0005.*--force"):
        loop.train(other, place)


def test_nan_in_the_reference_names_the_pack_and_changes_no_weight(run, prepared, place, tmp_path):
    shutil.copytree(prepared / "reference", tmp_path / "reference")
    logprobs = np.load(tmp_path / "reference" / "logprobs.npy")
    plan = load_plan(run.paths.plan)
    # The last pack of step 1: neither the first pack nor the first step.
    pack = plan.packs_of_step(1)[-1]
    trajectory = int(plan.trajectory[plan.entries(pack)][0])
    offsets = np.concatenate([[0], np.cumsum(TrajectoryStore.open(run.paths.store).response_lengths)])
    logprobs[offsets[trajectory]] = np.nan
    np.save(tmp_path / "reference" / "logprobs.npy", logprobs)
    broken = replace(run, paths=replace(run.paths, reference=str(tmp_path / "reference")))
    broken = with_values(broken, checkpoint={"every_steps": 1})
    with pytest.raises(TrainingError, match=rf"pack {pack} \(trajectories .*\b{trajectory}\b"):
        loop.train(broken, place)
    assert len(read_metrics(Path(broken.paths.output))) == 1


def nan_gradient(logp: torch.Tensor, mu: torch.Tensor, advantage: torch.Tensor, *, trigger: float) -> torch.Tensor:
    """Finite value, NaN gradient (0 * inf) where the advantage is `trigger`."""
    distance = torch.where(advantage == trigger, logp - logp.detach(), logp * 0 + 1)
    return surrogates.linear(logp, mu, advantage) + distance.abs().sqrt() * 0


def test_nan_in_a_gradient_alone_names_a_pack_that_has_it(run, prepared, place, tmp_path):
    plan = load_plan(run.paths.plan)
    first = plan.packs_of_step(0)
    # The last trajectory of the last pack, and whatever else has its advantage.
    trigger = float(plan.advantage[plan.entries(first[-1])][-1])
    guilty = {p for p in first if (plan.advantage[plan.entries(p)] == trigger).any()}
    broken = with_values(run, objective={"surrogate": partial(nan_gradient, trigger=trigger)})
    with pytest.raises(TrainingError) as error:
        loop.train(broken, place)
    assert int(error.value.where.split()[1]) in guilty
    assert read_metrics(tmp_path / "train") == []


def test_a_plan_of_other_settings_is_refused(run, place):
    with pytest.raises(DataError, match=r"plan\.max_pack_tokens.*offgrpo plan"):
        loop.open_inputs(with_values(run, plan={"max_pack_tokens": 128}))


def test_a_plan_of_another_store_is_refused(run, tmp_path):
    write_toy_store(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"this plan was made from another store.*offgrpo plan toy"):
        loop.open_inputs(replace(run, paths=replace(run.paths, store=str(tmp_path / "other"))))


@pytest.mark.parametrize("beyond", [0, 1, 50])
def test_token_ids_of_the_padding_are_never_computed(beyond, run, place, tmp_path, monkeypatch):
    """The toy's 301 tokens fill 384 rows of Megatron's embedding, so that nothing would fail by itself."""
    store = write_toy_store(tmp_path / "store", largest_id=VOCAB_SIZE - 1 + beyond)
    assert store.largest_id == VOCAB_SIZE - 1 + beyond
    paths = replace(run.paths, store=str(store.path), reference=str(tmp_path / "ref"), plan=str(tmp_path / "plan"))
    run = replace(run, paths=paths)
    without_hf = replace(run, paths=replace(paths, hf_model=str(tmp_path / "none")))
    got = VOCAB_SIZE - 1 + beyond
    refused = rf"store: token ids beyond the model's vocabulary; expected ids below {VOCAB_SIZE} .*; got {got}; "
    for asked in (run, without_hf) if beyond else ():
        monkeypatch.setattr("megatron_offgrpo.recipe.load_recipe", lambda *_, asked=asked: asked)
        with pytest.raises(DataError, match=refused):
            cli.plan("toy")
        assert not (tmp_path / "plan").exists()
    save_plan(build_plan(store, run.plan, run.objective), paths.plan)
    if not beyond:
        reference.compute_reference(run, place)
        assert loop.train(run, place) is True
        return
    with pytest.raises(DataError, match=refused):
        reference.compute_reference(run, place)
    # A reference from elsewhere does not help.
    without_kl = with_values(run, objective={"beta": 0.0})
    with pytest.raises(DataError, match=refused):
        loop.train(without_kl, place)


def test_a_config_that_is_not_the_checkpoints_is_refused(run, prepared, place, tmp_path):
    hf = shutil.copytree(prepared / "hf", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    other = replace(run, paths=replace(run.paths, hf_model=str(hf)))
    for start in (loop.train, reference.compute_reference):
        with pytest.raises(ConfigError, match=r"config\.json: .*\(.*rms_norm_eps: 0\.0001 and 1e-06\).*--overwrite"):
            start(other, place)


def test_the_same_weights_with_another_config_are_another_reference_and_another_run(run, prepared, place, tmp_path):
    hf = shutil.copytree(prepared / "hf", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    hf_to_megatron(hf, tmp_path / "megatron")
    other = replace(run, paths=replace(run.paths, hf_model=str(hf), megatron=str(tmp_path / "megatron")))
    with pytest.raises(DataError, match="this reference was made from another architecture"):
        loop.open_inputs(other)
    without_kl = with_values(run, objective={"beta": 0.0})
    assert loop.train(without_kl, place) is True
    student = build_student(read_architecture(hf), without_kl)
    with pytest.raises(CheckpointError, match=r"config\.json is not that .*rms_norm_eps: 0\.0001 and 1e-06"):
        load_all(student, latest(Path(run.paths.output) / "checkpoints"))


def test_a_trained_checkpoint_records_its_architecture(prepared, tmp_path):
    hf = shutil.copytree(prepared / "hf", tmp_path / "hf")
    checkpoints = prepared / "train" / "checkpoints"
    assert verify(hf, checkpoints, compare_logits=False).differing_fields == ()
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    found = verify(hf, checkpoints, compare_logits=False)
    assert found.differing_fields == ("max_position_embeddings: 1024 and 512",)


def test_remedies_name_what_was_typed(run, tmp_path, place):
    typed = replace(run, typed="my_recipes:toy --set plan.seed=0")

    def missing(name):
        return replace(typed, paths=replace(run.paths, **{name: str(tmp_path / "none")}))

    for stage in ("plan", "reference"):
        with pytest.raises(DataError, match=rf"remedy: offgrpo {stage} my_recipes:toy --set plan\.seed=0$"):
            loop.open_inputs(missing(stage))
    with pytest.raises(DataError, match=r"remedy: offgrpo plan my_recipes:toy --set plan\.seed=0$"):
        loop.open_inputs(with_values(typed, plan={"max_pack_tokens": 128}))
    assert loop.train(typed, place) is True
    with pytest.raises(ConfigError, match=r"offgrpo train my_recipes:toy --set plan\.seed=0 --force$"):
        loop.train(with_values(typed, optimizer={"lr": 2e-3}), place)


def test_a_reference_of_other_weights_or_precision_is_refused(run, prepared, tmp_path):
    write_hf_model(tmp_path / "hf", seed=1)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(DataError, match=r"this reference was made from another weights.*offgrpo reference toy"):
        loop.open_inputs(replace(run, paths=replace(run.paths, megatron=str(tmp_path / "megatron"))))
    with pytest.raises(DataError, match=r"this reference was made from another precision.*bf16.*fp32"):
        loop.open_inputs(with_values(run, model={"precision": "bf16"}))


def test_a_reference_of_another_tokenizer_is_refused(run, prepared, tmp_path):
    shutil.copytree(prepared / "reference", tmp_path / "reference")
    manifest = json.loads((tmp_path / "reference" / MANIFEST).read_text())
    manifest["inputs"]["tokenizer"] = "another"
    (tmp_path / "reference" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="this reference was made from another tokenizer"):
        loop.open_inputs(replace(run, paths=replace(run.paths, reference=str(tmp_path / "reference"))))


def test_another_plan_seed_and_objective_read_the_same_reference(run, prepared, tmp_path):
    other = with_values(
        replace(run, paths=replace(run.paths, plan=str(tmp_path / "plan"))),
        plan={"seed": 7, "max_pack_tokens": 200, "epochs": 1},
        objective={"surrogate": surrogates.reinforce, "beta": 0.5, "weight": "token"},
    )
    store = TrajectoryStore.open(run.paths.store)
    save_plan(build_plan(store, other.plan, other.objective), other.paths.plan)
    assert loop.open_inputs(other).reference is not None


def test_a_truncated_checkpoint_is_refused(run, prepared, tmp_path):
    shutil.copytree(prepared / "megatron", tmp_path / "megatron")
    victim = next((tmp_path / "megatron" / "release").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{victim.name}: truncated checkpoint; expected \d+ bytes; got \d+"):
        loop.open_inputs(replace(run, paths=replace(run.paths, megatron=str(tmp_path / "megatron"))))


def test_without_kl_no_reference_is_read(run, tmp_path, place):
    free = with_values(
        replace(run, paths=replace(run.paths, reference=str(tmp_path / "absent"), plan=str(tmp_path / "plan"))),
        objective={"beta": 0.0},
    )
    save_plan(build_plan(TrajectoryStore.open(run.paths.store), free.plan, free.objective), free.paths.plan)
    assert loop.open_inputs(free).reference is None
    assert loop.train(free, place) is True
