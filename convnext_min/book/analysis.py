"""Statistics of the recorded experiments: accuracies, differences with 95% intervals, and agreement with the paper.

All numbers follow from the predictions of each run for each validation image (predictions.npz of an experiment). An
interval for a difference covers other runs of the same training, on the same images. Its standard error comes from
the scatter between seeds, pooled over all trials of an experiment: two or three seeds alone do not give a useful one.
Pooling assumes that all trials scatter alike. For a trial that scatters more, compare with its own scatter as well.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, spearmanr, t

from convnext_min import paper
from convnext_min.book import results
from convnext_min.roadmap import PREVIOUS, STEPS

MARGIN = 1.0  # points; a smaller difference counts as none
NBSP = "\N{NO-BREAK SPACE}"  # keeps the parts of an interval on one line of a narrow table

Correct = np.ndarray  # bool (seeds, images): True where the prediction is correct


class Interval(NamedTuple):
    """An estimate and the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{round(number, 1) + 0.0:+.1f}" for number in self)  # 0.0 + turns -0.0 into 0.0
        return f"{value} ({low}{NBSP}to{NBSP}{high})"

    @property
    def clear(self) -> bool:
        """Return True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def negligible(self) -> bool:
        """Return True if the whole interval is within MARGIN of zero: only then a change "makes no difference"."""
        return max(abs(self.low), abs(self.high)) < MARGIN


class Accuracy(NamedTuple):
    """Top-1 in percent: mean over seeds and their standard deviation, nan for one seed."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if np.isnan(self.std) else f"{NBSP}±{NBSP}{self.std:.1f}")


class Scatter(NamedTuple):
    """Standard deviation of top-1 between seeds, in points, and its degrees of freedom."""

    std: float
    freedom: int


class RankAgreement(NamedTuple):
    """Spearman's rank correlation, and the probability of at least as high a one between lists without relation."""

    correlation: float
    chance: float


class Agreement(NamedTuple):
    """The number of signs, out of `total`, that agree, and the probability of at least as many by chance."""

    agreeing: int
    total: int
    chance: float


def correct(experiment: str) -> dict[str, Correct]:
    """Return the correctness of each trial's predictions, trials in the order of their runs, seeds ascending."""
    predictions = results.arrays(f"{experiment}/predictions.npz")
    labels = predictions.pop("labels")
    runs = [(row["trial"], int(row["seed"])) for row in results.rows(f"{experiment}/runs.csv")]
    return {
        trial: np.stack([predictions[f"{trial}/{seed}"] == labels for name, seed in sorted(runs) if name == trial])
        for trial in dict(runs)
    }


def recipe_by_architecture() -> dict[str, Correct]:
    """Return the correctness of both ends of the road by "<end>, <recipe>", recipes "road-classic" and "road".

    The runs with the recipe "road" are the road's own.
    """
    road = correct("road")
    return correct("recipe_by_architecture") | {f"{end}, road": road[end] for end in ("resnet50", "convnext")}


def by_seed(right: Correct) -> np.ndarray:
    """Return the top-1 of each run in percent, (seeds,)."""
    return 100 * right.mean(1)


def top1(right: Correct) -> Accuracy:
    """Return the mean top-1 and the standard deviation between seeds."""
    values = by_seed(right)
    return Accuracy(values.mean(), values.std(ddof=1) if len(values) > 1 else float("nan"))


def scatter(right: Mapping[str, Correct]) -> Scatter | None:
    """Return the scatter between seeds, pooled over trials, or None if every trial has one seed."""
    runs = [by_seed(of_trial) for of_trial in right.values()]
    freedom = sum(len(values) - 1 for values in runs)
    squares = sum(((values - values.mean()) ** 2).sum() for values in runs)
    return Scatter(float(squares / freedom) ** 0.5, freedom) if freedom else None


def difference(before: Correct, after: Correct, pooled: Scatter | None = None, comparisons: int = 1) -> Interval:
    """Return top-1 of `after` minus top-1 of `before`, in points, with a t interval for the difference of two means.

    `pooled` is the scatter of the experiment; without it, the scatter of these two trials. Seeds are not paired: runs
    of one seed differ as much as runs of different seeds. With `comparisons`, all that many intervals hold at once
    with a probability of 95% or more (Bonferroni). Two single runs without `pooled` get an interval for other images
    in place of other runs.
    """
    gap = by_seed(after).mean() - by_seed(before).mean()
    pooled = pooled or scatter({"before": before, "after": after})
    if pooled is None:
        return _over_images(before[0], after[0])
    error = pooled.std * (1 / len(before) + 1 / len(after)) ** 0.5
    half = t.ppf(1 - 0.025 / comparisons, pooled.freedom) * error
    return Interval(gap, gap - half, gap + half)


def interaction(first: tuple[Correct, Correct], second: tuple[Correct, Correct], pooled: Scatter) -> Interval:
    """Return the gain from before to after in `second` minus the gain in `first`, in points, with a t interval."""
    (a, b), (c, d) = ([by_seed(right).mean() for right in pair] for pair in (first, second))
    error = pooled.std * sum(1 / len(right) for right in (*first, *second)) ** 0.5
    half = t.ppf(0.975, pooled.freedom) * error
    value = (d - c) - (b - a)
    return Interval(value, value - half, value + half)


def _over_images(before: np.ndarray, after: np.ndarray) -> Interval:
    """Return the difference between two trained networks, with an interval for other images of the same kind."""
    gaps = 100 * (after.astype(float) - before)  # (images,)
    half = 1.96 * gaps.std() / len(gaps) ** 0.5
    return Interval(gaps.mean(), gaps.mean() - half, gaps.mean() + half)


def changes(right: Mapping[str, Correct]) -> dict[str, Interval]:
    """Return the change of top-1 at each step of the road, with 95% intervals that hold for all steps at once."""
    steps = {step: before for step, before in PREVIOUS.items() if step in right and before in right}
    pooled = scatter(right)
    return {step: difference(right[before], right[step], pooled, len(steps)) for step, before in steps.items()}


def published_change(step: str) -> float | None:
    """Return the change of top-1 at a step of Table 10, in points; None at the start or without both rows."""
    if step not in PREVIOUS or not {step, PREVIOUS[step]} <= set(paper.TABLE10):
        return None
    return paper.TABLE10[step].top1 - paper.TABLE10[PREVIOUS[step]].top1


def sign_agreement(ours: Mapping[str, Interval]) -> Agreement:
    """Return the number of our changes, by step, with the sign of the paper's, where that exists and is not 0."""
    signs = [change.value * published_change(step) > 0 for step, change in ours.items() if published_change(step)]
    chance = binomtest(sum(signs), len(signs), alternative="greater").pvalue
    return Agreement(sum(signs), len(signs), float(chance))


def rank_agreement(right: Mapping[str, Correct]) -> RankAgreement:
    """Return the rank correlation between our mean top-1 and the paper's (Table 10), over the steps of the road."""
    steps = [step for step in STEPS if step in right and step in paper.TABLE10]
    ours = [by_seed(right[step]).mean() for step in steps]
    found = spearmanr(ours, [paper.TABLE10[step].top1 for step in steps], alternative="greater")
    return RankAgreement(float(found.statistic), float(found.pvalue))
