"""Groups that are only assumed, for a plan before there is a store."""

import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray

PROMPT_TOKENS = 200
MAX_TRAJECTORIES = 10**8
SPREAD = 0.8
"""Standard deviation of the logarithm of a response's length."""


@dataclass(frozen=True)
class AssumedGroups:
    """Groups of equal size with log-normal response lengths: the quantiles of that distribution in a fixed order."""

    num_groups: int
    size: int
    mean_tokens: int
    """Mean of the responses before they are cut."""
    max_tokens: int
    """Longer responses are cut to this."""

    @staticmethod
    def parse(text: str, *, size: int, max_tokens: int) -> "AssumedGroups":
        """`2000x12000`: 2,000 groups with responses of 12,000 tokens on average.

        Raises:
            ConfigError: not GROUPSxTOKENS.
        """
        found = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,7})", text)
        if not found or int(found[1]) * size > MAX_TRAJECTORIES:
            expected = f"GROUPSxTOKENS, e.g. 2000x12000, with at most {MAX_TRAJECTORIES} trajectories in all"
            raise ConfigError("not an assumption", where="--assume", expected=expected, got=text)
        return AssumedGroups(int(found[1]), size, int(found[2]), max_tokens)

    @property
    def manifest(self) -> Manifest:
        return Manifest("store", f"assumed-{self.num_groups}x{self.size}x{self.mean_tokens}")

    @property
    def num_trajectories(self) -> int:
        return self.num_groups * self.size

    @property
    def group_offsets(self) -> IntArray:
        return self.size * np.arange(self.num_groups + 1, dtype=np.int64)

    @property
    def prompt_lengths(self) -> IntArray:
        return np.full(self.num_trajectories, PROMPT_TOKENS, dtype=np.int64)

    @property
    def response_lengths(self) -> IntArray:
        # A thousand quantiles, of which exp(mu + sigma^2 / 2) is the mean.
        normal = NormalDist(np.log(self.mean_tokens) - SPREAD**2 / 2, SPREAD)
        quantiles = np.exp([normal.inv_cdf((place + 0.5) / 1000) for place in range(1000)])
        drawn = quantiles[np.random.default_rng(0).permutation(self.num_trajectories) % 1000]
        return np.clip(drawn, 1, self.max_tokens).astype(np.int64)

    @property
    def rewards(self) -> FloatArray:
        return np.arange(self.num_trajectories, dtype=np.float64) % 2

    @property
    def on_policy(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def truncated(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def validation_groups(self) -> BoolArray:
        return np.zeros(self.num_groups, dtype=np.bool_)

    @property
    def has_behaviour_logprobs(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)
