"""How sure a score is: 95 % intervals of shares and of means. Questions count as independent of each other;
several about one image are not quite, so of those the true interval is somewhat wider."""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # 1.96


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Lowest and highest share that `successes` of `trials` are compatible with (Wilson 1927): never outside
    0 to 1, and of some width also where all or none succeed. (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, shrink = successes / trials, 1 + Z**2 / trials
    middle = (share + Z**2 / (2 * trials)) / shrink
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """A mean per token over answers of different length, sum(totals) / sum(counts), with its interval.

    totals, counts  of each answer: what it adds up to (a loss, or the difference of two), and its tokens
    returns         the mean, the lowest, the highest

    Answers are the sample, not tokens, which depend on each other: the spread is that of totals - mean *
    counts (the linearised ratio estimator of survey sampling; Cochran, Sampling Techniques, 1977, 6.4). Of a
    single answer the interval has no end.
    """
    number, tokens = len(totals), sum(counts)
    mean = math.fsum(totals) / tokens
    if number < 2:
        return mean, -math.inf, math.inf
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    half = Z * math.sqrt(number / (number - 1) * squares) / tokens
    return mean, mean - half, mean + half
