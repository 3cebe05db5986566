"""A store without tokens, and the objective that the planning tests use."""

from dataclasses import dataclass

import numpy as np

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.objective import advantages


def no_function(*tensors):
    raise AssertionError("the plan never computes a surrogate or a divergence")


OBJECTIVE = ObjectiveConfig(
    advantage=advantages.mean_only,
    surrogate=no_function,
    kl=no_function,
    weight="token",
    max_response_tokens=100,
)


@dataclass
class FakeStore:
    group_offsets: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    rewards: np.ndarray
    on_policy: np.ndarray
    has_behaviour_logprobs: np.ndarray
    truncated: np.ndarray
    manifest: Manifest
    validation_groups: np.ndarray

    @property
    def num_groups(self):
        return len(self.group_offsets) - 1

    @property
    def num_trajectories(self):
        return int(self.group_offsets[-1])


def fake_store(group_sizes, prompt_lengths, response_lengths, rewards, truncated=(), validation=()):
    """prompt_lengths has one value a group, the others one a trajectory; `truncated` and `validation` are lists."""
    offsets = np.concatenate([[0], np.cumsum(group_sizes)]).astype(np.int64)
    num_trajectories = int(offsets[-1])
    return FakeStore(
        group_offsets=offsets,
        prompt_lengths=np.repeat(np.array(prompt_lengths, dtype=np.int64), group_sizes),
        response_lengths=np.array(response_lengths, dtype=np.int64),
        rewards=np.array(rewards, dtype=np.float64),
        on_policy=np.zeros(num_trajectories, dtype=bool),
        has_behaviour_logprobs=np.zeros(num_trajectories, dtype=bool),
        truncated=np.isin(np.arange(num_trajectories), truncated),
        manifest=Manifest("store", "store-fingerprint"),
        validation_groups=np.isin(np.arange(len(group_sizes)), validation),
    )


def random_store(num_groups, seed=0, max_size=9, max_response=60):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, max_size + 1, num_groups)
    total = int(sizes.sum())
    return fake_store(
        sizes,
        generator.integers(1, 10, num_groups),
        generator.integers(0, max_response + 1, total),
        generator.integers(0, 2, total),
    )
