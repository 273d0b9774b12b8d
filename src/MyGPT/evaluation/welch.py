"""Welch's t-test: how surprising is the difference between the means of two small samples? (Welch, Biometrika, 1947.)

The two samples may have different variances. The p-value needs the distribution function of Student's t, which is a
regularized incomplete beta function. It is computed here, because neither torch nor NumPy has it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Welch(NamedTuple):
    """The result of Welch's t-test."""

    t: float
    """The difference of the means, divided by its standard error."""
    degrees_of_freedom: float
    """The degrees of freedom after Welch and Satterthwaite; usually not a whole number."""
    p: float
    """Two-sided p-value: if the true means were equal, the probability of a difference at least as large."""


def welch_test(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Return Welch's t-test of the difference mean(second) - mean(first).

    Returns None if a sample has fewer than two values, or if all values within each sample are equal, because such samples
    say nothing about the spread.
    """
    if min(len(first), len(second)) < 2:
        return None
    errors = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    variance = math.fsum(errors)
    if variance == 0:
        return None
    t = (statistics.fmean(second) - statistics.fmean(first)) / math.sqrt(variance)
    shares = [error / variance for error in errors]
    freedom = 1 / sum(share**2 / (len(sample) - 1) for share, sample in zip(shares, (first, second), strict=True))
    return Welch(t, freedom, t_test_p(t, freedom))


def t_test_p(t: float, degrees_of_freedom: float) -> float:
    """Return the probability that the absolute value of Student's t is at least |t|."""
    square = t * t
    if square == math.inf:
        return 0.0
    x, rest = (part / (degrees_of_freedom + square) for part in (degrees_of_freedom, square))
    return incomplete_beta(degrees_of_freedom / 2, 0.5, x, rest)


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) for positive a and b, where `rest` is 1 - x.

    `rest` is an argument of its own because 1 - x would be inexact for x close to 1. Source: the continued fraction 8.17.22
    of the NIST Digital Library of Mathematical Functions.
    """
    if x == 0 or rest == 0:
        return float(rest == 0)
    if x > (a + 1) / (a + b + 2):  # The fraction converges quickly only below this x.
        return 1 - incomplete_beta(b, a, rest, x)
    log_factor = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    # Lentz's method for 1 + d_1 / (1 + d_2 / (1 + ...)). A tiny number replaces a denominator of zero.
    fraction, upper, lower = 1.0, 1.0, 0.0
    for n in range(1, 10_000):
        m = n // 2
        numerator = -(a + m) * (a + b + m) * x if n % 2 else m * (b - m) * x
        d = numerator / ((a + n - 1) * (a + n))
        lower = 1 / (1 + d * lower or 1e-300)
        upper = 1 + d / upper or 1e-300
        fraction *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return math.exp(log_factor) / (a * fraction)
