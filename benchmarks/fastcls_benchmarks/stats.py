"""The few statistics that a noisy machine allows: medians, spreads, and ratios within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median, and the 20th and 80th percentiles."""

    p20: float
    median: float
    p80: float


def percentile(samples: Sequence[float], percent: int) -> float:
    """The percentile of at least one sample, interpolated between neighbours."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def spread(samples: Sequence[float]) -> Spread:
    """The spread of at least one sample."""
    return Spread(percentile(samples, 20), statistics.median(samples), percentile(samples, 80))


def round_ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """How many times faster the second was, round by round: the slowness of a whole round cancels out."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


class Interval(NamedTuple):
    """A median and its interval of about 95 % confidence."""

    low: float
    median: float
    high: float


def median_interval(samples: Sequence[float]) -> Interval:
    """The interval that follows from the spread of at least two samples.

    For n normal samples with deviation s, the 20th and 80th percentiles lie about 0.84 s from the middle, and 95 % of
    medians within 1.96 * 1.25 s / sqrt(n). The factor is somewhat larger than the resulting 2.9, because percentiles of
    few samples lie too far in. It uses percentiles, because now and then a sample is far out.
    """
    low, median, high = spread(samples)
    error = 3.5 * (high - low) / 2 / math.sqrt(len(samples) - 1)
    return Interval(median - error, median, median + error)


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the median ratio of a provider to itself may lie: the method cannot resolve less."""
    low, _, high = median_interval(ratios)
    return max(abs(low - 1), abs(high - 1))
