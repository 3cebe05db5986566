"""Nothing in a checkpoint runs when its weights or its optimizer are loaded, converted or compared."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.logits import build_and_load
from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.checkpoint import CheckpointWriter, load_all, load_weights
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.toy import architecture, toy_run, write_hf_model
from tests.evil import Evil

WEIGHT = "decoder.final_layernorm.weight"
MOMENT = f"optimizer.state.exp_avg.{WEIGHT}"


@pytest.fixture(scope="module")
def place() -> runtime.Placement:
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def student(place) -> Student:
    return build_student(architecture("qwen2"), toy_run())


@pytest.fixture(scope="module")
def whole(student, place, tmp_path_factory) -> Path:
    """hf/, megatron/release as converted, and trained/iter_0000001 with an optimizer."""
    folder = tmp_path_factory.mktemp("foreign")
    write_hf_model(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    student.zero_grad()
    for parameter in student.models[0].parameters():
        parameter.main_grad.fill_(1.0)
    student.optimizer.step()  # it has no moments before
    writer = CheckpointWriter(folder / "trained", place, keep=0, asynchronous=False)
    writer.save(student, 1, Manifest(kind="checkpoint", fingerprint="test"))
    return folder


@pytest.fixture
def foreign(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "foreign")


def weights(student: Student, folder: Path) -> None:
    load_weights(student, folder / "megatron" / "release")


def everything(student: Student, folder: Path) -> None:
    load_all(student, folder / "trained" / "iter_0000001")


def for_logits(student: Student, folder: Path) -> None:
    build_and_load(architecture("qwen2"), LayoutConfig(), folder / "megatron" / "release")


def for_export(student: Student, folder: Path) -> None:
    megatron_to_hf(folder / "megatron", folder / "hf", folder / "export")


def edit(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def add_object(checkpoint: Path, key: str, content: object, *, with_size: bool = True) -> None:
    """Stores a pickled object under `key`; its entry has the size of the tensor that was there."""
    torch.save(content, checkpoint / "object.distcp")

    def change(metadata: Metadata) -> None:
        entry = BytesStorageMetadata()
        if with_size:
            entry.size = metadata.state_dict_metadata[key].size
        metadata.state_dict_metadata[key] = entry
        length = (checkpoint / "object.distcp").stat().st_size
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("object.distcp", 0, length)

    edit(checkpoint, change)


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("load", [weights, everything, for_logits, for_export])
def test_a_pickled_object_in_place_of_a_tensor_is_refused_and_not_read(load, with_size, student, foreign):
    add_object(foreign / "megatron" / "release", WEIGHT, Evil(foreign / "ran"), with_size=with_size)
    add_object(foreign / "trained" / "iter_0000001", MOMENT, Evil(foreign / "ran"), with_size=with_size)
    with pytest.raises(CheckpointError, match=WEIGHT) as caught:
        load(student, foreign)
    assert not (foreign / "ran").exists()
    # The conversion lists all that is missing, a line each.
    assert load is for_export or "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [weights, everything, for_logits, for_export])
def test_megatron_itself_does_not_unpickle_the_metadata(load, student, foreign):
    for checkpoint in (foreign / "megatron" / "release", foreign / "trained" / "iter_0000001"):
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(foreign / "ran")))
    with pytest.raises(CheckpointError, match="mkdir is not allowed here"):
        load(student, foreign)
    assert not (foreign / "ran").exists()


@pytest.mark.parametrize("load", [weights, everything, for_logits, for_export])
def test_objects_that_nothing_asks_for_stay_unread(load, student, foreign):
    """Transformer Engine's `_extra_state`, pickled by Megatron-LM, in a checkpoint of somebody else."""
    for checkpoint in (foreign / "megatron" / "release", foreign / "trained" / "iter_0000001"):
        key = "decoder.layers.self_attention.core_attention._extra_state/shard_0_4"
        add_object(checkpoint, key, Evil(foreign / "ran"), with_size=False)
    load(student, foreign)
    assert not (foreign / "ran").exists()
