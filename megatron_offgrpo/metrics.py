"""Metrics that carry their reduction in their type, so that a sum is never averaged by mistake.

Adding two metrics of one type combines two parts of the same step (micro-batches, ranks).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sum:
    """value = sum of the parts."""

    value: float

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)

    def result(self) -> float:
        return self.value


@dataclass(frozen=True)
class Mean:
    """value = total / count over all parts; NaN where nothing was counted."""

    total: float
    count: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def result(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class Max:
    """value = largest of the parts; -inf where there was none."""

    value: float = -math.inf

    def __add__(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))

    def result(self) -> float:
        return self.value


Metric = Sum | Mean | Max
Metrics = dict[str, Metric]


def combine(parts: list[Metrics]) -> Metrics:
    """Reduces one step's metrics from several micro-batches or ranks; a name missing in a part is skipped."""
    combined: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            combined[name] = combined[name] + metric if name in combined else metric  # type: ignore[operator]
    return combined
