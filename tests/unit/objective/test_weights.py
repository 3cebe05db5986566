"""Token weights worked out by hand."""

import numpy as np
import pytest

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.weights import trajectory_weights

# Three groups: tokens 2 + 6, 4 + 0, 8. B = 5, 20 tokens.
LENGTHS = np.array([2, 6, 4, 0, 8])
GROUPS = np.array([7, 7, 3, 3, 9])
# The trajectory of 6 tokens is masked: 14 tokens are left, 2 in its group.
MASK = np.array([False, True, False, False, False])


def weights(mode, **more):
    return trajectory_weights(mode, LENGTHS, GROUPS, max_response_tokens=10, **more)


@pytest.mark.parametrize(
    ("mode", "expected", "expected_masked"),
    [
        ("constant", [1 / 50, 1 / 50, 1 / 50, 0, 1 / 50], [1 / 50, 0, 1 / 50, 0, 1 / 50]),
        ("token", [1 / 20, 1 / 20, 1 / 20, 0, 1 / 20], [1 / 14, 0, 1 / 14, 0, 1 / 14]),
        ("sequence", [1 / 10, 1 / 30, 1 / 20, 0, 1 / 40], [1 / 10, 0, 1 / 20, 0, 1 / 40]),
        ("group", [1 / 24, 1 / 24, 1 / 12, 0, 1 / 24], [1 / 6, 0, 1 / 12, 0, 1 / 24]),
    ],
)
def test_modes(mode, expected, expected_masked):
    np.testing.assert_allclose(weights(mode), expected, rtol=1e-15)
    np.testing.assert_allclose(weights(mode, mask_N=MASK), expected_masked, rtol=1e-15)


@pytest.mark.parametrize(
    ("mode", "total"), [("token", 1.0), ("sequence", 4 / 5), ("group", 1.0), ("constant", 20 / 50)]
)
def test_sum_over_tokens(mode, total):
    # sequence: four of five trajectories have tokens; constant: 20 tokens of 5 * 10.
    assert (weights(mode) * LENGTHS).sum() == pytest.approx(total, rel=1e-15)


@pytest.mark.parametrize("mode", ["constant", "token", "sequence", "group"])
def test_nothing_but_empty_responses_weighs_nothing(mode):
    got = trajectory_weights(mode, np.zeros(3, dtype=np.int64), np.array([0, 0, 1]), max_response_tokens=5)
    assert got.tolist() == [0, 0, 0]


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="unknown weight mode"):
        weights("tokens")
    with pytest.raises(ConfigError, match="max_response_tokens"):
        trajectory_weights("constant", LENGTHS, GROUPS, max_response_tokens=0)
