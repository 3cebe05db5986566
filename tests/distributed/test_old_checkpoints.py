"""Runs that an earlier stack began go on: Megatron-Core 0.16.1 on Python 3.11 wrote the fixture.

`old_checkpoints/megatron_core_0_16.tar.xz` holds, for a tiny dense model and a mixture of experts, the Hugging Face
model, its conversion, a run stopped after step 2 of 4 in both formats, and metrics and weights of the same run
undisturbed. Its store was the toy store with 29 tokens, which is made again: stores have another format by now.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import megatron_to_hf
from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training.run_folder import read_metrics
from tests.distributed import toy
from tests.distributed.format_worker import run_of, train

ARCHIVE = Path(__file__).parent / "old_checkpoints" / "megatron_core_0_16.tar.xz"
KINDS = ("qwen2", "qwen3_moe")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "megatron_core_0_16"


def planned(folder: Path, output: Path, form: str) -> RunConfig:
    run = with_values(run_of(folder, output), checkpoint={"every_steps": 2, "keep": 0, "format": form})
    save_plan(build_plan(toy.write_toy_store(folder / "store"), run.plan, run.objective), run.paths.plan)
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["sharded", "reshardable"])
def test_a_stopped_run_goes_on_to_the_same_end(old, place, tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr(toy, "VOCAB_SIZE", 29)
    folder = old / kind
    run = planned(folder, folder / form, form)
    # Its manifest is of the run's settings, which later versions may add to; here the checkpoint matters.
    (folder / form / "manifest.json").unlink()
    assert train(run, place) is True
    expected = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = read_metrics(folder / form)
    assert [step["step"] for step in steps] == [2, 3]
    np.testing.assert_allclose([step["loss"] for step in steps], expected[2:], rtol=1e-6)
    megatron_to_hf(folder / form / "checkpoints", folder / "hf", tmp_path / "exported")
    got, wanted = load_file(tmp_path / "exported" / "model.safetensors"), load_file(folder / "trained.safetensors")
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_read_back_bit_for_bit(old, tmp_path, kind):
    megatron_to_hf(old / kind / "megatron", old / kind / "hf", tmp_path / "exported")
    got, wanted = load_file(tmp_path / "exported" / "model.safetensors"), load_file(old / kind / "hf/model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
