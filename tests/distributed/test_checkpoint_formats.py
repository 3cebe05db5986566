"""Sharded checkpoints: exact resume, another number of data-parallel ranks, refusal of another cut, resharding."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.safe_metadata import read_metadata
from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training.checkpoint_folder import latest
from megatron_offgrpo.training.reshard import reshard
from megatron_offgrpo.training.run_folder import read_metrics
from tests.distributed.format_worker import run_of, train
from tests.distributed.harness import run_ranks
from tests.distributed.toy import write_hf_model, write_toy_store

LAYOUTS = {
    "dp2": {},
    "tp2": {"tp": 2},
    "sp2": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "ep2": {"ep": 2},
}
# Resumed where they stopped, from sharded checkpoints.
SAME = [("qwen2", "dp2"), ("qwen2", "pp2"), ("qwen2", "vpp2"), ("qwen2", "cp2"), ("qwen3_moe", "ep2")]
# Stopped in one layout and resumed in another: sharded ones under other dp and cp, reshardable ones under any.
OTHER = [("qwen2", "dp2", "cp2", "sharded"), ("qwen2", "cp2", "dp2", "sharded")]
OTHER += [("qwen2", "vpp2", "sp2", "reshardable"), ("qwen3_moe", "ep2", "pp2", "reshardable")]
OTHER += [("qwen3_moe", "sp2", "ep2", "reshardable")]
ONE_TO_DP2 = ("qwen2", "1", "dp2", "sharded")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, place) -> Path:
    """A dense and a mixture-of-experts model with their inputs; in each of several layouts a whole and a stopped run.

    KIND/whole_LAYOUT ran through, KIND/stop_LAYOUT stopped after step 2 of 4.
    """
    folder = tmp_path_factory.mktemp("formats")
    for kind in ("qwen2", "qwen3_moe"):
        store = write_toy_store(folder / kind / "store")
        write_hf_model(folder / kind / "hf", kind)
        hf_to_megatron(folder / kind / "hf", folder / kind / "megatron")
        run = run_of(folder / kind, "")
        save_plan(build_plan(store, run.plan, run.objective), run.paths.plan)
        train(run_of(folder / kind, folder / kind / "whole_1"), place)
    train(run_of(folder / "qwen2", folder / "qwen2" / "stop_1"), place, 2)

    def action(kind: str, name: str, layout: str, **more: object) -> dict:
        output = folder / kind / f"{name}_{layout}"
        return {"folder": str(folder / kind), "output": str(output), "layout": LAYOUTS[layout], **more}

    whole = [action(kind, "whole", layout) for kind, layout in SAME]
    stopped = [action(kind, "stop", layout, stop_after=2) for kind, layout in (*SAME, ("qwen2", "tp2"))]
    reshardable = [(kind, layout) for kind, layout, _, form in OTHER if form == "reshardable"]
    stopped += [action(kind, "stop_reshardable", at, stop_after=2, form="reshardable") for kind, at in reshardable]
    on_two_processes(whole + stopped)
    resumed = []
    for kind, written, layout, form in [(kind, at, at, "sharded") for kind, at in SAME] + OTHER + [ONE_TO_DP2]:
        stop = "stop" if form == "sharded" else "stop_reshardable"
        resumed.append(action(kind, f"resumed_{written}", layout))
        shutil.copytree(folder / kind / f"{stop}_{written}", resumed[-1]["output"])
    tp2 = action("qwen2", "resharded", "tp2")
    shutil.copytree(folder / "qwen2" / "stop_tp2", tp2["output"])
    reshard_it = {**tp2, "reshard": True, "copy": str(folder / "qwen2" / "resharded_1")}
    on_two_processes([*resumed, reshard_it, {**tp2, "layout": LAYOUTS["pp2"]}])
    return folder


def on_two_processes(actions: list[dict]) -> None:
    run_ranks("tests.distributed.format_worker:do_all", 2, actions=actions)


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in read_metrics(output)]


def weights(output: Path, hf: Path, export: Path, **options: str) -> dict[str, torch.Tensor]:
    megatron_to_hf(output / "checkpoints", hf, export, **options)
    return load_file(export / "model.safetensors")


def formats(output: Path) -> dict[str, str]:
    found = sorted((output / "checkpoints").glob("iter_*"))
    return {path.name: read_manifest(path, "checkpoint", remedy="").counts["format"] for path in found}


def test_routine_saves_are_sharded_and_the_last_one_is_reshardable(folder):
    assert formats(folder / "qwen2" / "stop_dp2") == {"iter_0000002": "sharded"}
    assert formats(folder / "qwen2" / "whole_dp2") == {"iter_0000002": "sharded", "iter_0000004": "reshardable"}


def test_each_rank_writes_its_own_part_and_no_pickled_objects(folder):
    metadata = read_metadata(folder / "qwen2" / "stop_dp2" / "checkpoints" / "iter_0000002")
    entries = metadata.state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
    (name,) = [name for name in entries if name.endswith(".exp_avg")]
    files = {
        info.relative_path: sum(1 for i in metadata.storage_data if i.fqn == name)
        for index, info in metadata.storage_data.items()
        if index.fqn == name
    }
    assert {re.match(r"__(\d)_", file)[1] for file in files} == {"0", "1"}


@pytest.mark.parametrize(("kind", "layout"), SAME)
def test_resume_at_the_same_layout_is_exact(folder, tmp_path, kind, layout):
    whole, resumed = folder / kind / f"whole_{layout}", folder / kind / f"resumed_{layout}_{layout}"
    assert losses(resumed) == losses(whole)
    expected = weights(whole, folder / kind / "hf", tmp_path / "a")
    got = weights(resumed, folder / kind / "hf", tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_another_number_of_data_parallel_ranks_goes_on(folder, place, tmp_path):
    expected = losses(folder / "qwen2" / "whole_1")
    np.testing.assert_allclose(losses(folder / "qwen2" / "resumed_1_dp2"), expected, rtol=1e-4)
    shutil.copytree(folder / "qwen2" / "stop_dp2", tmp_path / "train")
    assert train(run_of(folder / "qwen2", tmp_path / "train"), place) is True
    np.testing.assert_allclose(losses(tmp_path / "train"), expected, rtol=1e-4)


@pytest.mark.parametrize(("kind", "written", "layout", "form"), OTHER)
def test_another_layout_goes_on(folder, kind, written, layout, form):
    resumed = folder / kind / f"resumed_{written}_{layout}"
    assert formats(resumed)["iter_0000002"] == form
    np.testing.assert_allclose(losses(resumed), losses(folder / kind / "whole_1"), rtol=1e-4)


def test_another_cut_is_refused_with_the_command_that_helps(folder, place, tmp_path):
    shutil.copytree(folder / "qwen2" / "stop_tp2", tmp_path / "train")
    run = run_of(folder / "qwen2", tmp_path / "train")
    wanted = (
        r"iter_0000002: this checkpoint is sharded, and another layout wrote it; expected tp 2 pp 1 vpp 1 ep 1; "
        r"got tp 1 pp 1 vpp 1 ep 1; .*offgrpo train toy --reshard --set layout\.tp=2 "
    )
    with pytest.raises(CheckpointError, match=wanted):
        train(run, place)
    with pytest.raises(CheckpointError, match=wanted):
        reshard(run, place)
    assert formats(tmp_path / "train") == formats(folder / "qwen2" / "stop_tp2")


def test_after_resharding_any_layout_goes_on(folder, place, tmp_path):
    assert formats(folder / "qwen2" / "resharded_1") == {"iter_0000002": "reshardable"}
    expected = losses(folder / "qwen2" / "whole_1")
    assert train(run_of(folder / "qwen2", folder / "qwen2" / "resharded_1"), place) is True
    # The second one went on under pp = 2.
    for name in ("resharded_1", "resharded_tp2"):
        np.testing.assert_allclose(losses(folder / "qwen2" / name), expected, rtol=1e-4)


def test_a_reshardable_run_needs_no_resharding(folder, place, tmp_path, capfd):
    run = run_of(folder / "qwen2", tmp_path / "train")
    with pytest.raises(CheckpointError, match="no checkpoint of this run to reshard"):
        reshard(run, place)
    shutil.copytree(folder / "qwen2" / "whole_1", tmp_path / "train", dirs_exist_ok=True)
    reshard(run, place)
    assert "iter_0000004 loads in any layout already" in capfd.readouterr().err


def test_master_weights_are_exported_from_a_reshardable_checkpoint_only(folder, place, tmp_path):
    run = run_of(folder / "qwen2", tmp_path / "train", model={"precision": "bf16"})
    assert train(run, place, 2) is False
    hf = folder / "qwen2" / "hf"
    with pytest.raises(CheckpointError, match=r"fp32 master weights .* are sharded; .*--reshard"):
        weights(tmp_path / "train", hf, tmp_path / "a", dtype="fp32")
    own = weights(tmp_path / "train", hf, tmp_path / "a")
    reshard(run, place)
    assert latest(tmp_path / "train" / "checkpoints").name == "iter_0000002"
    masters = weights(tmp_path / "train", hf, tmp_path / "b", dtype="fp32")
    assert all(torch.equal(masters[name].bfloat16(), own[name]) for name in own)
    assert any(not torch.equal(masters[name], own[name].float()) for name in own)
