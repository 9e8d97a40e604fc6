"""95 % intervals: they hold what is true as often as they say."""

import math
import random

import pytest

from trainer.intervals import ratio, wilson


def test_wilson_as_published():
    """Newcombe, Statistics in Medicine 17 (1998), table I: the score method without continuity correction."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def test_a_share_lies_in_its_interval_as_often_as_is_said():
    """Exactly, over all outcomes of 60 questions: near 95 of 100, for rare and for even shares."""
    for share in (0.1, 0.25, 0.5, 0.9):
        held = sum(
            math.comb(60, k) * share**k * (1 - share) ** (60 - k)
            for k in range(61)
            if wilson(k, 60)[0] <= share <= wilson(k, 60)[1]
        )
        assert 0.92 < held < 0.98, share


def test_a_mean_per_token_lies_in_its_interval_as_often_as_is_said():
    """Answers of 2 to 30 tokens, of which the short ones cost more per token."""
    draw = random.Random(0)

    def sample(size: int) -> tuple[list[float], list[int]]:
        counts = [draw.randint(2, 30) for _ in range(size)]
        return [count * (1 + 3 / count) + draw.gauss(0, count**0.5) for count in counts], counts

    true = 1 + 3 / 16  # the mean of 2 to 30 is 16
    found = [ratio(*sample(100)) for _ in range(1000)]
    held = sum(low <= true <= high for _, low, high in found)
    assert 920 <= held <= 975
    assert all(low < mean < high for mean, low, high in found)


def test_a_single_answer_has_no_interval_and_equal_ones_none_of_any_width():
    assert ratio([3.0], [2]) == (1.5, -math.inf, math.inf)
    assert ratio([3.0, 6.0], [2, 4]) == (1.5, 1.5, 1.5)
