"""Tables and figures of results say what the files say."""

import json

import numpy as np
import pytest
from recorded import IMAGES, write_csv, write_experiment

from convnext_min.book import result_figures, results


@pytest.fixture
def ablation(results_folder):
    """Of 200 images the plain runs get 100 right, a good change 140 with two seeds and 138, a bad one 90."""
    labels = np.arange(IMAGES) % 10
    right = {("plain", 0): 100, ("plain", 1): 100, ("good", 0): 140, ("good", 1): 138, ("bad", 0): 90}
    answers = {
        f"{trial}/{seed}": np.where(np.arange(IMAGES) < n, labels, labels + 1) for (trial, seed), n in right.items()
    }
    seconds = {"plain": 100, "good": 150, "bad": 100}  # on the fast machine, which made the first seeds
    rows = [
        {"trial": trial, "seed": seed, "cpu": ("fast", "slow")[seed], "cpu_seconds": (1 + seed) * seconds[trial]}
        for trial, seed in right
    ]
    write_csv(results_folder / "small_data_ablation" / "runs.csv", rows)
    np.savez(results_folder / "small_data_ablation" / "predictions.npz", labels=labels, **answers)
    points = [{"step": 10, "top1": ""}, {"step": 20, "top1": 0.5}]
    curves = [{"trial": trial, "seed": seed} | point for trial, seed in right for point in points]
    write_csv(results_folder / "small_data_ablation" / "curves.csv", curves)


def test_curves_are_numbers_by_trial_and_seed(ablation):
    logs = result_figures.curves("small_data_ablation")
    assert list(logs) == [("plain", 0), ("plain", 1), ("good", 0), ("good", 1), ("bad", 0)]
    assert logs["good", 1] == [{"step": 10.0, "top1": None}, {"step": 20.0, "top1": 0.5}]


def test_changes_are_compared_with_their_base_and_sorted(ablation):
    plain, good, bad = result_figures.ablation_table(["bad", "good"]).rows
    assert plain == ("plain", "50.0\xa0±\xa00.0", "2", "", "1.00")
    assert good[:3] == ("good", "69.5\xa0±\xa00.7", "2") and good[3].startswith("+19.5 (") and good[4] == "1.50"
    assert bad[:3] == ("bad", "45.0", "1") and bad[3].startswith("-5.0 (") and bad[4] == "1.00"
    base, other = result_figures.ablation_table(["bad"], base="good").rows
    assert base[0] == "good" and other[3].startswith("-24.5 (")  # 45 minus the mean of 70 and 69


def test_every_seed_of_a_change_is_a_dot(ablation):
    ax = result_figures.ablation_gains(["bad", "good"]).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["good", "bad"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert np.concatenate([line.get_xdata() for line in dots]) == pytest.approx([20, 19, -5])
    assert [len(line.get_xdata()) for line in dots] == [2, 1]


@pytest.fixture
def runs(results_folder):
    made = []
    for label, run, minutes, top1 in (
        ("ours", "a", 3, 0.6),
        ("ours", "b", 3, 0.62),
        ("ours", "c", 10, 0.7),
        ("x", "d", 3, 0.4),
        ("ours", "slower", 3, 0.5),
    ):
        path = results_folder / "imagenette" / run
        log = [{"epoch": 1.0, "step": 10, "seconds": 30 * minutes, "train_loss": 2.0, "top1": ""}]
        log += [
            {"epoch": minutes * 2.0, "step": minutes * 20, "seconds": 60 * minutes, "train_loss": 1.5, "top1": top1}
        ]
        write_csv(path / "log.csv", log)
        machine = {"cpu": "A"} | ({"capability": "AVX2"} if run == "slower" else {})
        summary = {"recipe": {"minutes": minutes}, "top1": top1, "images": IMAGES, "machine": machine}
        (path / "summary.json").write_text(json.dumps(summary))
        made.append((label, run))
    return made


def test_runs_with_the_same_label_processor_and_minutes_are_one_row(runs, results_folder):
    assert result_figures.timed_table(runs).rows == (
        ("ours", "A", "3", "61.0\xa0±\xa01.4", "2", "6.0", "60"),
        ("ours", "A", "10", "70.0", "1", "20.0", "200"),
        ("x", "A", "3", "40.0", "1", "6.0", "60"),
        ("ours", "A, AVX2", "3", "50.0", "1", "6.0", "60"),
    )
    path = results_folder / "imagenette" / "d" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": IMAGES - 1}))
    with pytest.raises(ValueError, match=r"different numbers of images: \[199, 200\]"):
        result_figures.timed_table(runs)


def test_timed_runs_are_drawn_by_label_and_processor(runs):
    fig = result_figures.timed_runs(runs)
    (ax,), (legend,) = fig.axes, fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours; A", "x; A", "ours; A, AVX2"]
    line, dots = ax.lines[:2]
    assert list(line.get_ydata()) == pytest.approx([61, 70]) and list(dots.get_ydata()) == pytest.approx([60, 62, 70])
    ours, other = ax.lines[1], ax.lines[7]  # the same recipe: one colour, told apart by the filling
    assert ours.get_color() == other.get_color() and ours.get_markerfacecolor() != other.get_markerfacecolor()


def test_the_timed_runs_of_the_book_are_recorded_and_pairs_have_one_processor():
    for label, run in result_figures.TIMED_RUNS + result_figures.TRIED_RUNS:
        command = result_figures.command(run)
        assert command.startswith("python -m convnext_min.train --recipe ") and "--output" not in command
        assert ("timm" in command) == (label == "timm")
    for pair in result_figures.TIMED_PAIRS + result_figures.TRIED_PAIRS:
        one, other = (results.values(f"imagenette/{run}/summary.json") for run in pair)
        assert results.processor(one) == results.processor(other)
        assert one["recipe"]["minutes"] == other["recipe"]["minutes"]


def test_a_log_is_a_table_of_its_epochs():
    row = {"epoch": 2, "resolution": 64, "images_per_second": 501.2, "lr": 1e-3, "train_loss": 2, "val_loss": 1.5}
    table = result_figures.log_table([row | {"top1": 0.25, "ema_top1": 0.3}])
    assert table.rows == (("2", "64", "501", "1.0e-03", "2.00", "1.50", "25.0%", "30.0%"),)


def test_a_contest_has_a_row_for_each_implementation(results_folder):
    speed, one = {"median": 297.5, "low": 288.4, "high": 301.0}, {"median": 1.0, "low": 1.0, "high": 1.0}
    results_ = {
        "convnext_min": {"images_per_second": speed, "ratio": one, "setting": "bf16, NCHW, eager"},
        "timm": {
            "images_per_second": {"median": 129.06, "low": 124.05, "high": 129.6},
            "ratio": {"median": 2.304, "low": 2.221, "high": 2.342},
            "setting": "fp32, NCHW, eager",
        },
    }
    (results_folder / "speed").mkdir()
    outcome = {"model": "convnext_atto", "resolution": 128, "batch_size": 32, "mode": "train", "results": results_}
    (results_folder / "speed" / "train.json").write_text(json.dumps(outcome))
    assert result_figures.benchmark_table("train").rows == (
        ("convnext_atto, 128 px, 32 images", "convnext_min", "298 (288–301)", "", "bf16, NCHW, eager"),
        ("", "timm", "129 (124–130)", "2.30 (2.22–2.34)", "fp32, NCHW, eager"),
    )
    results_["timm"]["images_per_second"] = {"median": 2.96, "low": 2.6, "high": 3.64}
    (results_folder / "speed" / "train.json").write_text(json.dumps(outcome))
    fast, slow = (row[2] for row in result_figures.benchmark_table("train").rows)
    assert slow == "3.0 (2.6–3.6)" and fast == "297.5 (288.4–301.0)"  # a decimal in all rows, for the slowest


def test_the_memory_of_each_implementation_is_a_row(results_folder):
    (results_folder / "speed").mkdir()
    measured = {
        name: {"setting": "bf16, NCHW, eager", "megabytes": megabytes}
        for name, megabytes in (("convnext_min", 980), ("timm", 1014))
    }
    outcome = {"model": "convnext_tiny", "resolution": 224, "batch_size": 8, "memory": measured}
    (results_folder / "speed" / "memory.json").write_text(json.dumps(outcome))
    assert result_figures.memory_table("memory").rows == (
        ("convnext_tiny, 224 px, 8 images", "convnext_min", "980", "bf16, NCHW, eager"),
        ("convnext_tiny, 224 px, 8 images", "timm", "1,014", "bf16, NCHW, eager"),
    )


def test_the_speeds_on_a_gpu_are_beside_those_of_the_paper(results_folder):
    (results_folder / "speed" / "gpu").mkdir(parents=True)
    lines = ["size,setting,convnext,ratio", 'T,"tf32, eager",5892.4,1.262', '"B, 384","tf32, eager",1006.7,1.577']
    lines += ['T,"bf16, torch.compile",12147.3,1.244']
    (results_folder / "speed" / "gpu" / "throughput.csv").write_text("\n".join(lines))
    table = result_figures.gpu_table()
    assert table.header[3:] == ("tf32, eager", "bf16, torch.compile")
    assert table.rows == (
        ("T", "224", "1,944 (1.47)", "5,892 (1.26)", "12,147 (1.24)"),
        ("B", "384", "337 (1.39)", "1,007 (1.58)", ""),
    )


def test_the_profile_of_an_iteration_ends_with_the_goal(results_folder):
    (results_folder / "speed").mkdir()
    contest = {"convnext_min": {"ratio": {"median": 1}}, "a": {"ratio": {"median": 1.5}}, "b": {"ratio": {"median": 2}}}
    (results_folder / "speed" / "race.json").write_text(json.dumps({"results": contest}))
    part = {"setting": "A", "network": "n", "contest": "speed/race.json", "milliseconds": {"products": 60, "rest": 40}}
    tried = {"change": "c", "network": "n", "before": 10.2, "after": 9.6, "kept": False}
    product = {"rows": 2048, "inputs": 40, "outputs": 160, "MKL": 65, "oneDNN": 64, "ours": 98}
    record = {"parts": [part], "tried": [tried], "products": [product]}
    (results_folder / "speed" / "tried.json").write_text(json.dumps(record))
    rows = dict(result_figures.iteration_profile().rows)
    assert rows["products"] == "60 (60%)" and rows["all together"] == "100"
    assert rows["at three times the speed of the fastest other"] == "50"  # 100 ms are 1.5 times as fast
    assert result_figures.tried_changes().rows == (("c", "n", "10", "10", "left out"),)
    assert result_figures.product_speeds().rows == (("2,048\xa0×\xa040 by 40\xa0×\xa0160", "65", "64", "98"),)


def test_curves_of_trials_and_their_averages(results_folder):
    rows = [
        {"trial": trial, "seed": 0, "epoch": 1, "step": 10, "train_loss": 2, "top1": 0.5, "ema_top1": averaged}
        for trial, averaged in (("plain", 0.4), ("good", 0.3), ("bad", 0.2))
    ]
    write_csv(results_folder / "small_data_ablation" / "curves.csv", rows)
    left, right = result_figures.trial_curves(["plain", "good"]).axes
    assert [line.get_label() for line in left.lines[:2]] == ["plain", "good"]
    assert right.lines[0].get_ydata()[0] == 50 and right.lines[2].get_ydata()[0] == 10  # guessing
    weights, short, long = result_figures.ema_curves({"plain": "short", "bad": "long"}).axes[0].lines
    assert [line.get_label() for line in (weights, short, long)] == ["the weights", "short", "long"]
    assert (short.get_ydata()[-1], long.get_ydata()[-1]) == (40, 20)


def test_errors_in_common_are_compared_with_chance():
    wrong = np.array([[True, True, False, False], [True, False, False, False]])  # error rates 1/2 and 1/4
    ax = result_figures.errors_in_common(wrong).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [2, 1, 1]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([4 * 3 / 8, 4 * 4 / 8, 4 * 1 / 8])


def test_confusions_count_images_of_a_class_by_their_answer():
    ax = result_figures.confusions(np.array([0, 0, 0, 2]), np.array([1, 1, 2, 0]), ("a", "b", "c")).axes[0]
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((1, 0), "2"),
        ((2, 0), "1"),
        ((0, 2), "1"),
    }
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]


def test_isotropic_networks_are_compared_at_the_rate_of_each(results_folder):
    write_experiment(
        results_folder, "isotropic_lr", {"convnext, 0.002": [90], "convnext, 0.001": [80], "vit, 0.001": [70]}
    )
    (ax,) = result_figures.isotropic_rates().axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines == {"isotropic ConvNeXt": [[0.001, 40], [0.002, 45]], "ViT": [[0.001, 35]]}
    write_experiment(results_folder, "isotropic", {"convnext, 0.002": [100, 104], "vit, 0.001": [90]})
    convnext, vit = result_figures.isotropic_table().rows
    assert convnext[0] == "isotropic ConvNeXt" and convnext[3:] == ("0.002", "51.0\xa0±\xa01.4", "2", "1.0")
    assert vit[1:4] == ("0.70", "49", "0.001") and vit[4:6] == ("45.0", "1")


def test_few_images_are_shown_by_method_with_a_dot_per_run(results_folder):
    trials = {"linear probe, 5": [100, 110], "linear probe, 20": [120], "from scratch, 5": [80]}
    columns = {
        "method": lambda trial: trial.rpartition(", ")[0],
        "images_per_class": lambda trial: trial.rpartition(", ")[2],
        "value": lambda trial: 0.01,
    }
    write_experiment(results_folder, "few_images", trials, **columns)
    (ax,) = result_figures.few_images_curves().axes
    probe = next(line for line in ax.lines if line.get_label() == "linear probe")
    assert probe.get_xydata().tolist() == [[5, 52.5], [20, 60]]
    dots = [line.get_xydata().round(6).tolist() for line in ax.lines if line.get_alpha()]
    assert dots == [[[5, 50], [5, 55]], [[20, 60]], [[5, 40]]]
    (scratch,) = result_figures.few_images_gains("linear probe").rows
    assert scratch[0] == "from scratch" and scratch[1] == "-10.0 (-10.0\xa0to\xa0-10.0)" and scratch[2] == ""
    rows = {row[0]: row[1:] for row in result_figures.few_images_table().rows}
    assert rows["linear probe"] == ("52.5\xa0±\xa03.5 (0.01)", "60.0 (0.01)") and rows["from scratch"][1] == ""


def test_runs_with_few_iterations_are_counted_at_their_ends(results_folder):
    logs = [
        {"trial": trial, "seed": seed, "epoch": epoch, "step": 10 * epoch + seed}
        for trial, last in (("small", 4), ("large", 2))
        for seed in range(2)
        for epoch in (1, last)
    ]
    write_csv(results_folder / "slow_processor" / "curves.csv", logs)
    write_experiment(results_folder, "slow_processor", {"small": [120, 124], "large": [100, 100]})
    large, small = result_figures.few_iterations_table().rows
    assert small == ("small", "61.0\xa0±\xa01.4", "2", "4.0", "40")
    assert large[3:] == ("2.0", "20")


def test_changes_of_the_three_minutes_are_compared_with_the_recipe(results_folder):
    ends = {"the recipe": 4, "worse": 3, "better": 6}
    logs = [{"trial": name, "seed": 0, "epoch": 1.5 * end, "step": 10 * end} for name, end in ends.items()]
    write_csv(results_folder / "three_minutes" / "curves.csv", logs)
    write_experiment(results_folder, "three_minutes", {"the recipe": [120], "worse": [100], "better": [130]})
    base, better, worse = result_figures.three_minutes_table().rows
    assert base == ("the recipe", "60.0", "", "6.0", "40")
    assert better[0] == "better" and better[2].startswith("+5.0 (") and better[3:] == ("9.0", "60")
    assert worse[0] == "worse" and worse[2].startswith("-10.0 (")


def test_evaluations_of_a_run_are_one_group_of_rows(results_folder):
    (results_folder / "imagenette").mkdir()
    evaluations = [
        {"run": run, "images": 1953, "resolution": resolution, "top1": 0.5, "mirrored": mirrored}
        for run, resolution, mirrored in (("a", 96, 0.512), ("a", 128, 0.52), ("b", 96, 0.53))
    ]
    (results_folder / "imagenette" / "tried.json").write_text(json.dumps({"evaluations": evaluations}))
    assert result_figures.evaluations_table().rows == (
        ("a; 1,953 images", "96", "50.0%", "51.2%"),
        ("", "128", "50.0%", "52.0%"),
        ("b; 1,953 images", "96", "50.0%", "53.0%"),
    )


def test_changes_of_the_optimizer_follow_the_run_without_them(results_folder):
    log = [{"epoch": epoch, "val_loss": 0.7 / epoch, "ema_top1": 0.4 * epoch} for epoch in (1, 2)]
    write_csv(results_folder / "imagenette" / "held_out" / "10min" / "log.csv", log)
    changes = [{"change": "a", "top1": 0.875, "val_loss": 0.3256, "epochs": 1.96}]
    (results_folder / "imagenette" / "tried.json").write_text(json.dumps({"optimizers": changes}))
    assert result_figures.optimizers_table().rows == (
        ("second version", "80.0%", "0.350", "2.0"),
        ("a", "87.5%", "0.326", "2.0"),
    )


def test_larger_and_mirrored_images_gain_a_mean_over_the_changed_networks(results_folder):
    (results_folder / "imagenette").mkdir()
    rows = [
        {"change": "a", "epochs": 26.03, "val_loss": 0.4859, "top1": 0.870, "mirrored": 0.875, "larger": 0.865},
        {"change": "b", "epochs": 30.8, "val_loss": 0.4746, "top1": 0.866, "mirrored": 0.869, "larger": 0.874},
    ]
    both = [row | {"larger, mirrored": row["top1"] + 0.004} for row in rows]
    (results_folder / "imagenette" / "tried.json").write_text(json.dumps({"changes": both}))
    assert result_figures.changes_table().rows == (("a", "26.0", "87.0%", "0.486"), ("b", "30.8", "86.6%", "0.475"))
    assert result_figures.evaluation_gains().rows == (
        ("with the mirror image", "+0.4", "+0.3", "+0.5"),
        ("larger images", "+0.2", "-0.5", "+0.8"),
        ("larger images, with the mirror image", "+0.4", "+0.4", "+0.4"),
    )


@pytest.mark.parametrize("name", ["predictions", "answers"])
def test_predictions_of_earlier_runs_have_another_name(name, results_folder):
    (results_folder / "imagenette" / "one").mkdir(parents=True)
    np.savez(
        results_folder / "imagenette" / "one" / "predictions.npz",
        **{name: np.uint16([1, 2]), "labels": np.uint16([1, 1])},
    )
    found, labels = result_figures.predictions("one")
    assert list(found) == [1, 2] and list(labels) == [1, 1] and found.dtype == int
