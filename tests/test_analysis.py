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


def test_a_difference_is_in_points_and_its_interval_has_the_width_of_theory():
    before, after = made(0.5, seeds=3, seed=1), made(0.6, seeds=4, seed=2)
    interval = analysis.difference(before, after)
    assert interval.value == pytest.approx(100 * (after[:3].mean() - before.mean()))
    assert interval.low < 10 < interval.high
    # Images are drawn for all seeds at once: three seeds of independent answers have a third of the variance of one.
    width = 2 * 1.96 * 100 * ((0.25 + 0.24) / (3 * 2000)) ** 0.5
    assert width < interval.high - interval.low < 2 * width  # seeds are drawn, too


def test_pairs_that_agree_leave_no_doubt_about_their_difference():
    before = made(0.5)
    after = before.copy()
    assert analysis.difference(before, after) == (0, 0, 0)
    same_answers = np.repeat(before[:1], 3, 0)
    assert analysis.difference(same_answers, same_answers) == (0, 0, 0)


def test_seeds_that_disagree_widen_the_interval():
    steady, shaky = made(0.5, seed=3), made(0.5, seed=3)
    shaky[0], shaky[1] = made(0.4, 1, seed=4), made(0.6, 1, seed=5)
    base = made(0.5, seed=6)
    widths = [interval.high - interval.low for interval in (analysis.difference(base, r) for r in (steady, shaky))]
    assert widths[1] > 1.5 * widths[0]


def test_rank_agreement_is_one_for_the_papers_order_and_minus_one_for_its_reverse():
    order = sorted(STEPS, key=lambda step: paper.TABLE10[step].top1)
    distinct = {step: made(0.2 + 0.04 * i, images=4000, seed=i) for i, step in enumerate(order)}
    agreement = analysis.rank_agreement(distinct)
    assert agreement.value == pytest.approx(1, abs=0.01) and 0.8 < agreement.low < agreement.high <= 1
    reverse = {step: made(0.8 - 0.04 * i, images=4000, seed=i) for i, step in enumerate(order)}
    assert analysis.rank_agreement(reverse).value == pytest.approx(-1, abs=0.01)


def test_each_step_is_compared_with_the_one_it_grew_from():
    assert list(analysis.BEFORE) == list(STEPS)[1:]
    assert analysis.BEFORE["gelu"] == "kernel7" and analysis.BEFORE["kernel9"] == "kernel7"


def test_correct_predictions_come_in_the_order_of_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "runs.csv").write_text("trial,seed\nb,1\na,0\nb,0\n")
    runs = {"labels": [0, 1], "a/0": [0, 1], "b/0": [1, 1], "b/1": [0, 0]}
    np.savez(tmp_path / "made" / "predictions.npz", **{name: np.array(values) for name, values in runs.items()})
    right = analysis.correct("made")
    assert list(right) == ["b", "a"]
    assert right["b"].tolist() == [[False, True], [True, False]] and right["a"].tolist() == [[True, True]]
