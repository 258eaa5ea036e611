"""Intervals, paired differences and corrected p-values for a few seeds on many test items."""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import expit, logit


_ROUNDING = 1e-12  # of the values: an error below it is no spread
_MOST_RESAMPLED = 20_000  # means of more seeds or items do not lean, by the central limit theorem


class Estimate(NamedTuple):
    """
    A mean and what is known about it. Numbers, or arrays where several comparisons were given.

    Args:
        mean (`float`):
            Mean over seeds and items, in the unit of the values.
        low (`float`):
            Lower limit of the interval; `nan` where nothing is known of the spread: a single value, or numbers that are
            all equal and no outcomes.
        high (`float`):
            Upper limit, `nan` as above.
        p_value (`float`):
            Two-sided p-value of the mean being 0; `nan` as above, and for shares of outcomes, where it has no meaning.
    """

    mean: Any
    low: Any
    high: Any
    p_value: Any


def bootstrap_estimate(
    values: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    r"""
    Mean over seeds and items with an interval for both: what another training run *and* another test set would give.

    Seeds and items are resampled independently, each with replacement (the crossed bootstrap of [Owen
    (2007)](https://arxiv.org/abs/0712.1111)). Resampling three or five seeds finds too little spread, and a cell's
    own noise is counted twice. So the bootstrap says how the interval leans, and the two-way analysis of variance how
    wide it is: with mean squares of seeds, items and cells,

    \\( \mathrm{se}^2 = (MS_{seeds} + \max(0, MS_{items} - MS_{cells})) / (S I) \\),

    and the t quantile at Satterthwaite's degrees of freedom, in which the seeds weigh (S + 1) / (S - 1) times their
    share: estimated from so few, that share is too small in most studies. In simulations with 2 to 10 seeds, whatever
    their share, 94.3 to 96.2 % of the 95 % intervals held the truth (without the weight 92.7 % and up; the plain
    percentile bootstrap 76 % where three seeds differ most to 99.7 % where they do not). One seed leaves the items alone,
    and one item (a metric that is known as a whole) the seeds alone. Numbers without any spread have no interval.

    Outcomes (each value 0, 1/4, 1/2, 3/4 or 1) need neither spread nor symmetry, since it is known how far they can lie
    apart. Two items that are always right and two that are always wrong are added ([Agresti and Coull
    1998](https://doi.org/10.1080/00031305.1998.10480550)), the seeds' mean square has its weight in the error too (5.5
    for two seeds), which is at least that of independent cells, and of the t intervals of the share and of its log-odds each gives its further limit. At least 93 % of
    these hold the truth with 2 to 5 seeds and 3 to 2000 items, many more
    where items are few: `examples/guides/benchmarks.md` has the table.

    Args:
        values (`np.ndarray`):
            One value for each of S seeds and I items, `(..., S, I)`: right or wrong as 1 and 0, or a score. Every seed
            was tested on the same items. Leading dimensions are separate estimates.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of intervals that should hold the true mean, between 0 and 1.
        num_resamples (`int`, *optional*, defaults to `2000`):
            Bootstrap resamples, at least 100.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples; equal seeds give equal intervals.

    Returns:
        [`Estimate`]: Of shape `(...)`.

    Raises:
        `ValueError`: If the values are not at least one finite number for a seed and an item, or an option lies outside
            its range.

    Example:

    ```python
    >>> accuracy = bootstrap_estimate(np.array([[1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]]))
    >>> float(accuracy.mean)
    0.75

    ```
    """
    values = _checked(values, confidence, num_resamples)
    if _are_outcomes(values):
        return _of_outcomes(values, confidence, difference=False)
    return _of_numbers(values, confidence, num_resamples, seed, size=values)


def _are_outcomes(*values: np.ndarray) -> bool:
    return all(np.isin(part, (0, 0.25, 0.5, 0.75, 1)).all() for part in values)


def _of_numbers(values: np.ndarray, confidence: float, num_resamples: int, seed: int, *, size: np.ndarray) -> Estimate:
    """Mean of numbers, which are rounded in proportion to `size`: differences to what they were made of."""
    mean = values.mean((-2, -1))
    squared_error, freedom = _squared_error(values)
    error = np.sqrt(squared_error)
    error = np.where(error > _ROUNDING * np.abs(size).max((-2, -1)), error, np.nan)
    tail = (1 - confidence) / 2
    below = above = np.zeros_like(mean)
    if max(values.shape[-2:]) <= _MOST_RESAMPLED:
        resampled = _resampled_means(values, num_resamples, seed)
        below, above = np.abs(np.quantile(resampled, [tail, 1 - tail], axis=-1) - mean)
    width = 2 * stats.t.ppf(1 - tail, freedom) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        lean = np.where(below + above > 0, below / (below + above), 0.5)
    p_value = (2 * stats.t.sf(np.abs(mean) / error, freedom))[()]  # a number where there are no leading dimensions
    return Estimate(mean, mean - width * lean, mean + width * (1 - lean), p_value)


def _checked(values: np.ndarray, confidence: float, num_resamples: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim < 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(
            f"`values` must be finite numbers of shape (seeds, items), got shape {values.shape} with "
            f"{(~np.isfinite(values)).sum()} that are not finite: leave failed runs out, whole."
        )
    if not 0 < confidence < 1 or num_resamples < 100:
        raise ValueError(
            "`confidence` must lie between 0 and 1 and `num_resamples` be 100 or above, got "
            f"{confidence} and {num_resamples}."
        )
    return values


def _of_outcomes(values: np.ndarray, confidence: float, *, difference: bool) -> Estimate:
    """Share of outcomes, from 0 to 1, or mean difference of two outcomes, from -1 to 1."""
    mean = values.mean((-2, -1))
    if values.shape[-2:] == (1, 1):
        return Estimate(mean, *([np.full(mean.shape, np.nan)[()]] * 3))
    if values.shape[-1] == 1:  # what is added are items, so seeds alone take their place
        values = np.swapaxes(values, -1, -2)
    added = (1.0, -1.0) if difference else (1.0, 1.0, 0.0, 0.0)  # of differences: Bonett and Price 2012
    extended = np.concatenate([values, np.broadcast_to(added, (*values.shape[:-1], len(added)))], -1)
    squared_error, freedom = _squared_error(extended, of_outcomes=True)
    center, error = extended.mean((-2, -1)), np.sqrt(squared_error)
    width = stats.t.ppf((1 + confidence) / 2, freedom) * error
    low, high = center - width, center + width
    if difference:
        p_value = (2 * stats.t.sf(np.abs(center) / error, freedom))[()]
    else:
        log_odds, scale = logit(center), center * (1 - center)
        low, high = np.minimum(low, expit(log_odds - width / scale)), np.maximum(high, expit(log_odds + width / scale))
        p_value = np.full(mean.shape, np.nan)[()]
    return Estimate(mean, np.clip(low, -1.0 if difference else 0.0, mean), np.clip(high, mean, 1.0), p_value)


def _squared_error(values: np.ndarray, *, of_outcomes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    num_seeds, num_items = values.shape[-2:]
    if num_seeds == 1 or num_items == 1:
        rows = values.reshape(*values.shape[:-2], -1)
        size = rows.shape[-1]
        if size == 1:
            return np.full(values.shape[:-2], np.nan), np.full(values.shape[:-2], np.nan)
        return rows.var(-1, ddof=1) / size, np.full(values.shape[:-2], size - 1.0)
    mean = values.mean((-2, -1), keepdims=True)
    of_seeds, of_items = values.mean(-1, keepdims=True), values.mean(-2, keepdims=True)
    free_seeds, free_items = num_seeds - 1, num_items - 1
    seeds = num_items * ((of_seeds - mean) ** 2).sum((-2, -1)) / free_seeds
    items = num_seeds * ((of_items - mean) ** 2).sum((-2, -1)) / free_items
    cells = ((values - of_seeds - of_items + mean) ** 2).sum((-2, -1)) / (free_seeds * free_items)
    beyond_noise = np.maximum(items - cells, 0)
    weighed = seeds * (5.5 if of_outcomes and free_seeds == 1 else (free_seeds + 2) / free_seeds)
    total = np.maximum(weighed + beyond_noise, cells) if of_outcomes else seeds + beyond_noise
    spread = weighed**2 / free_seeds
    spread += np.where(beyond_noise > 0, items**2 / free_items + cells**2 / (free_seeds * free_items), 0)
    with np.errstate(invalid="ignore"):
        freedom = np.where(spread > 0, (weighed + beyond_noise) ** 2 / spread, free_seeds)
    return total / (num_seeds * num_items), np.maximum(freedom, free_seeds)


def _resampled_means(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    num_seeds, num_items = values.shape[-2:]
    generator = np.random.default_rng(seed)
    weights = [
        generator.multinomial(size, np.full(size, 1 / size), num_resamples) / size for size in (num_seeds, num_items)
    ]
    return np.einsum("...sr,rs->...r", values @ weights[1].T, weights[0])


def paired_difference(
    values: np.ndarray, baseline: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """
    Difference of two methods that were run with the same seeds and tested on the same items, as [`bootstrap_estimate`]
    of the differences: what seeds and items do to both alike cancels. To differences of outcomes one item is added that
    only the first method solves and one that only the other does ([Bonett and Price
    2012](https://doi.org/10.3102/1076998611411915)), so that a few items on which all agree prove nothing.

    Args:
        values (`np.ndarray`):
            Values of one method, `(..., S, I)`.
        baseline (`np.ndarray`):
            Values of the other, of the same shape.
        confidence (`float`, *optional*, defaults to `0.95`):
            See [`bootstrap_estimate`].
        num_resamples (`int`, *optional*, defaults to `2000`):
            See [`bootstrap_estimate`].
        seed (`int`, *optional*, defaults to `0`):
            See [`bootstrap_estimate`].

    Returns:
        [`Estimate`]: Of `values - baseline`; above 0 where `values` is the higher. Its p-value is not corrected for
            other comparisons: see [`holm_p_values`].

    Raises:
        `ValueError`: If the shapes differ.
    """
    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if values.shape != baseline.shape:
        raise ValueError(
            f"A paired difference needs the same seeds and items on both sides, got shapes {values.shape} and "
            f"{baseline.shape}: keep the seeds that both methods finished."
        )
    difference = _checked(values - baseline, confidence, num_resamples)
    if _are_outcomes(values, baseline):
        return _of_outcomes(difference, confidence, difference=True)
    size = np.maximum(np.abs(values), np.abs(baseline))
    return _of_numbers(difference, confidence, num_resamples, seed, size=size)


def holm_p_values(p_values: np.ndarray) -> np.ndarray:
    """
    P-values corrected for the number of comparisons, by [Holm (1979)](https://www.jstor.org/stable/4615733): calling
    every difference below 0.05 real names a false one in at most 5 % of studies, however the comparisons depend on
    each other.

    Args:
        p_values (`np.ndarray`):
            P-values of M comparisons, `(..., M)`. `nan` (a comparison that could not be made) stays and is not counted.

    Returns:
        `np.ndarray`: Corrected p-values, of the same shape.

    Example:

    ```python
    >>> holm_p_values(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.06, 0.06]

    ```
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, axis=-1)  # nan last
    ranked = np.take_along_axis(p_values, order, -1)
    remaining = (~np.isnan(p_values)).sum(-1, keepdims=True) - np.arange(p_values.shape[-1])
    stepped = np.minimum(np.maximum.accumulate(ranked * np.maximum(remaining, 1), axis=-1), 1)
    corrected = np.empty_like(p_values)
    np.put_along_axis(corrected, order, stepped, -1)
    return np.where(np.isnan(p_values), np.nan, corrected)
