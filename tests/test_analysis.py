"""The statistics of experiments: right where the answer is known, and honest about what few seeds can show."""

import numpy as np
import pytest

from convnext_min import paper
from convnext_min.book import analysis, results
from convnext_min.roadmap import STEPS


def made(accuracy, seeds=3, images=2000, seed=0):
    return np.random.default_rng(seed).random((seeds, images)) < accuracy


def test_top1_is_mean_and_standard_deviation_over_seeds():
    right = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    assert analysis.top1(right) == (50.0, 25.0)
    assert analysis.top1(right[:1])[0] == 75.0 and np.isnan(analysis.top1(right[:1])[1])
    assert [str(analysis.top1(answers)) for answers in (right, right[:1])] == ["50.0\xa0±\xa025.0", "75.0"]


def runs(rng, seeds, accuracy=0.7, seed_std=0.011, images=5250):
    """Return runs whose top-1 scatters by 1.1 points between seeds and by 0.63 points through the images."""
    counts = rng.binomial(images, np.clip(rng.normal(accuracy, seed_std, seeds), 0, 1))
    return np.arange(images) < counts[:, None]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_truth_as_often_as_they_promise(seeds):
    rng, alone, at_once = np.random.default_rng(seeds), [], []
    for _ in range(300):
        right = {step: runs(rng, seeds) for step in STEPS}  # no step changes anything
        pooled = analysis.scatter(right)
        single = [analysis.difference(right[a], right[b], pooled) for b, a in analysis.PREVIOUS.items()]
        alone += [not interval.clear for interval in single]
        at_once.append(not any(change.clear for change in analysis.changes(right).values()))
    assert np.mean(alone) == pytest.approx(0.95, abs=0.012)
    assert 0.93 < np.mean(at_once) < 0.99  # all 15 hold together


def test_two_trials_without_others_get_wider_intervals_that_cover_too():
    rng = np.random.default_rng(0)
    covered = [not analysis.difference(runs(rng, 2), runs(rng, 2)).clear for _ in range(600)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_trial_that_scatters_more_needs_its_own_scatter(seeds):
    rng, pooled_covers, own_covers = np.random.default_rng(seeds), [], []
    for _ in range(600):
        right = {step: runs(rng, seeds, seed_std=0.03 if step == "convnext" else 0.011) for step in STEPS}
        before, after = right["layer_norm"], right["convnext"]
        pooled_covers.append(not analysis.difference(before, after, analysis.scatter(right)).clear)
        own_covers.append(not analysis.difference(before, after).clear)
    assert np.mean(pooled_covers) < 0.85
    assert np.mean(own_covers) == pytest.approx(0.94, abs=0.025)


def test_a_difference_is_in_points_and_uses_all_seeds():
    before, after = made(0.5, seeds=3, seed=1), made(0.6, seeds=4, seed=2)
    interval = analysis.difference(before, after, analysis.Scatter(1.0, 30))
    assert interval.value == pytest.approx(100 * (after.mean() - before.mean()))
    assert interval.high - interval.value == pytest.approx(2.042 * (1 / 3 + 1 / 4) ** 0.5, abs=1e-3)
    wider = analysis.difference(before, after, analysis.Scatter(1.0, 30), comparisons=15)
    assert wider.high - wider.value == pytest.approx(3.189 * (1 / 3 + 1 / 4) ** 0.5, abs=1e-3)


def test_an_interaction_is_the_difference_of_two_gains_with_the_error_of_four_means():
    cells = [made(0.5, 3, seed=1), made(0.6, 2, seed=2)], [made(0.4, 3, seed=3), made(0.7, 5, seed=4)]
    interval = analysis.interaction(*cells, analysis.Scatter(1.0, 30))
    (a, b), (c, d) = ([100 * right.mean() for right in pair] for pair in cells)
    assert interval.value == pytest.approx(d - c - b + a)
    assert interval.high - interval.value == pytest.approx(2.042 * (1 / 3 + 1 / 2 + 1 / 3 + 1 / 5) ** 0.5, abs=1e-3)


def test_scatter_is_pooled_over_trials_by_their_degrees_of_freedom():
    one = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)  # 25% and 75%: variance 1250
    three = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)  # variance 625
    std, freedom = analysis.scatter({"a": one, "b": three, "c": one[:1]})
    assert freedom == 3 and std == pytest.approx(((1250 + 2 * 625) / 3) ** 0.5)
    assert analysis.scatter({"c": one[:1]}) is None


def test_two_single_runs_are_compared_over_images():
    before, after = made(0.5, 1, 4000, seed=1), made(0.6, 1, 4000, seed=2)
    interval = analysis.difference(before, after)
    half = 1.96 * 100 * (0.49 / 4000) ** 0.5  # variances 0.25 and 0.24 of independent answers
    assert interval.high - interval.value == pytest.approx(half, rel=0.03)
    assert analysis.difference(before, before) == (0, 0, 0)


def test_an_interval_has_no_negative_zero():
    assert str(analysis.Interval(-0.04, -0.2, 0.04)) == "+0.0 (-0.2\xa0to\xa0+0.0)"


def test_no_difference_takes_an_interval_within_one_point():
    assert analysis.Interval(0.1, -0.8, 0.9).negligible and not analysis.Interval(0.1, -0.8, 1.1).negligible
    assert not analysis.Interval(0.1, -0.8, 0.9).clear
    assert analysis.Interval(2.0, 1.1, 2.9).clear and analysis.Interval(-2.0, -2.9, -1.1).clear


def test_sign_agreement_has_its_chance_probability():
    changes = {step: analysis.Interval(analysis.published_change(step), 0, 0) for step in list(STEPS)[1:]}
    assert analysis.sign_agreement(changes)[:2] == (14, 14)  # kernel 9 changes nothing in the paper
    turned = {step: analysis.Interval(-changes[step].value, 0, 0) for step in ("fewer_norms", "layer_norm", "convnext")}
    clear = {
        step: changes[step] for step in ("depthwise", "width", "inverted", "move_up", "gelu", "fewer_acts", "kernel7")
    }
    agreement = analysis.sign_agreement(clear | turned | {"patchify": analysis.Interval(-1, 0, 0)})
    assert agreement[:2] == (7, 11) and agreement.chance == pytest.approx(0.274, abs=1e-3)


def test_rank_agreement_is_one_for_the_papers_order_and_minus_one_for_its_reverse():
    order = sorted(STEPS, key=lambda step: paper.TABLE10[step].top1)
    distinct = {step: made(0.2 + 0.04 * i, images=4000, seed=i) for i, step in enumerate(order)}
    correlation, chance = analysis.rank_agreement(distinct)
    assert correlation == pytest.approx(1, abs=0.01) and chance < 1e-6
    reverse = {step: made(0.8 - 0.04 * i, images=4000, seed=i) for i, step in enumerate(order)}
    assert analysis.rank_agreement(reverse) == pytest.approx((-1, 1), abs=0.01)


def test_correct_predictions_come_in_the_order_of_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "runs.csv").write_text("trial,seed\nb,1\na,0\nb,0\n")
    runs = {"labels": [0, 1], "a/0": [0, 1], "b/0": [1, 1], "b/1": [0, 0]}
    np.savez(tmp_path / "made" / "predictions.npz", **{name: np.array(values) for name, values in runs.items()})
    right = analysis.correct("made")
    assert list(right) == ["b", "a"]
    assert right["b"].tolist() == [[False, True], [True, False]] and right["a"].tolist() == [[True, True]]
