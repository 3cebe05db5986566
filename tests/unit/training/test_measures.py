"""Seconds by stage, model FLOPs, and MFU where the card's rate is known."""

import pytest
import torch

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.planning.hardware import CARDS, DEVICES, peak_tflops_of
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.training import measures, stage_clock
from megatron_offgrpo.training.measures import model_flops, peak_flops_per_second, step_values
from megatron_offgrpo.training.stage_clock import StageClock
from megatron_offgrpo.training.step import StepResult
from tests.unit.planning.fakes import OBJECTIVE, fake_store

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=4,
    ffn_hidden_size=6,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=2,
    vocab_size=10,
)
"""Matrices of a layer: attention 4 * (2 * 4 + 4) = 48, MLP 3 * 4 * 6 = 72; of both 240. Query size 4, head 40."""


def plan_of_two_steps():
    """One trajectory a step: 1 + 2 tokens, then 1 + 4, each in a pack of 8."""
    store = fake_store([1, 1], [1, 1], [2, 4], [1, 0])
    return build_plan(
        store, PlanConfig(groups_per_step=1, max_pack_tokens=8, pack_multiple=8, shuffle=False), OBJECTIVE
    )


def test_every_moment_belongs_to_one_stage(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 17.0, 25.0, 41.0])
    monkeypatch.setattr(stage_clock.time, "perf_counter", lambda: next(times))
    clock = StageClock()
    double = clock.timed("batches", lambda value: 2 * value, within="forward_backward")
    assert double(3) == 6  # called at 11, done at 13
    clock.ends("forward_backward")  # at 17
    double(4)  # from 25 to 41
    assert clock.seconds == {"forward_backward": 1.0 + 4.0 + 8.0, "batches": 2.0 + 16.0}


def test_model_flops_leave_out_padding_and_recomputation():
    # Matrices 6 * 240 a token, attention 6 * 2 * 4 * l^2, head 6 * 40 a response token.
    plan = plan_of_two_steps()
    assert model_flops(plan, range(1), SHAPE) == 6 * 240 * 3 + 48 * 3**2 + 240 * 2
    assert model_flops(plan, range(1, 2), SHAPE) == 6 * 240 * 5 + 48 * 5**2 + 240 * 4


class Place:
    device = torch.device("cpu")
    world_size = 4


def test_what_a_step_logs_by_hand(monkeypatch):
    monkeypatch.setattr(measures, "_peak_memory_bytes", lambda place: 7.0)
    monkeypatch.setattr(measures, "peak_flops_per_second", lambda device, precision: 1e4)
    plan, flops = plan_of_two_steps(), 6 * 240 * 5 + 48 * 25 + 240 * 4
    values = step_values(plan, 1, SHAPE, StepResult({}, 1.0, 0.3, 0.15), 0.5, Place, "bf16")
    assert values == pytest.approx(
        {
            "trajectories": 1,
            "packs": 1,
            "padded_tokens": 8,
            "packed_tokens": 5,
            "seconds": 0.5,
            "batch_seconds": 0.05,
            "forward_backward_seconds": 0.3,
            "optimizer_seconds": 0.15,
            "tokens_per_second": 10.0,
            "trajectories_per_second": 2.0,
            "model_flops_per_second": flops / 0.5,
            "peak_memory_bytes": 7.0,
            "mfu": flops / 0.5 / (4 * 1e4),
        }
    )


def test_mfu_needs_a_known_gpu_in_bf16(monkeypatch):
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    gpu = torch.device("cuda", 0)
    assert peak_flops_per_second(gpu, "bf16") == 989.4e12
    assert peak_flops_per_second(gpu, "bf16") is None
    assert peak_flops_per_second(gpu, "fp32") is None
    assert peak_flops_per_second(torch.device("cpu"), "bf16") is None


def test_every_device_is_a_card_of_the_table():
    assert set(DEVICES.values()) <= CARDS.keys()
    assert peak_tflops_of("NVIDIA A100-SXM4-40GB") == 312.0
    assert peak_tflops_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_tflops_of("NVIDIA L40S") == 362.0
