"""Parameters, FLOPs, memory and hours: published counts and arithmetic by hand."""

import dataclasses

import numpy as np
import pytest

from megatron_offgrpo.config import LayoutConfig, ModelConfig, PlanConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.estimate import balance, packs_lower_bound, run_cost, typical_pack_flops
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.memory import memory_per_rank, parameters_of_stage
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.shape import ModelShape
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
    config = PlanConfig(max_pack_tokens=8, pack_multiple=8, shuffle=False, share_prompts="never")
    return build_plan(store, config, OBJECTIVE)


def test_flops_by_hand():
    plan = tiny_plan()
    assert plan.trajectory.tolist() == [0, 1, 2]
    assert plan.pack_tokens.tolist() == [8, 6]
    # Matrices of both layers: 2 * (48 + 72) = 240 parameters, 6 FLOPs each on 8 padded tokens; attention
    # 6 * 2 layers * query size 4 * l^2; head 6 * 40 * response tokens.
    expected = [6 * 240 * 8 + 48 * (9 + 25) + 240 * 6, 6 * 240 * 8 + 48 * 36 + 240 * 5]
    np.testing.assert_allclose(pack_flops(plan, TINY), expected, rtol=1e-15)
    np.testing.assert_allclose(pack_flops(plan, TINY, packs=range(1, 2)), expected[1:], rtol=1e-15)
    # The head computes its logits again in any case: 8 * 40.
    computed = [6 * 240 * 8 + 48 * (9 + 25) + 320 * 6, 6 * 240 * 8 + 48 * 36 + 320 * 5]
    np.testing.assert_allclose(pack_flops(plan, TINY, recompute=False), computed, rtol=1e-15)
    again = [8 * 240 * 8 + 64 * (9 + 25) + 320 * 6, 8 * 240 * 8 + 64 * 36 + 320 * 5]
    np.testing.assert_allclose(pack_flops(plan, TINY, recompute=True), again, rtol=1e-15)


def test_the_typical_step_has_the_median_flops():
    # Steps of one group each: responses of 5, 2, and 3 and 4 tokens, which find no place in one pack.
    store = fake_store([1, 1, 2], [3, 3, 3], [5, 2, 3, 4], [1, 0, 0, 1])
    config = PlanConfig(groups_per_step=1, max_pack_tokens=8, pack_multiple=8, shuffle=False, share_prompts="never")
    plan = build_plan(store, config, OBJECTIVE)
    assert plan.pack_step.tolist() == [0, 1, 2, 2]
    np.testing.assert_array_equal(typical_pack_flops(plan, TINY), pack_flops(plan, TINY, recompute=False)[:1])


# Kept per token and layer: norms 4 * 4, rotary 4 * 2, QKV (4 + 4) + 4 + 2, attention's output 4, MLP 5 * 6 = 72 values
# of 4 bytes, and 4 bytes for each of two norms and two heads.
LAYER = 4 * 72 + 16
# The final norm's input and statistic, and the ids in 8 bytes.
ENDS = 4 * 4 + 4 + 8


def test_memory_of_one_rank_by_hand():
    got = memory_per_rank(TINY, LayoutConfig(), FP32, num_gpus=1, max_pack_tokens=8)
    # The vocabulary of 10 is padded to 128: two tables of 128 * 4.
    parameters = 2 * 128 + 4 + 2 * 512
    assert got.weights == 4 * parameters
    assert got.gradients == 4 * parameters
    assert got.optimizer == 8 * parameters
    assert got.activations == 8 * (2 * LAYER + ENDS)
    # Gradients of gate and up and of two hidden states.
    assert got.working == 4 * (12 + 8) * 8
    # Two blocks of a MiB; per row its hidden state (16 bytes) and 24 bytes, gradients in fp32 and in the model's
    # width; the gradient of the output weights.
    assert got.logits == 2 * 2**20 + (16 + 24 + 16 + 16) * 8 + 4 * 512
    kept = got.weights + got.gradients + got.optimizer + got.activations
    assert got.total == kept + max(got.working, got.logits)
    offloaded = memory_per_rank(TINY, LayoutConfig(), FP32, num_gpus=1, max_pack_tokens=8, offload=True)
    assert (offloaded.optimizer, got.total - offloaded.total) == (0, got.optimizer)


def test_memory_of_a_layout_by_hand():
    layout = LayoutConfig(tp=2, pp=2, sequence_parallel=True)
    shape = dataclasses.replace(TINY, num_query_groups=2)
    got = memory_per_rank(shape, layout, dataclasses.replace(FP32, precision="bf16"), num_gpus=8, max_pack_tokens=8)
    # The last stage is the fullest for its head. A layer: matrices (64 + 72) / 2 and norms 8; 128 rows of the
    # embedding; final norm 4. Optimizer 12 bytes over dp = 2.
    parameters = 68 + 8 + 512 + 4
    assert got.weights == 2 * parameters
    assert got.gradients == 4 * parameters
    assert got.optimizer == 12 * parameters / 2
    # One pack in flight. All but rotary is halved: norms 16, rotary 8, QKV (4 + 8) + 4 + 4, output 4, MLP 30;
    # numbers in fp32: two norms, one head; final norm.
    assert got.activations == 8 * (2 * (8 + 8 + 6 + 2 + 2 + 2 + 15) + 4 * 3 + 2 * 2 + 4)


@pytest.mark.parametrize(("experts", "matrices"), [(0, (64 + 72) / 2), (4, 64 / 2 + 4 * 72 / 2)])
def test_fp8_takes_two_more_bytes_for_each_parameter_of_the_matrices(experts, matrices):
    shape = dataclasses.replace(TINY, num_query_groups=2, num_experts=experts, experts_per_token=2)
    layout = LayoutConfig(tp=2, pp=2, sequence_parallel=True)
    of = {
        precision: memory_per_rank(
            shape, layout, dataclasses.replace(FP32, precision=precision), num_gpus=8, max_pack_tokens=8
        )
        for precision in ("bf16", "fp8")
    }
    # One layer on a stage.
    assert of["fp8"] == dataclasses.replace(of["bf16"], weights=of["bf16"].weights + 2 * matrices)


def test_the_first_stage_keeps_as_many_packs_as_there_are_stages():
    shape = dataclasses.replace(TINY, num_layers=8)
    model = dataclasses.replace(FP32, recompute="full")

    def activations(**layout):
        return memory_per_rank(shape, LayoutConfig(**layout), model, num_gpus=4, max_pack_tokens=2**20).activations

    tokens = 2**20
    # A layer's input 16 bytes; per pack the rotary table 8 bytes, ids 8 bytes once. Two layers of four packs, and what
    # was sent on of each.
    assert activations(pp=4) == tokens * (2 * 4 * 16 + 4 * 8 + 8 + 4 * 16)
    # Interleaved with v = 2: 1 + (p - 1) / (p v) = 11 / 8 as much (Korthikanti et al. 2022, section 4.2.3).
    assert activations(pp=4, vpp=2) == tokens * (11 / 8 * (2 * 4 * 16 + 4 * 8) + 8 + 11 * 16)


def test_full_recompute_keeps_the_layers_inputs():
    model = dataclasses.replace(FP32, recompute="full")
    got = memory_per_rank(TINY, LayoutConfig(), model, num_gpus=1, max_pack_tokens=8)
    assert got.activations == 8 * (2 * 16 + 8 + ENDS)
    assert got.working == 4 * (12 + 8) * 8 + 8 * LAYER


def test_experts_are_sharded_over_ep():
    shape = dataclasses.replace(TINY, num_experts=4, experts_per_token=2)
    # Per layer: attention 48, router 16, norms 8, two of four experts of 72; embeddings 2 * 512, final norm 4.
    dense, experts = parameters_of_stage(shape, LayoutConfig(ep=2), 0)
    assert (dense, experts) == (2 * (48 + 16 + 8) + 1028, 2 * 2 * 72)
    got = memory_per_rank(shape, LayoutConfig(ep=2), FP32, num_gpus=2, max_pack_tokens=8)
    assert got.weights == 4 * (dense + experts)
    # Dense states are spread over dp = 2, expert states over dp / ep = 1.
    assert got.optimizer == 8 * (dense / 2 + experts)
    # With ep, tensor parallelism leaves experts whole: on four ranks of tp = 2 their states are spread over 4 / ep = 2.
    layout = LayoutConfig(tp=2, ep=2, sequence_parallel=True)
    dense, experts = parameters_of_stage(dataclasses.replace(shape, num_query_groups=2), layout, 0)
    assert experts == 2 * 2 * 72
    got = memory_per_rank(dataclasses.replace(shape, num_query_groups=2), layout, FP32, num_gpus=4, max_pack_tokens=8)
    assert got.optimizer == 8 * (dense / 2 + experts / 2)


def test_time_by_hand():
    plan = tiny_plan()
    first, second = pack_flops(plan, TINY, recompute=False)

    def hours(layout, num_gpus):
        even = balance(plan, TINY, layout, num_gpus=num_gpus)
        return even, run_cost(even, num_gpus=num_gpus, tflops_per_gpu=1e-12)

    even, one = hours(LayoutConfig(), 1)
    assert one.hours == pytest.approx((first + second) / 3600, rel=1e-12)
    assert one.step_seconds == pytest.approx(first + second, rel=1e-12)
    assert (even.worst, even.zero_weight_packs, even.dp) == (0, 0, 1)
    even, two = hours(LayoutConfig(), 2)
    assert two.hours == pytest.approx(max(first, second) / 3600, rel=1e-12)
    assert two.gpu_hours == pytest.approx(2 * two.hours, rel=1e-12)
    assert even.worst == pytest.approx(2 * max(first, second) / (first + second) - 1, rel=1e-12)
    assert (even.worst_with_enough_packs, even.steps_with_enough_packs) == (None, 0)
    # tp shares the packs: the same hours on one data-parallel rank of two GPUs are half of one GPU's.
    assert hours(LayoutConfig(tp=2), 2)[1].hours == pytest.approx(one.hours / 2, rel=1e-12)
    # Two stages and two packs: half a pipeline's time is idle; the last stage has half of the layers and all of the
    # head, 8 * 40 on each of the 11 response tokens.
    slowest = (first + second + 8 * 40 * 11) / 2
    assert hours(LayoutConfig(pp=2), 2)[1].hours == pytest.approx(slowest * 1.5 / 3600, rel=1e-12)
    assert hours(LayoutConfig(pp=4, vpp=2), 4)[0].zero_weight_packs == 2
    assert hours(LayoutConfig(), 3)[0].zero_weight_packs == 1


@pytest.mark.parametrize(
    ("layout", "num_gpus"), [(LayoutConfig(tp=2), 3), (LayoutConfig(ep=3), 2), (LayoutConfig(), 0)]
)
def test_impossible_layouts_are_refused(layout, num_gpus):
    with pytest.raises(ConfigError, match="layout"):
        memory_per_rank(TINY, layout, FP32, num_gpus=num_gpus, max_pack_tokens=8)


def test_the_lower_bound_counts_every_step():
    store = random_store(9)
    config = PlanConfig(groups_per_step=4, trajectories_per_group=1, max_pack_tokens=128, shuffle=False)
    plan = build_plan(store, config, OBJECTIVE)
    assert packs_lower_bound(plan) <= plan.num_packs
    assert packs_lower_bound(tiny_plan()) == 2
