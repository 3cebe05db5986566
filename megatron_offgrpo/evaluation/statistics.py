"""Accuracy, pass@k, their 95 % intervals, and the comparison of two models on the same problems.

Two intervals, for two questions. *New problems*: how far could the accuracy be off on other problems of this kind?
*New samples*: how far would it move if the same problems were sampled again? The first is the one to quote for a model.

`correct_PK` is everywhere a 0/1 array [problems, samples per problem].
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from megatron_offgrpo.errors import DataError

Interval = tuple[float, float]
RESAMPLES = 10_000
Z_TWO_SIDED, Z_POWER = float(stats.norm.ppf(0.975)), float(stats.norm.ppf(0.8))
"""Of a 5 % two-sided test that finds the difference with 80 % power: 1.960 and 0.842."""
CHUNK_ELEMENTS = 10_000_000
CorrectArray = npt.NDArray[np.float64]


def accuracy(correct_PK: CorrectArray) -> float:
    """avg@k = (1/P) sum_p c_p / k, with c_p the right samples of problem p."""
    return float(correct_PK.mean())


def pass_at(correct_PK: CorrectArray, k: int) -> float:
    """pass@k = (1/P) sum_p 1 - C(n - c_p, k) / C(n, k): unbiased (Chen et al. 2021, equation 1).

    Raises:
        DataError: k above the number of samples n.
    """
    num_samples = correct_PK.shape[1]
    if not 1 <= k <= num_samples:
        raise DataError("pass@k needs k samples", expected=f"1 <= k <= {num_samples}", got=k)
    wrong_P = num_samples - correct_PK.sum(axis=1)
    # C(n - c, k) / C(n, k) = prod_{i < k} (n - c - i) / (n - i), and 0 where fewer than k are wrong.
    fail_P = np.ones(len(wrong_P))
    for i in range(k):
        fail_P *= np.maximum(wrong_P - i, 0) / (num_samples - i)
    return float(1 - fail_P.mean())


def interval_new_problems(correct_PK: CorrectArray, seed: int = 0) -> Interval | None:
    """95 % bootstrap interval of avg@k over problems (samples of a problem stay together), within [0, 1].

    Deviations from the mean are widened by sqrt(P / (P - 1)): resampled means vary by (P - 1)/P too little.
    None with fewer than two problems.
    """
    interval = _bootstrap(correct_PK.mean(axis=1), seed)
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def interval_new_samples(correct_PK: CorrectArray, seed: int = 0) -> Interval | None:
    """95 % interval of avg@k over new samples of these problems: each problem's samples are resampled.

    Deviations are widened by sqrt(k / (k - 1)), since resampling k of k varies by (k - 1)/k too little. None with
    fewer than two samples a problem.
    """
    num_samples = correct_PK.shape[1]
    if num_samples < 2:
        return None
    rate_P = correct_PK.mean(axis=1)
    rng = np.random.default_rng(seed)
    resampled = np.concatenate(
        [
            rng.binomial(num_samples, rate_P, size=(rows, len(rate_P))).mean(axis=1) / num_samples
            for rows in _chunks(len(rate_P))
        ]
    )
    low, high = _widened(resampled, float(rate_P.mean()), num_samples)
    return max(0.0, low), min(1.0, high)


def sampling_variance(correct_PK: CorrectArray) -> float | None:
    """Variance of one sample around its problem's rate, unbiased: (1/P) sum_p k/(k-1) r_p (1 - r_p); None for k = 1."""
    num_samples = correct_PK.shape[1]
    if num_samples < 2:
        return None
    rate_P = correct_PK.mean(axis=1)
    return float((rate_P * (1 - rate_P)).mean() * num_samples / (num_samples - 1))


def minimum_detectable_difference(correct_PK: CorrectArray) -> float | None:
    """The smallest true difference in avg@k that two models on these P problems, k samples each, would show.

    (z_0.975 + z_0.8) sqrt(2 s^2 / (P k)), s^2 the variance of a sample around its problem's rate, taken to be the same
    for both models: a two-sided test at 5 % finds it with 80 % power. It counts the noise of sampling alone, for a
    claim about these very problems; a claim about new problems needs a larger difference, see `Comparison`. None for
    k = 1, which leaves s^2 unknown.
    """
    variance = sampling_variance(correct_PK)
    if variance is None:
        return None
    return (Z_TWO_SIDED + Z_POWER) * float(np.sqrt(2 * variance / correct_PK.size))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same problems; differences are second minus first."""

    difference: float
    ci95: Interval | None
    """Over new problems: bootstrap of the problems' differences."""
    ci95_new_samples: Interval | None
    """Over new samples of these problems: difference +- z_0.975 sqrt((s_1^2/k_1 + s_2^2/k_2) / P)."""
    detectable: float | None
    """Smallest difference over new problems that P such problems show with 80 % power:
    (z_0.975 + z_0.8) sd(d) / sqrt(P), sd(d) the standard deviation of the problems' differences, noise included."""
    p_value: float
    """Two-sided sign-flip permutation test of the problems' differences: under no difference, each is as likely -d."""
    num_problems: int
    better: int
    """Problems on which the second model has the higher accuracy."""
    worse: int


def compare(first_PK: CorrectArray, second_PK: CorrectArray, seed: int = 0) -> Comparison:
    """Paired comparison of two models; row p of both is the same problem.

    Raises:
        DataError: another number of problems.
    """
    if len(first_PK) != len(second_PK):
        raise DataError("not the same problems", expected=len(first_PK), got=len(second_PK))
    difference_P = second_PK.mean(axis=1) - first_PK.mean(axis=1)
    if np.all(difference_P == 0):
        p_value = 1.0
    else:
        p_value = stats.permutation_test(
            (difference_P,),
            lambda values, axis: values.mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES - 1,
            vectorized=True,
            rng=np.random.default_rng(seed),
        ).pvalue
    return Comparison(
        difference=float(difference_P.mean()),
        ci95=_bootstrap(difference_P, seed),
        ci95_new_samples=_difference_over_samples(first_PK, second_PK),
        detectable=_detectable(difference_P),
        p_value=float(p_value),
        num_problems=len(difference_P),
        better=int((difference_P > 0).sum()),
        worse=int((difference_P < 0).sum()),
    )


def _difference_over_samples(first_PK: CorrectArray, second_PK: CorrectArray) -> Interval | None:
    variances = [sampling_variance(each) for each in (first_PK, second_PK)]
    if None in variances:
        return None
    pairs = zip(variances, (first_PK, second_PK), strict=True)
    half = Z_TWO_SIDED * float(np.sqrt(sum(variance / each.size for variance, each in pairs if variance is not None)))
    difference = float(second_PK.mean() - first_PK.mean())
    return difference - half, difference + half


def _detectable(difference_P: npt.NDArray[np.float64]) -> float | None:
    if len(difference_P) < 2:
        return None
    return (Z_TWO_SIDED + Z_POWER) * float(difference_P.std(ddof=1) / np.sqrt(len(difference_P)))


def _bootstrap(value_P: npt.NDArray[np.float64], seed: int) -> Interval | None:
    if len(value_P) < 2:
        return None
    rng = np.random.default_rng(seed)
    resampled = np.concatenate(
        [value_P[rng.integers(len(value_P), size=(rows, len(value_P)))].mean(axis=1) for rows in _chunks(len(value_P))]
    )
    return _widened(resampled, float(value_P.mean()), len(value_P))


def _chunks(num_columns: int) -> list[int]:
    """RESAMPLES split so that no array has more than CHUNK_ELEMENTS elements."""
    rows = max(1, min(RESAMPLES, CHUNK_ELEMENTS // num_columns))
    return [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]


def _widened(resampled: npt.NDArray[np.float64], mean: float, n: int) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    factor = np.sqrt(n / (n - 1))
    return float(mean + factor * (low - mean)), float(mean + factor * (high - mean))
