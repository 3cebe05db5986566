"""The loops that a step is compared with compute one and the same loss and gradient."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tools.bench_step import SETTINGS
from tools.step_baselines import PlainLoop, ReleasedProcedure, Trajectory, reference_logprobs, token_losses
from tools.step_data import MemoryStore


def tiny_model(seed: int):
    torch.manual_seed(seed)
    config = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def test_the_objective_of_one_token_by_hand():
    # p = 1/4, reference 1/2: x = log 2, k3 = 1 - log 2; A = 3, H = 2, w = 10.
    loss = token_losses(*(torch.tensor([v]) for v in (math.log(0.25), 2.0, math.log(0.5), 3.0, 10.0)))
    assert float(loss) == pytest.approx(10 * (-3 / 4 + 0.2 * (1 - math.log(2)) - 0.001 * 2), rel=1e-6)


def test_all_loops_agree():
    reference = tiny_model(1)
    generator = np.random.default_rng(0)
    trajectories = []
    for number in range(11):
        ids = torch.from_numpy(generator.integers(0, 101, int(generator.integers(4, 30))))
        prompt = int(generator.integers(1, len(ids) - 1))
        cached = torch.from_numpy(reference_logprobs(reference, ids, prompt))
        trajectories.append(Trajectory(ids, prompt, advantage=(number % 3 - 1) / 2, weight=0.01, reference=cached))
    loops = [
        PlainLoop(tiny_model(0), SETTINGS, micro_batch_tokens=64, recompute=recompute) for recompute in (False, True)
    ]
    loops.append(ReleasedProcedure(tiny_model(0), reference, SETTINGS))
    first, *others = [loop.step(trajectories) for loop in loops]
    assert first.grad_norm > 0
    for other in others:
        assert other.loss == pytest.approx(first.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
    before, after = tiny_model(0).lm_head.weight, loops[0].model.lm_head.weight
    assert not torch.equal(before, after)
    assert torch.equal(after, loops[0].model.model.embed_tokens.weight)


def test_the_store_gives_the_same_tokens_again():
    store = MemoryStore(np.array([0, 2, 3]), np.array([4, 4, 5]), np.array([3, 7, 2]), np.array([1.0, 0.0, 1.0]), 50)
    first, second, third = (store.trajectory(index) for index in range(3))
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist() != third.prompt_ids.tolist()[:4]
    assert [len(t.response_ids) for t in (first, second, third)] == [3, 7, 2]
    assert store.trajectory(1).response_ids.tolist() == second.response_ids.tolist()
