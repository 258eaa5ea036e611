"""
How often the 95 % intervals of `grkd_trl.evaluation.statistics` hold the true share of right answers, and the true
difference of two methods, in simulated studies:

    python examples/benchmarks/interval_coverage.py --num_studies 4000

Seeds and items shift the log-odds of a right answer by normal draws. Prints a table in Markdown, the lowest coverage over
the true rates of each row.
"""

import argparse
from functools import cache

import numpy as np
from scipy.special import expit

from grkd_trl.evaluation.statistics import bootstrap_estimate, paired_difference


SPREADS = {"none": (0.0, 0.0), "of items": (0.0, 2.0), "of items, some of seeds": (0.3, 2.0), "of both": (1.0, 1.0)}
RATES = (0.05, 0.3, 0.5, 0.9, 0.99)


@cache
def log_odds_of(rate: float, spread: float) -> float:
    """Log-odds around which normal draws give a mean rate, by bisection."""
    draws = spread * np.random.default_rng(0).standard_normal(400_000)
    low, high = -60.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(middle + draws).mean() < rate else (low, middle)
    return low


def studies(rng: np.random.Generator, shape: tuple, rates: tuple, spreads: tuple) -> list[np.ndarray]:
    """Right and wrong answers of methods with these true rates, tested on the same items."""
    num, seeds, items = shape
    of_items = spreads[1] * rng.standard_normal((num, 1, items))
    shifts = [
        log_odds_of(rate, np.hypot(*spreads)) + spreads[0] * rng.standard_normal((num, seeds, 1)) for rate in rates
    ]
    return [(rng.random(shape) < expit(shift + of_items)).astype(float) for shift in shifts]


def coverage(args, seeds: int, items: int, spreads: tuple, *, paired: bool) -> float:
    """The lowest over the true rates; of differences, to a method that is right in 0.8 times as many."""
    rng, lowest = np.random.default_rng(seeds * 10_000 + items), 1.0
    for rate in RATES:
        num = max(args.num_studies // (1 + items // 500), 100)
        if paired:
            values, baseline = studies(rng, (num, seeds, items), (rate, 0.8 * rate), spreads)
            truth, estimate = 0.2 * rate, paired_difference(values, baseline)
        else:
            (values,) = studies(rng, (num, seeds, items), (rate,), spreads)
            truth, estimate = rate, bootstrap_estimate(values)
        lowest = min(lowest, float(np.mean((estimate.low <= truth) & (truth <= estimate.high))))
    return lowest


def main(args):
    sizes = [(seeds, items) for seeds in args.seeds for items in args.items]
    print("| | spread | " + " | ".join(f"{seeds} x {items}" for seeds, items in sizes) + " |")
    print("|---|---|" + "---|" * len(sizes))
    for paired in (False, True):
        for name, spreads in SPREADS.items():
            found = [coverage(args, *size, spreads, paired=paired) for size in sizes]
            cells = " | ".join(f"{value:.3f}" for value in found)
            print(f"| {'difference' if paired else 'share'} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_studies", type=int, default=4000, help="of each kind, fewer where items are many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5], help="training runs in a study")
    parser.add_argument("--items", type=int, nargs="+", default=[3, 20, 200, 2000], help="test items in a study")
    main(parser.parse_args())
