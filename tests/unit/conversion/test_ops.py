"""Operations: worked examples by hand, and both directions of every table."""

import pytest
import torch

from checkpoints_conversion.families import dims_of
from checkpoints_conversion.ops import Dims, Qkv
from checkpoints_conversion.planning import layout_of
from megatron_offgrpo.model.hf_config import read_architecture
from tests.unit.conversion.tiny_models import MODELS, config_of

# 4 query heads in 2 groups, 1 value per head: the smallest case in which the order shows.
DIMS = Dims(layers=1, hidden=2, vocab=7, heads=4, kv_heads=2, head_dim=1, ffn=3)


def test_qkv_bias_interleaves_by_group():
    q, k, v = torch.tensor([1.0, 2, 3, 4]), torch.tensor([50.0, 60]), torch.tensor([700.0, 800])
    fused = Qkv("a", "bias").to_megatron([q, k, v], DIMS)
    # Group 0: queries 1 and 2, key 50, value 700; group 1: the rest.
    assert fused.tolist() == [1, 2, 50, 700, 3, 4, 60, 800]


def test_qkv_weight_keeps_the_columns():
    q = torch.tensor([[1.0, -1], [2, -2], [3, -3], [4, -4]])
    k, v = torch.tensor([[5.0, -5], [6, -6]]), torch.tensor([[7.0, -7], [8, -8]])
    fused = Qkv("a", "weight").to_megatron([q, k, v], DIMS)
    assert fused.tolist() == [[1, -1], [2, -2], [5, -5], [7, -7], [3, -3], [4, -4], [6, -6], [8, -8]]


def test_qkv_with_wider_heads_keeps_each_head_together():
    dims = Dims(layers=1, hidden=1, vocab=7, heads=2, kv_heads=1, head_dim=2, ffn=3)
    q, k, v = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6]), torch.tensor([7.0, 8])
    # One group: both query heads (1 2 and 3 4), then the key head, then the value head.
    assert Qkv("a", "bias").to_megatron([q, k, v], dims).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", list(MODELS))
def test_every_row_of_every_table_is_invertible(name, tmp_path):
    config_of(name).save_pretrained(tmp_path)
    layout, dims = layout_of(tmp_path), dims_of(read_architecture(tmp_path))
    for move in layout.moves:
        tensors = [torch.randn(shape) for shape in move.shapes]
        ours = move.op.to_megatron(tensors, dims)
        assert tuple(ours.shape) == move.region.shape
        theirs = move.op.to_hf(ours, dims)
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))
        again = [torch.randn(move.region.shape)]
        assert torch.equal(move.op.to_megatron(move.op.to_hf(again[0], dims), dims), again[0])
