"""What the committed runs say: accuracies with their spread, paired differences, and agreement with the paper.

Everything is computed from the answers that each run gave to each validation image (predictions.npz of an experiment).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from convnext_min import paper
from convnext_min.book import results
from convnext_min.roadmap import STEPS

DRAWS = 2000  # of a bootstrap
NBSP = "\N{NO-BREAK SPACE}"  # in a narrow table, numbers that belong together stay on one line
# What each step of the road is compared with: the one before it, but after the kernel sizes it goes on from 7.
BEFORE = dict(zip(list(STEPS)[1:], STEPS)) | {"gelu": "kernel7"}

Right = np.ndarray  # bool (seeds, images): whether the run with that seed was right about that image


class Interval(NamedTuple):
    """An estimate, and the bounds between which 95% of a bootstrap's values lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f}{NBSP}to{NBSP}{self.high:+.1f})"


class Accuracy(NamedTuple):
    """Top-1 in percent: mean over seeds, and their standard deviation, nan for one seed."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if np.isnan(self.std) else f"{NBSP}±{NBSP}{self.std:.1f}")


def correct(experiment: str) -> dict[str, Right]:
    """For each trial of an experiment, in the order of its runs, where its runs were right, the seeds in order."""
    answers = results.arrays(f"{experiment}/predictions.npz")
    labels = answers.pop("labels")
    runs = [(row["trial"], int(row["seed"])) for row in results.rows(f"{experiment}/runs.csv")]
    return {
        trial: np.stack([answers[f"{trial}/{seed}"] == labels for name, seed in sorted(runs) if name == trial])
        for trial in dict(runs)
    }


def top1(right: Right) -> Accuracy:
    """How often runs were right, with the scatter of the seeds."""
    by_seed = 100 * right.mean(1)
    return Accuracy(by_seed.mean(), by_seed.std(ddof=1) if len(by_seed) > 1 else float("nan"))


def difference(before: Right, after: Right) -> Interval:
    """Top-1 of `after` minus that of `before`, in points: runs of the same seed saw the same batches, so they pair.

    The bootstrap draws seeds and images with replacement, so that the interval holds the chance of training as far as
    so few seeds can show it, and the chance of having been asked about these images.
    """
    seeds = min(len(before), len(after))
    gaps = after[:seeds].astype(np.float32) - before[:seeds]
    return Interval(100 * gaps.mean(), *_bounds(_resampled(gaps).mean(1) * 100))


def rank_agreement(right: Mapping[str, Right]) -> Interval:
    """Spearman's rank correlation, over the steps of the road, between our top-1 and the paper's (Table 10).

    The bootstrap draws our seeds and images again, the same for all steps, and the paper's means with the standard
    error that its standard deviations over three seeds give.
    """
    steps = [step for step in STEPS if step in right]
    published = np.array([paper.TABLE10[step].top1 for step in steps])
    errors = np.array([paper.TABLE10[step].std for step in steps]) / 3**0.5
    ours = np.stack([right[step].mean() for step in steps])
    drawn = np.stack([_resampled(right[step].astype(np.float32)).mean(1) for step in steps], 1)  # (DRAWS, steps)
    noise = np.random.default_rng(1).normal(size=drawn.shape) * errors
    values = [spearmanr(a, b).statistic for a, b in zip(drawn, published + noise)]
    return Interval(spearmanr(ours, published).statistic, *_bounds(values))


def _resampled(values: np.ndarray) -> np.ndarray:
    """(seeds, images) to (DRAWS, seeds): seeds drawn with replacement, each a mean over images drawn so, too."""
    seeds, images = values.shape
    counts, drawn = _draws(seeds, images)
    return np.take_along_axis(counts @ values.T / images, drawn, 1)


@lru_cache(2)
def _draws(seeds: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each image is drawn (DRAWS, images), and which seeds (DRAWS, seeds): the same for all comparisons."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(np.float32)
    return counts, rng.integers(seeds, size=(DRAWS, seeds))


def _bounds(values) -> tuple[float, float]:
    return tuple(np.percentile(values, (2.5, 97.5)))
