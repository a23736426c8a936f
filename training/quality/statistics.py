"""Figures with confidence intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

JACKKNIFE_PARTS = 10


@dataclass
class Score:
    """A figure and half the width of its 95% confidence interval, if it has one."""

    value: float
    half_width: float | None = None


def student_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, expanded around the normal one, accurate to 1% from 3 degrees of freedom on."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def mean_score(values: np.ndarray | list) -> Score:
    """The mean over independent images, with its interval: Student's, or for shares the farther end of Wilson's."""
    values = np.asarray(values, float)
    count, value = len(values), float(values.mean())
    if count < 2:
        return Score(value)
    if set(np.unique(values)) <= {0.0, 1.0}:
        return share_score(value, count)
    return Score(value, float(student_quantile(count - 1) * values.std(ddof=1) / count**0.5))


def share_score(value: float, count: int) -> Score:
    """A share of `count` independent images, or a mean of values from 0 to 1, whose spread is at most that of a share."""
    if count < 2:
        return Score(value)
    t = student_quantile(count - 1)
    centre = (value + t**2 / (2 * count)) / (1 + t**2 / count)
    half = t / (1 + t**2 / count) * (value * (1 - value) / count + t**2 / (4 * count**2)) ** 0.5
    return Score(value, abs(centre - value) + half)


def panel_score(values: np.ndarray) -> Score:
    """The share of independent images that judges find correct, from `(J, N)` values of 0 and 1; its interval covers both
    the choice of images and the choice of judges.
    """
    over_images = share_score(float(values.mean()), values.shape[1])
    means = values.mean(1)
    if over_images.half_width is None or len(means) < 2:
        return over_images
    over_judges = student_quantile(len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return Score(over_images.value, float(np.hypot(over_images.half_width, over_judges)))


def jackknife_score(distance: Callable[[np.ndarray], float], drawn: np.ndarray) -> Score:
    """The distance of a set `(N, D)`, and its interval by leaving out each of up to ten parts of it in turn.

    (Resampling with replacement would bias FD and KID, which rely on all images being different.)
    """
    parts = np.array_split(np.random.default_rng(0).permutation(len(drawn)), min(JACKKNIFE_PARTS, len(drawn)))
    if len(parts) < 3 or len(drawn) - max(map(len, parts)) < 2:
        return Score(distance(drawn))
    without = np.array([distance(np.delete(drawn, part, axis=0)) for part in parts])
    spread = ((len(parts) - 1) * np.square(without - without.mean()).mean()) ** 0.5
    return Score(distance(drawn), float(student_quantile(len(parts) - 1) * spread))
