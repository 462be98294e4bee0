"""Statistics of runs: the one way in which reports and benchmarks compare arms."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def paired(differences: Sequence[float]) -> tuple[float, list[float] | None]:
    """Returns the mean of paired differences and Student's 95 % interval around it, which is None for one pair."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, None
    half = float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return mean, [mean - half, mean + half]
