"""The learning rate of a step, by hand."""

import pytest

from megatron_offgrpo.config import OptimizerConfig
from megatron_offgrpo.training.student import learning_rate


def rates(steps, **settings):
    return [learning_rate(step, steps, OptimizerConfig(lr=1.0, **settings)) for step in range(steps)]


def test_constant():
    assert rates(3) == [1.0, 1.0, 1.0]


def test_warm_up_reaches_lr_at_its_last_step():
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_towards_min_lr():
    assert rates(4, schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_halfway_in_the_middle():
    # (1 + cos(pi/2)) / 2 = 1/2; with warm-up 2 of 6 the middle of the decay is step 4.
    assert rates(6, schedule="cosine", warmup_steps=2)[4] == pytest.approx(0.5)
