"""Blocks, the budget of memory, and reading parts of stored pieces."""

import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf, streaming
from checkpoints_conversion.megatron_reader import MegatronWeights
from checkpoints_conversion.piece_reader import Overlap
from checkpoints_conversion.planning import Region
from checkpoints_conversion.streaming import Job, run_all
from megatron_offgrpo.errors import CheckpointError
from tests.unit.conversion.tiny_models import save_tiny_model


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_blocks_of_a_few_rows_give_the_same_as_whole_tensors(name, tmp_path, monkeypatch):
    hf = save_tiny_model(name, tmp_path / "hf")
    whole = hf_to_megatron(hf, tmp_path / "whole", dtype="bf16")
    # 1000 bytes: 5 rows of 48 fp32 values, so that no matrix is a multiple of a block.
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1000)
    parts = hf_to_megatron(hf, tmp_path / "parts", dtype="bf16")
    assert (parts.fingerprint, parts.inputs) == (whole.fingerprint, whole.inputs)
    back = megatron_to_hf(tmp_path / "parts", hf, tmp_path / "back", dtype="fp32")
    assert back.inputs == {"megatron": whole.fingerprint}
    ours = load_file(tmp_path / "back" / "model.safetensors")
    for key, tensor in load_file(hf / "model.safetensors").items():
        assert torch.equal(ours[key], tensor.to(torch.bfloat16).float()), key


def test_jobs_keep_within_the_budget(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_BUDGET_BYTES", 100)
    monkeypatch.setattr(streaming, "WORKERS", 4)
    lock, held, most = threading.Lock(), [0], [0]

    def job(num_bytes):
        def run():
            with lock:
                held[0] += num_bytes
                most[0] = max(most[0], held[0])
            time.sleep(0.01)
            with lock:
                held[0] -= num_bytes

        return Job(num_bytes, run)

    run_all([job(n) for n in (60, 60, 30, 30, 30, 120, 10)])
    # The largest job alone sets the budget: 120.
    assert 60 < most[0] <= 120


def test_the_first_error_stops_the_rest():
    done = []

    def fail():
        raise CheckpointError("broken")

    jobs = [Job(1, fail)] + [Job(1, lambda: (time.sleep(0.01), done.append(1))) for _ in range(100)]
    with pytest.raises(CheckpointError, match="broken"):
        run_all(jobs)
    assert len(done) < 100


@pytest.mark.parametrize(
    ("in_piece", "lengths", "piece", "run"),
    [
        # The whole piece; some rows of it; one layer of several; some columns (no run); rows of two layers (no run).
        ((0, 0, 0), (1, 4, 3), (1, 4, 3), 0),
        ((0, 2, 0), (1, 2, 3), (1, 4, 3), 6),
        ((1, 1, 0), (1, 2, 3), (2, 4, 3), 15),
        ((0, 0, 1), (1, 4, 2), (1, 4, 3), None),
        ((0, 1, 0), (2, 2, 3), (2, 4, 3), None),
        ((2,), (3,), (7,), 2),
    ],
)
def test_where_a_part_is_one_run_of_memory(in_piece, lengths, piece, run):
    overlap = Overlap(in_piece, tuple(0 for _ in lengths), lengths)
    assert overlap.run_in(piece) == run
    if run is not None:
        values = torch.arange(torch.Size(piece).numel()).view(piece)
        part = values[tuple(slice(o, o + n) for o, n in zip(in_piece, lengths, strict=True))]
        assert part.flatten().tolist() == list(range(run, run + part.numel()))


def test_pieces_that_hold_several_layers_or_lie_transposed(tmp_path):
    key = "decoder.layers.mlp.linear_fc2.weight"
    values = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    transposed = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    for name, tensor in (("plain", values), ("transposed", transposed)):
        dcp.save({key: tensor}, checkpoint_id=tmp_path / name, no_dist=True)
        weights = MegatronWeights(tmp_path / name)
        region = Region("decoder.layers.{layer}.mlp.linear_fc2.weight", (("layer", 1, 3),), 1, 2, (2, 5))
        # Layer 1, the second half of its 4 rows.
        assert weights.problem(region, padded=False) is None
        assert torch.equal(weights.read(region), values[1, 2:4])
        assert torch.equal(weights.read(region, "", 1, 1), values[1, 3:4])


def test_a_piece_that_is_not_what_the_metadata_says(tmp_path):
    key = "decoder.final_layernorm.weight"
    dcp.save({key: torch.ones(6)}, checkpoint_id=tmp_path, no_dist=True)
    weights = MegatronWeights(tmp_path)
    weights.tensors[key].chunks[0].sizes = torch.Size([5])
    with pytest.raises(CheckpointError, match=r"is not what the metadata says.*\[5\].*\[6\]"):
        weights.read(Region(key, (), 0, 1, (5,)))
    weights = MegatronWeights(tmp_path)
    weights.tensors[key].chunks.clear()
    with pytest.raises(CheckpointError, match="is incomplete; expected 6 values; got 0"):
        weights.read(Region(key, (), 0, 1, (6,)))


def test_overwritten_bytes_are_an_error_not_a_wrong_model(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    data = tmp_path / "megatron" / "release" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    # A byte of a weight, then the head of the first archive.
    content[5000] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="the weights are not those that were written here"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    content[:200] = bytes(200)
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"unreadable piece of embedding\.word_embeddings\.weight"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
