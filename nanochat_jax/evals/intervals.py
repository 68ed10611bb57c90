"""Shares with confidence intervals: accuracies, and pass@k from several samples of each problem."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # standard deviations around the mean that hold 95 % of the normal distribution


class Share(NamedTuple):
    """An estimated share and its 95 % interval, all in 0..1."""

    value: float
    low: float
    high: float


def share(scores: Sequence[float] | np.ndarray, trials: float = 1) -> Share:
    """The mean of scores [P] in 0..1, one for each problem; the interval is over the draw of problems.

    This is Wilson's interval with p (1 - p) / (variance of the mean) in place of the number of trials, as for clustered
    surveys (Franco et al. 2019, J. Survey Statistics and Methodology 7(3)). A problem counts as at least 1 trial and at
    most `trials`; with scores of 0 and 1 it is Wilson's own interval. Where all scores are equal a problem counts as 1
    trial, so the interval never has width 0. ValueError: no scores, or one outside 0..1.
    """
    scores = np.asarray(scores, np.float64).ravel()
    if not scores.size or not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"an interval needs at least one score, each between 0 and 1, got {scores[:5]}")
    p, variance = scores.mean(), scores.var()
    n = scores.size * (min(max(p * (1 - p) / variance, 1.0), trials) if variance > 0 else 1.0)
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Share(float(p), max(0.0, min(float(p), middle - half)), min(1.0, max(float(p), middle + half)))


def pass_at_k(passed: np.ndarray) -> dict[int, Share]:
    """passed bool [P,n] -> {k: share of problems that k samples solve at least once} for k = 1..n.

    For a problem that c of n samples solve, 1 - C(n - c, k) / C(n, k) is an unbiased estimate (arXiv 2107.03374), here
    as one minus the product of (n - c - i) / (n - i) over i < k: binomials of thousands have thousands of digits. The
    interval is that of `share`; a problem counts as at most n / k trials, its groups of k samples.
    """
    passed = np.asarray(passed, bool)
    if passed.ndim != 2 or not passed.size:
        raise ValueError(f"pass@k needs at least one problem and one sample, got passed of shape {passed.shape}")
    n, solved = passed.shape[1], passed.sum(1)
    counts, problem = np.unique(solved, return_inverse=True)
    drawn = np.arange(n)
    unsolved = np.cumprod(np.maximum(n - counts[:, None] - drawn, 0) / (n - drawn), axis=1)  # [counts,n]: by k samples
    return {k: share(1 - unsolved[problem, k - 1], n / k) for k in range(1, n + 1)}
