"""A checkpoint's pickles are read without running anything in them."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import StorageMeta

from checkpoints_conversion import hf_to_megatron
from checkpoints_conversion.megatron_reader import iteration_folder
from checkpoints_conversion.safe_load import load_tensors
from checkpoints_conversion.safe_metadata import read_common, read_metadata
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel import runtime
from tests.evil import Evil
from tests.unit.conversion.tiny_models import save_tiny_model


def test_metadata_that_would_run_code_is_refused_and_does_not(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="mkdir is not allowed here"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_inside_an_allowed_class_is_refused_too(tmp_path):
    metadata = Metadata(state_dict_metadata={}, planner_data=Evil(tmp_path / "ran"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="mkdir is not allowed here"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["torch.load", "torch.serialization.load", "builtins.eval", "torch.hub.load"])
def test_callables_of_allowed_modules_are_refused(name, tmp_path):
    module, _, function = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match="is not allowed here"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([1, 2])])
def test_truncated_or_foreign_metadata(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="refused or unreadable checkpoint metadata"):
        read_metadata(tmp_path)


def test_metadata_of_a_converted_checkpoint_is_allowed(tmp_path):
    hf_to_megatron(save_tiny_model("qwen2", tmp_path / "hf"), tmp_path / "megatron")
    metadata = read_metadata(iteration_folder(tmp_path / "megatron"))
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert (tuple(entry.size), entry.properties.dtype) == ((4, 48, 80), torch.float32)


def test_metadata_of_any_python_is_read_and_ours_is_read_by_any(tmp_path):
    """Python 3.13 pickles a path as one of pathlib._local, which 3.12 has not; here under its own name."""
    place = pickle.dumps(Metadata({}, storage_meta=StorageMeta(checkpoint_id=Path("folder"))), protocol=2)
    module = type(Path()).__module__.encode()
    for name in (b"pathlib", b"pathlib._local"):
        (tmp_path / ".metadata").write_bytes(place.replace(b"c" + module + b"\n", b"c" + name + b"\n"))
        assert read_metadata(tmp_path).storage_meta.checkpoint_id == Path("folder")
    hf_to_megatron(save_tiny_model("qwen2", tmp_path / "hf"), tmp_path / "megatron")
    assert b"pathlib" not in (tmp_path / "megatron" / "release" / ".metadata").read_bytes()


def test_common_refuses_code_and_takes_a_namespace(tmp_path):
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        read_common(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"args": argparse.Namespace(tp=2), "iteration": 3}, tmp_path / "common.pt")
    assert read_common(tmp_path) == {"args": argparse.Namespace(tp=2), "iteration": 3}


def save_as_megatron(common: dict, folder: Path) -> None:
    """Megatron-Core's own save, which keeps the common state among the sharded objects, in the place of common.pt."""
    folder.mkdir()
    weight = ShardedTensor.from_rank_offsets("weight", torch.ones(3))
    dist_checkpointing.save({"weight": weight, **common}, str(folder))
    assert not (folder / "common.pt").exists()


def test_common_is_found_among_the_objects_too_and_refuses_code_there(tmp_path):
    runtime.start(LayoutConfig(), seed=0)
    try:
        common = {"args": argparse.Namespace(tp=2), "iteration": 3}
        save_as_megatron(common, tmp_path / "good")
        wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(3))}
        loaded = load_tensors(wanted, tmp_path / "good")
        save_as_megatron({"x": Evil(tmp_path / "ran")}, tmp_path / "evil")
    finally:
        runtime.stop()
    assert read_common(tmp_path / "good") == common
    assert {key: value for key, value in loaded.items() if key != "weight"} == common
    assert torch.equal(loaded["weight"], torch.ones(3))
    with pytest.raises(CheckpointError, match="refused or unreadable"):
        read_common(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_common_state_is_truncated(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    with pytest.raises(CheckpointError, match=r"truncated checkpoint; expected common\.pt"):
        read_common(tmp_path)
