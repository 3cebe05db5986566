"""Attention over packs: each trajectory sees itself alone, whoever else has its prompt."""

import math

import pytest
import torch
import torch.nn.attention.varlen

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.model import layers
from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.model.layers import SegmentAttention
from megatron_offgrpo.model.packing import PackedSegments
from tests.distributed.toy import architecture

# A prompt of 3 with responses of 4 and 2, a sequence of 5, a prompt of 2 with responses of none and 6.
BOUNDS = (0, 7, 9, 14, 16, 22)
PROMPTS = {1: (0, 3), 4: (14, 16)}
SEQUENCES = [[*range(7)], [0, 1, 2, 7, 8], [*range(9, 14)], [14, 15], [14, 15, *range(16, 22)]]
OWN = [7, 2, 5, 2, 6]


def plain_attention(query, key, value):
    """[n, heads, d], [m, groups, d] -> [n, heads, d]: the last query sees all keys, the one before one less."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def stand_in(query, key, value, offsets_q, offsets_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn by its definition."""
    assert scale == pytest.approx(1 / math.sqrt(query.shape[-1]))
    assert window_size == (-1, 0), "causal, aligned at the end"
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert offsets_q[-1] == len(query)
    assert offsets_k[-1] == len(key) == len(value)
    lengths_q, lengths_k = offsets_q.diff().tolist(), offsets_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (max_q, max_k)
    parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    return torch.cat([plain_attention(*part) for part in parts])


def stand_in_of_torch_2_11(query, key, value, offsets_q, offsets_k, max_q, max_k, *, scale, window_size):
    return stand_in(query, key, value, offsets_q, offsets_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("path", ["by_part", stand_in, stand_in_of_torch_2_11])
@pytest.mark.parametrize(("groups", "times"), [(2, 1), (4, 1), (2, 50)], ids=["grouped", "equal", "long"])
def test_shared_prompts_change_neither_outputs_nor_gradients(path, groups, times, monkeypatch):
    """`times` as many tokens in each place: responses of 300 tokens take three blocks of queries."""
    if path != "by_part":
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", path)
        monkeypatch.setattr(layers, "_attention_by_part", layers._varlen_attention)
    model = ModelConfig(precision="fp32")
    attention = SegmentAttention(transformer_config(architecture("qwen2"), LayoutConfig(), model))
    generator = torch.Generator().manual_seed(0)
    bounds = tuple(times * place for place in BOUNDS)
    prompts = {number: (times * start, times * end) for number, (start, end) in PROMPTS.items()}
    sequences = [[times * place + i for place in places for i in range(times)] for places in SEQUENCES]
    shapes = [(bounds[-1], 1, heads, 8) for heads in (4, groups, groups)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    directions = [torch.randn(times * own, 4, 8, generator=generator, dtype=torch.float64) for own in OWN]

    segments = PackedSegments.of(bounds, torch.device("cpu"), prompts=prompts)
    got = attention(*inputs, None, segments).view(bounds[-1], 4, 8)
    expected = []
    for places, own in zip(sequences, OWN, strict=True):
        expected.append(plain_attention(*(x[places, 0] for x in inputs))[len(places) - times * own :])
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-12, atol=1e-12)

    along = (torch.cat(directions) * got).sum()
    gradients = torch.autograd.grad(along, inputs)
    wanted = torch.autograd.grad(sum((d * e).sum() for d, e in zip(directions, expected, strict=True)), inputs)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_packs_without_shared_prompts_copy_no_keys():
    segments = PackedSegments.of((0, 7, 9, 14), torch.device("cpu"))
    assert segments.key_places_K is None
    assert segments.query_lengths == segments.key_lengths == (7, 2, 5)
