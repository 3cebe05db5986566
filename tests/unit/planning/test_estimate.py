"""Parameters, FLOPs, memory and hours: published counts and arithmetic by hand."""

import dataclasses

import numpy as np
import pytest

from megatron_offgrpo.config import LayoutConfig, ModelConfig, PlanConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.estimate import (
    ModelShape,
    memory_per_rank,
    pack_flops,
    packs_lower_bound,
    run_cost,
    summary_lines,
)
from megatron_offgrpo.planning.plan import build_plan
from tests.unit.planning.fakes import OBJECTIVE, fake_store, random_store

QWEN2_5_7B = ModelShape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True)
QWEN2_5_05B = ModelShape(24, 896, 4864, 14, 2, 64, 151936, qkv_bias=True, tied_embeddings=True)
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True)
QWEN3_30B_A3B = ModelShape(48, 2048, 768, 32, 4, 128, 151936, qk_norm=True, num_experts=128, experts_per_token=8)
LLAMA3_70B = ModelShape(80, 8192, 28672, 64, 8, 128, 128256)
# h 4, f 6, two heads of 2, one key-value head, vocabulary 10, two layers.
TINY = ModelShape(2, 4, 6, 2, 1, 2, 10)
FP32 = ModelConfig(precision="fp32", head_chunk_mebibytes=1)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (QWEN2_5_7B, 7_615_616_512),
        (QWEN2_5_05B, 494_032_768),
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_30B_A3B, 30_532_122_624),
        (LLAMA3_70B, 70_553_706_496),
        # Per layer: attention 4 * (2 * 4 + 4) = 48, MLP 72, norms 8; final norm 4, embeddings 2 * 40.
        (TINY, 2 * 128 + 4 + 80),
    ],
)
def test_parameters_are_those_published(shape, parameters):
    assert shape.num_parameters == parameters


def test_only_active_experts_count_for_a_token():
    # Per layer: attention 2048 * (2 * 4096 + 1024), router 2048 * 128, eight experts of 3 * 2048 * 768.
    assert QWEN3_30B_A3B.matmul_parameters_per_token == 48 * (18_874_368 + 262_144 + 8 * 4_718_592)


def tiny_plan():
    """One step: packs of 8 (3 + 5 tokens) and 6 tokens, padded to 8; responses 2, 4 and 5."""
    store = fake_store([3], [1], [2, 4, 5], [1, 0, 0])
    return build_plan(store, PlanConfig(max_pack_tokens=8, pack_multiple=8, shuffle=False), OBJECTIVE)


def test_flops_by_hand():
    plan = tiny_plan()
    assert plan.trajectory.tolist() == [0, 1, 2]
    assert plan.pack_tokens.tolist() == [8, 6]
    # Matrices of both layers: 2 * (48 + 72) = 240 parameters, 6 FLOPs each on 8 padded tokens; attention
    # 6 * 2 layers * query size 4 * l^2; head 6 * 40 * response tokens.
    expected = [6 * 240 * 8 + 48 * (9 + 25) + 240 * 6, 6 * 240 * 8 + 48 * 36 + 240 * 5]
    np.testing.assert_allclose(pack_flops(plan, TINY), expected, rtol=1e-15)
    again = [8 * 240 * 8 + 64 * (9 + 25) + 240 * 6, 8 * 240 * 8 + 64 * 36 + 240 * 5]
    np.testing.assert_allclose(pack_flops(plan, TINY, recompute=True), again, rtol=1e-15)


def test_memory_of_one_rank_by_hand():
    got = memory_per_rank(TINY, LayoutConfig(), FP32, num_gpus=1, max_pack_tokens=8)
    assert got.weights == 4 * 340
    assert got.gradients == 4 * 340
    assert got.optimizer == 8 * 340
    # Per token and layer 4 h = 16, 2 q + kv = 12, 3 f = 18 values of 4 bytes; two layers, 8 tokens.
    assert got.activations == 4 * 46 * 2 * 8
    assert got.head == 3 * 2**20 + 2 * 4 * 4 * 8
    assert got.total == got.weights + got.gradients + got.optimizer + got.activations + got.head


def test_memory_of_a_layout_by_hand():
    layout = LayoutConfig(tp=2, pp=2, sequence_parallel=True)
    got = memory_per_rank(TINY, layout, dataclasses.replace(FP32, precision="bf16"), num_gpus=8, max_pack_tokens=8)
    # One layer: 120 / 2 + 8, embedding 40 / 2, final norm 4. Optimizer 12 bytes over dp = 2.
    assert got.weights == 2 * 92
    assert got.gradients == 4 * 92
    assert got.optimizer == 12 * 92 / 2
    # Everything is sharded over tp; the first stage keeps two micro-batches of its one layer.
    assert got.activations == 2 * 46 / 2 * 8 * 2
    without = memory_per_rank(
        TINY, dataclasses.replace(layout, sequence_parallel=False), FP32, num_gpus=8, max_pack_tokens=8
    )
    assert without.activations == 4 * (16 + 30 / 2) * 8 * 2


def test_full_recompute_keeps_the_layers_inputs():
    model = dataclasses.replace(FP32, recompute="full")
    got = memory_per_rank(TINY, LayoutConfig(), model, num_gpus=1, max_pack_tokens=8)
    assert got.activations == 4 * 4 * 8 * 2 + 4 * 46 * 8


def test_experts_are_sharded_over_ep():
    shape = dataclasses.replace(TINY, num_experts=4, experts_per_token=2)
    got = memory_per_rank(shape, LayoutConfig(ep=2), FP32, num_gpus=2, max_pack_tokens=8)
    # Per layer: attention 48, router 16, norms 8, two of four experts of 72; embeddings 80, final norm 4.
    dense, experts = 2 * (48 + 16 + 8) + 84, 2 * 2 * 72
    assert got.weights == 4 * (dense + experts)
    # Dense states are spread over dp = 2, expert states over dp / ep = 1.
    assert got.optimizer == 8 * (dense / 2 + experts)
    assert dense + 2 * experts == shape.num_parameters


def test_time_by_hand():
    plan = tiny_plan()
    first, second = pack_flops(plan, TINY)
    one = run_cost(plan, TINY, LayoutConfig(), num_gpus=1, tflops_per_gpu=1e-12)
    assert one.hours == pytest.approx((first + second) / 3600, rel=1e-12)
    assert (one.worst_imbalance, one.zero_weight_packs) == (0, 0)
    two = run_cost(plan, TINY, LayoutConfig(), num_gpus=2, tflops_per_gpu=1e-12)
    assert two.hours == pytest.approx(max(first, second) / 3600, rel=1e-12)
    assert two.gpu_hours == pytest.approx(2 * two.hours, rel=1e-12)
    assert two.worst_imbalance == pytest.approx(2 * max(first, second) / (first + second) - 1, rel=1e-12)
    # tp shares the packs: the same hours on one data-parallel rank of two GPUs are half of one GPU's.
    assert run_cost(plan, TINY, LayoutConfig(tp=2), num_gpus=2, tflops_per_gpu=1e-12).hours == pytest.approx(
        one.hours / 2, rel=1e-12
    )
    interleaved = run_cost(plan, TINY, LayoutConfig(pp=4, vpp=2), num_gpus=4, tflops_per_gpu=1.0)
    assert interleaved.zero_weight_packs == 2
    assert run_cost(plan, TINY, LayoutConfig(), num_gpus=3, tflops_per_gpu=1.0).zero_weight_packs == 1


@pytest.mark.parametrize(
    ("layout", "num_gpus"), [(LayoutConfig(tp=2), 3), (LayoutConfig(ep=3), 2), (LayoutConfig(), 0)]
)
def test_impossible_layouts_are_refused(layout, num_gpus):
    with pytest.raises(ConfigError, match="layout"):
        memory_per_rank(TINY, layout, FP32, num_gpus=num_gpus, max_pack_tokens=8)


def test_summary_names_the_facts():
    plan = tiny_plan()
    text = "\n".join(summary_lines(plan))
    for part in (
        "1 (3 trajectories a step)",
        "packs          2 of at most 8",
        "lower bound 2",
        "14, of them 11",
        "12.500 %",
    ):
        assert part in text
    assert "memory" not in text
    text = "\n".join(summary_lines(plan, shape=TINY, model=FP32, num_gpus=3, tflops_per_gpu=1.0))
    for part in (
        "parameters     340",
        "on the fullest of 3 ranks",
        "GPU-hours at an assumed 1 TFLOP/s",
        "1 zero-weight",
    ):
        assert part in text


def test_summary_of_a_partial_last_step_says_so():
    store = random_store(9)
    config = PlanConfig(groups_per_step=4, trajectories_per_group=1, max_pack_tokens=128, shuffle=False)
    plan = build_plan(store, config, OBJECTIVE)
    assert "3 (4, in the last step 1 trajectories a step)" in summary_lines(plan)[0]
    assert packs_lower_bound(plan) <= plan.num_packs
