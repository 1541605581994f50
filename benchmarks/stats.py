"""The few statistics that a noisy machine allows: medians, spreads, and ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median, and the 20th and 80th percentiles."""

    p20: float
    median: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(samples), fifths[3])


def round_ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """How many times faster the second was, round by round: what slows a whole round cancels out."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def noise_of(ratios: Sequence[float]) -> float:
    """How far from 1 the ratios of one provider to itself lie: what the method cannot tell apart."""
    low, _, high = spread(ratios)
    return max(abs(low - 1), abs(high - 1))


def is_noise(ratio: float, noise: float) -> bool:
    """Whether a ratio of two providers is none that this run can tell from 1."""
    return abs(ratio - 1) <= noise
