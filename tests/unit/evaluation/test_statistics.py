"""avg@k, pass@k, intervals and the paired comparison, against hand-worked cases and simulation."""

import math

import numpy as np
import pytest

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation import statistics


def rows(*counts, k):
    """0/1 rows with the given numbers of right samples out of k."""
    return np.array([[1.0] * count + [0.0] * (k - count) for count in counts])


def test_accuracy_is_the_mean_over_all_samples():
    assert statistics.accuracy(rows(4, 1, 0, k=4)) == pytest.approx(5 / 12)


def test_pass_at_k_by_hand():
    correct = rows(2, 0, k=4)
    # c = 2 of n = 4: pass@1 = 1/2, pass@2 = 1 - C(2,2)/C(4,2) = 1 - 1/6, pass@3 = 1 - 0 = 1; c = 0: all 0.
    assert statistics.pass_at(correct, 1) == pytest.approx(1 / 4)
    assert statistics.pass_at(correct, 2) == pytest.approx(5 / 12)
    assert statistics.pass_at(correct, 3) == pytest.approx(1 / 2)


def test_pass_at_k_equals_the_binomial_formula():
    n, counts = 16, (0, 1, 5, 12, 16)
    for k in (1, 3, 8, 16):
        expected = np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in counts])
        assert statistics.pass_at(rows(*counts, k=n), k) == pytest.approx(expected)


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(DataError, match="pass@k"):
        statistics.pass_at(rows(1, k=4), 5)


def test_interval_over_problems_is_the_normal_one_for_many_problems():
    # 100 problems, half always right, half always wrong: standard error of the mean = 0.5 sqrt(100/99) / 10 = 0.05025.
    low, high = statistics.interval_new_problems(rows(*([3] * 50 + [0] * 50), k=3))
    assert (low, high) == (
        pytest.approx(0.5 - 1.96 * 0.05025, abs=0.006),
        pytest.approx(0.5 + 1.96 * 0.05025, abs=0.006),
    )


def test_interval_over_samples_vanishes_where_every_problem_is_certain():
    certain = rows(*([3] * 50 + [0] * 50), k=3)
    assert statistics.interval_new_samples(certain) == (0.5, 0.5)


def test_interval_over_samples_by_hand():
    # 64 problems with 2 of 4 right: unbiased variance of a sample 4/3 * 1/4 = 1/3, of the mean of all 1/3 / 256,
    # standard error 0.03608.
    low, high = statistics.interval_new_samples(rows(*[2] * 64, k=4))
    assert high - low == pytest.approx(2 * 1.96 * 0.03608, rel=0.06)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.01)


def test_no_interval_without_repetition():
    assert statistics.interval_new_samples(rows(1, 0, k=1)) is None
    assert statistics.interval_new_problems(rows(1, k=4)) is None


def test_intervals_are_seeded():
    correct = np.random.default_rng(0).integers(0, 2, size=(97, 5)).astype(float)
    assert statistics.interval_new_problems(correct, 1) == statistics.interval_new_problems(correct, 1)
    assert statistics.interval_new_problems(correct, 1) != statistics.interval_new_problems(correct, 2)


TRIALS, COVERAGE = 2000, (0.93, 0.97)
"""Nominal 95 %; the standard error of the observed share is 0.5 %."""


def covered(kind, num_problems, num_samples, monkeypatch):
    """Share of simulated evaluations whose interval holds the truth, each under the interval's own model."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    rng = np.random.default_rng(0)
    fixed_P = rng.beta(2, 2, size=num_problems)
    # New problems: rates drawn anew in every trial. New samples: the same rates throughout.
    rate_TP = rng.beta(2, 2, size=(TRIALS, num_problems)) if kind == "problems" else np.tile(fixed_P, (TRIALS, 1))
    correct_TPK = (rng.random((TRIALS, num_problems, num_samples)) < rate_TP[:, :, None]).astype(float)
    truth = 0.5 if kind == "problems" else fixed_P.mean()
    interval = statistics.interval_new_problems if kind == "problems" else statistics.interval_new_samples
    found = np.array([interval(correct_PK, trial) for trial, correct_PK in enumerate(correct_TPK)])
    return float(((found[:, 0] <= truth) & (truth <= found[:, 1])).mean())


@pytest.mark.parametrize("size", [(30, 16), (60, 4)])
@pytest.mark.parametrize("kind", ["problems", "samples"])
def test_intervals_cover_the_truth_under_their_own_model(kind, size, monkeypatch):
    low, high = COVERAGE
    assert low <= covered(kind, *size, monkeypatch) <= high


def test_minimum_detectable_difference_by_hand():
    # 64 problems, 2 of 4 right: s^2 = 1/4 * 4/3 = 1/3; 256 samples; (1.95996 + 0.84162) sqrt(2/3/256) = 0.14297.
    assert statistics.minimum_detectable_difference(rows(*[2] * 64, k=4)) == pytest.approx(0.14297, abs=1e-5)
    assert statistics.minimum_detectable_difference(rows(4, 0, k=4)) == 0
    assert statistics.minimum_detectable_difference(rows(1, 0, k=1)) is None


def test_a_difference_of_that_size_is_found_with_80_percent_power():
    rng = np.random.default_rng(1)
    num_problems, num_samples, rate, trials = 40, 16, 0.4, 4000
    step = (1.95996 + 0.84162) * math.sqrt(2 * rate * (1 - rate) / (num_problems * num_samples))
    mean_1 = rng.binomial(num_problems * num_samples, rate, trials) / (num_problems * num_samples)
    mean_2 = rng.binomial(num_problems * num_samples, rate + step, trials) / (num_problems * num_samples)
    error = np.sqrt((mean_1 * (1 - mean_1) + mean_2 * (1 - mean_2)) / (num_problems * num_samples))
    assert (np.abs(mean_2 - mean_1) > 1.95996 * error).mean() == pytest.approx(0.8, abs=0.03)


def test_comparison_by_hand():
    # Differences +1, +1/2, 0, +1/2: mean 1/2. Of the 2^3 signs of the three that are not 0 only all plus and all minus
    # reach |mean| = 1/2: p = 2/8.
    comparison = statistics.compare(rows(0, 1, 1, 0, k=2), rows(2, 2, 1, 1, k=2))
    assert comparison.difference == pytest.approx(0.5)
    assert comparison.p_value == pytest.approx(0.25)
    # Rates 0, 1/2, 1/2, 0 and 1, 1, 1/2, 1/2: s^2 = mean r(1-r) * 2/1 = 1/4 for both; (1/4 + 1/4) / 8 = 1/16.
    assert comparison.ci95_new_samples == pytest.approx((0.5 - 1.95996 / 4, 0.5 + 1.95996 / 4), abs=1e-4)
    # sd of 1, 1/2, 0, 1/2 is sqrt(1/2 / 3) = 0.40825; 2.80159 * 0.40825 / 2.
    assert comparison.detectable == pytest.approx(0.57187, abs=1e-4)
    assert (comparison.better, comparison.worse, comparison.num_problems) == (3, 0, 4)


def test_comparison_of_equal_models_has_p_value_one():
    correct = rows(2, 1, 0, k=2)
    comparison = statistics.compare(correct, correct)
    assert (comparison.difference, comparison.p_value, comparison.ci95) == (0.0, 1.0, (0.0, 0.0))


def test_comparison_is_paired():
    # The problems differ widely, the second model is a little better on each: only a paired test sees it.
    first = rows(*range(9), k=10)
    second = rows(*range(1, 10), k=10)
    assert statistics.compare(first, second).p_value < 0.01


def test_comparison_refuses_other_problems():
    with pytest.raises(DataError, match="same problems"):
        statistics.compare(rows(1, k=2), rows(1, 1, k=2))


def test_few_problems_widen_the_interval_by_hand():
    # Two problems with differences 0 and 1: resampled means are 0, 1/2, 1 with 1/4, 1/2, 1/4: quantiles 0 and
    # 1; the deviation 1/2 is widened by sqrt(2 / 1).
    comparison = statistics.compare(rows(0, 0, k=2), rows(0, 2, k=2))
    assert comparison.ci95 == pytest.approx((0.5 - 0.5 * math.sqrt(2), 0.5 + 0.5 * math.sqrt(2)))
    # An accuracy stays within [0, 1].
    assert statistics.interval_new_problems(rows(0, 2, k=2)) == (0.0, 1.0)
