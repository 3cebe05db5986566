"""What the step benchmark trains on: groups with real lengths and labels, random tokens, held in memory."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray, TokenizedTrajectory
from tools.bench_packing import read_groups

PROMPT_CAP, RESPONSE_CAP = 256, 1024


@dataclass(frozen=True)
class MemoryStore:
    """Trajectory groups as the plan and the batches read them."""

    group_offsets: IntArray
    prompt_lengths: IntArray
    """Of each trajectory's prompt; equal within a group."""
    response_lengths: IntArray
    rewards: FloatArray
    vocab_size: int
    manifest: Manifest = field(default_factory=lambda: Manifest("store", "benchmark"))

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets) - 1

    @property
    def num_trajectories(self) -> int:
        return int(self.group_offsets[-1])

    @property
    def on_policy(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def truncated(self) -> BoolArray:
        return self.response_lengths >= RESPONSE_CAP

    @property
    def validation_groups(self) -> BoolArray:
        return np.zeros(self.num_groups, dtype=np.bool_)

    @property
    def has_behaviour_logprobs(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    def trajectory(self, index: int) -> TokenizedTrajectory:
        """Random tokens; the prompt is that of the group."""
        group = int(np.searchsorted(self.group_offsets, index, side="right")) - 1
        return TokenizedTrajectory(
            prompt_ids=self._random(2 * group, self.prompt_lengths[index]),
            response_ids=self._random(2 * index + 1, self.response_lengths[index]),
            behaviour_logprobs=None,
        )

    def _random(self, seed: int, count: int) -> npt.NDArray[np.int32]:
        return np.random.default_rng(seed).integers(0, self.vocab_size, count).astype(np.int32)


def real_groups(file: Path, num_groups: int, vocab_size: int) -> MemoryStore:
    """The first groups of a trajectory file."""
    groups = read_groups(file)[:num_groups]
    sizes = [len(group.responses) for group in groups]
    return MemoryStore(
        group_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        prompt_lengths=np.repeat([min(PROMPT_CAP, max(1, group.prompt)) for group in groups], sizes).astype(np.int64),
        response_lengths=np.concatenate([np.clip(group.responses, 1, RESPONSE_CAP) for group in groups]),
        rewards=np.concatenate([group.labels for group in groups]).astype(np.float64),
        vocab_size=vocab_size,
    )
