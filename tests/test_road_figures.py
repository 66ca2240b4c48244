"""Figures and tables of the small runs of the road say what the files say."""

import numpy as np
import pytest
from matplotlib.container import BarContainer
from recorded import write_csv, write_experiment

from convnext_min import paper
from convnext_min.book import analysis, road_figures
from convnext_min.roadmap import STEPS


@pytest.fixture
def road(results_folder):
    """Runs of every step with two seeds, each step 10 images of 2,000 better than the one before."""
    labels = np.arange(2000) % 10
    answers, rows = {}, []
    for i, step in enumerate(STEPS):
        for seed in range(2):
            right = np.arange(2000) < 1000 + 10 * i
            answers[f"{step}/{seed}"] = np.where(right, labels, labels + 1)
            rows.append({"trial": step, "seed": seed, "cpu_seconds": 60 * (i + 1)})
    write_csv(results_folder / "road" / "runs.csv", rows)
    np.savez(results_folder / "road" / "predictions.npz", labels=labels, **answers)


def test_the_road_is_compared_step_by_step_with_the_paper(road):
    table = road_figures.by_step()
    first, second, *_, last = table.rows
    assert table.header[1] == "top-1 (%), 2 seeds"
    assert first == ("ResNet-50", "50.0\xa0±\xa00.0", "", "")
    assert second[:2] == ("stage ratio", "50.5\xa0±\xa00.0")
    assert second[2].startswith("+0.5 (") and second[3] == "+0.54"
    assert last[0] == "separate downsampling" and last[3] == "+0.50"
    (gelu,) = road_figures.by_step("gelu").rows
    assert gelu[2].startswith("+1.5 (") and gelu[3] == "+0.05"  # after kernel 7, three steps earlier


def bars(ax):
    """The widths of the bars of each kind by the number of their row."""
    return [
        {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in kind}
        for kind in ax.containers
        if isinstance(kind, BarContainer)
    ]


def test_bars_of_the_road_are_gains_over_resnet50(road):
    (ax,) = road_figures.gains().axes
    theirs, ours = bars(ax)
    assert theirs[15] == pytest.approx(81.97 - 78.82) and theirs[0] == 0
    assert ours == pytest.approx({i: 0.5 * i for i in range(16)})
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [pytest.approx([0.5 * i] * 2) for i in range(16)]


def test_a_road_step_without_a_published_row_has_our_numbers_alone(road, monkeypatch):
    monkeypatch.setattr(paper, "TABLE10", {slug: row for slug, row in paper.TABLE10.items() if slug != "kernel9"})
    (kernel9,) = road_figures.by_step("kernel9").rows
    assert kernel9[:2] == ("kernel9", "54.5\xa0±\xa00.0") and kernel9[2].startswith("+0.5 (") and kernel9[3] == ""
    row = list(STEPS).index("kernel9")
    theirs, ours = bars(*road_figures.gains().axes)
    assert len(theirs) == 15 and row not in theirs
    assert ours[row] == pytest.approx(0.5 * row)
    right = analysis.correct("road")
    assert analysis.sign_agreement(analysis.changes(right)).total == 13  # of 15: kernel11 follows kernel9
    assert np.isfinite(analysis.rank_agreement(right).correlation)


def test_each_network_of_the_road_is_a_dot_at_its_time_and_accuracy(road):
    (ax,) = road_figures.costs().axes
    means, runs = ax.lines[::2], ax.lines[1::2]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in means]
    assert dots == [(i + 1, pytest.approx(50 + 0.5 * i)) for i in range(16)]
    assert [list(line.get_ydata()) for line in runs] == [pytest.approx([50 + 0.5 * i] * 2) for i in range(16)]
    assert ax.texts[0].get_text() == "ResNet-50"


def ends(results_folder, experiment, conditions):
    """Runs under each condition: ConvNeXt is right on 100 of 1,000 images more than ResNet-50, with fan-in on 150."""
    labels, answers, rows = np.zeros(1000), {}, []
    for i, condition in enumerate(conditions):
        for end, more in (("resnet50", 0), ("convnext", 100), ("convnext, fan-in init", 150)):
            rows.append({"trial": f"{end}, {condition}", "seed": 0})
            answers[f"{end}, {condition}/0"] = (np.arange(1000) >= 400 + 100 * i + more).astype(int)
    write_csv(results_folder / experiment / "runs.csv", rows)
    np.savez(results_folder / experiment / "predictions.npz", labels=labels, **answers)


def test_fractions_are_drawn_over_the_part_of_the_images(results_folder):
    ends(results_folder, "convnext_init/data_and_length", ("10% of the images", "all images"))
    ax = road_figures.fraction_curves([("10% of the images", 0.1), ("all images", 1.0)]).axes[0]
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines["ConvNeXt, 0.02"].get_xdata()) == [10, 100]
    assert list(lines["ConvNeXt, 0.02"].get_ydata()) == pytest.approx([50, 60])
    assert list(lines["ConvNeXt, fan-in"].get_ydata()) == pytest.approx([55, 65])


def test_both_recipes_are_compared_on_both_networks(results_folder):
    trials = {"resnet50, road-classic": [40, 42], "convnext, road-classic": [50, 50]}
    write_experiment(results_folder, "recipe_by_architecture", trials, 100)
    write_experiment(results_folder, "road", {"resnet50": [60, 60], "gelu": [99], "convnext": [50, 54]}, 100)
    ax = road_figures.recipe_grid().axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.lines if not line.get_label().startswith("_")}
    assert lines == {"ResNet-50": pytest.approx([41, 60]), "ConvNeXt": pytest.approx([50, 52])}
    for name, suffix in (("recipe_by_architecture", ", road-classic"), ("road", "")):
        curves = [
            {"trial": f"{end}{suffix}", "seed": seed, "epoch": 1, "train_loss": 1 + seed + len(suffix)}
            for end in ("resnet50", "convnext")
            for seed in range(2)
        ]
        write_csv(results_folder / name / "curves.csv", curves)
    classic, small = road_figures.loss_by_recipe().axes
    assert classic.get_title() == "classic recipe" and [line.get_ydata()[0] for line in classic.lines] == [15.5, 15.5]
    assert [line.get_ydata()[0] for line in small.lines] == [1.5, 1.5]
    times = [{"trial": end, "cpu_seconds": t} for end in ("resnet50", "convnext") for t in (60, 120, 600)]
    write_csv(results_folder / "road" / "runs.csv", times)
    assert road_figures.times_by_recipe().rows[1] == ("small-run recipe", "2.0", "2.0")


def test_learning_rates_have_a_line_per_network(results_folder):
    losses = {"resnet50, 0.004": 1.1, "resnet50, 0.002": 1.3, "gelu, 0.001": 2.0}
    logs = [{"trial": t, "seed": 0, "epoch": e, "val_loss": loss / e} for t, loss in losses.items() for e in (1, 2)]
    write_csv(results_folder / "road_lr" / "curves.csv", logs)
    (ax,) = road_figures.learning_rates().axes
    line, road = ax.lines
    assert list(line.get_xdata()) == [0.002, 0.004] and list(line.get_ydata()) == pytest.approx([0.65, 0.55])
    assert road.get_xdata()[0] == 0.004


@pytest.fixture
def last_steps(results_folder):
    """One step of the road whose best rate is the road's, and three whose best rate is lower."""
    lrs = [("fewer_acts, 0.004", 3.0), ("layer_norm, 0.004", 2.0), ("layer_norm, 0.002", 1.5)]
    lrs += [("layer_norm, 0.001", 1.7), ("fewer_norms, 0.002", 1.5), ("convnext, 0.002", 1.5)]
    logs = [{"trial": t, "seed": 0, "epoch": e, "val_loss": loss / e} for t, loss in lrs for e in (1, 2)]
    write_csv(results_folder / "road_lr" / "curves.csv", logs)
    steps = ("resnet50", "fewer_acts", "fewer_norms", "layer_norm", "convnext")
    write_experiment(results_folder, "road", {step: [50 + i, 52 + i] for i, step in enumerate(steps)}, 100)
    tuned = {"fewer_norms, 0.002": [70, 72], "layer_norm, 0.002": [60, 62], "convnext, 0.002": [59, 61]}
    write_experiment(results_folder, "road_tuned", tuned, 100)
    both = {"fewer_norms, 0.002": [71, 73], "layer_norm, 0.002": [64, 66], "convnext, 0.002": [64, 64]}
    write_experiment(results_folder, "road_tuned_fan_in", both, 100)
    narrow = {"fewer_norms": [54, 56], "layer_norm": [44, 46], "convnext": [30, 32]}
    inits = {"fewer_norms, fan-in": [57], "layer_norm, fan-in": [58, 60], "convnext, fan-in": [64, 66]}
    write_experiment(
        results_folder,
        "road_init",
        inits | {f"{step}, truncated normal 0.02": right for step, right in narrow.items()},
        100,
    )


def test_the_rate_of_a_step_is_the_one_with_the_lowest_final_held_out_loss(last_steps):
    best = {"fewer_acts": 0.004, "layer_norm": 0.002, "fewer_norms": 0.002, "convnext": 0.002}
    assert road_figures.best_rates() == best


def test_rates_are_listed_with_their_loss_in_the_order_of_the_road(last_steps):
    header, rows = road_figures.rates_table().header, road_figures.rates_table().rows
    assert header[1:4] == ("0.001", "0.002", "0.004")
    assert [row[0] for row in rows] == ["fewer activations", "fewer norms", "BN to LN", "separate downsampling"]
    assert rows[2] == ("BN to LN", "0.850", "0.750", "1.000", "0.002") and rows[0][1:4] == ("", "", "1.500")


@pytest.fixture
def own_rates(results_folder):
    """Three steps whose best rate is the road's, another, and another without runs."""
    best = {"move_up": 0.004, "kernel5": 0.004, "kernel7": 0.008, "gelu": 0.004, "fewer_acts": 0.002}
    losses = {f"{step}, {lr:g}": 1 + (lr != best[step]) for step in best for lr in (0.002, 0.004, 0.008)}
    logs = [{"trial": trial, "seed": 0, "epoch": 1, "val_loss": loss} for trial, loss in losses.items()]
    write_csv(results_folder / "road_lr" / "curves.csv", logs)
    write_experiment(results_folder, "road", {step: [50 + i, 52 + i] for i, step in enumerate(best)}, 100)
    write_experiment(results_folder, "gelu_and_lr", {"kernel7, 0.008": [70, 72], "kernel7, 0.002": [10, 12]}, 100)
    write_experiment(results_folder, "road_tuned", {"gelu, 0.008": [90, 90]}, 100)


def test_changes_at_own_rates_are_between_networks_at_their_best_rates(own_rates):
    rows = road_figures.changes_at_own_rates().rows
    assert [row[:3] for row in rows] == [
        ("move up depthwise", "0.004", "51.0\xa0±\xa01.4"),
        ("kernel 5", "0.004", "52.0\xa0±\xa01.4"),
        ("kernel 7", "0.008", "71.0\xa0±\xa01.4"),
        ("ReLU to GELU", "0.004", "54.0\xa0±\xa01.4"),
    ]
    assert [[cell.split(" (")[0] for cell in row[4:]] for row in rows] == [
        ["", "", "-0.72"],
        ["+1.0", "+1.0", "+0.43"],
        ["+19.0", "+1.0", "+0.22"],
        ["-17.0", "+1.0", "+0.05"],
    ]
    assert [row[3] for row in rows] == ["2"] * 4


def test_a_step_without_runs_at_its_best_rate_is_left_out(own_rates):
    assert "fewer_acts" in road_figures.best_rates() and "fewer_acts" not in road_figures.at_own_rates()


def test_the_last_steps_are_compared_with_the_same_step_on_the_road(last_steps):
    rows = road_figures.variants_table(road_figures.OWN_RATE).rows
    assert [row[0] for row in rows] == ["fewer norms", "BN to LN", "separate downsampling"]  # the road's rate is not
    assert rows[1][1:5] == ("54.0\xa0±\xa01.4", "own learning rate, 0.002", "61.0\xa0±\xa01.4", "2")
    assert rows[1][5].startswith("+7.0 (")
    *_, single, row = road_figures.variants_table("fan-in", "truncated normal 0.02").rows
    assert single[2] == "fan-in" and row[2] == "truncated normal 0.02" and row[5].startswith("-24.0 (")


def test_the_last_changes_are_between_networks_of_the_same_variant(last_steps):
    header, rows = road_figures.last_changes().header, road_figures.last_changes().rows
    assert header[1:] == ("BN to LN", "separate downsampling", "both steps")
    assert [row[0] for row in rows] == list(road_figures.VARIANTS)
    assert [[cell.split(" (")[0] for cell in row[1:]] for row in rows] == [
        ["+1.0", "+1.0", "+2.0"],
        ["+2.0", "+6.0", "+8.0"],
        ["-10.0", "-14.0", "-24.0"],
        ["-10.0", "-1.0", "-11.0"],
        ["-7.0", "-1.0", "-8.0"],
    ]


def test_variants_are_dots_with_lines_through_their_means(last_steps):
    ax = road_figures.variants().axes[0]
    lines = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "-"]
    assert lines[0] == pytest.approx([52, 53, 54, 55])  # as on the road, without ResNet-50
    assert lines[1:] == [pytest.approx(line) for line in ([57, 59, 65], [55, 45, 31], [71, 61, 60], [72, 65, 64])]


def test_gelu_is_compared_with_relu_at_each_rate(results_folder):
    write_experiment(results_folder, "road", {"kernel7": [60, 62], "resnet50": [99, 99], "gelu": [63, 65]}, 100)
    lower = {"kernel7, 0.002": [50, 50], "gelu, 0.002": [50, 50], "kernel7, 0.001": [44], "gelu, 0.001": [43]}
    write_experiment(results_folder, "gelu_and_lr", lower, 100)
    rows = road_figures.gelu_by_rate().rows
    assert [row[0] for row in rows] == ["0.001", "0.002", "0.004"]
    assert [row[4].split(" (")[0] for row in rows] == ["-1.0", "+0.0", "+3.0"]
    assert rows[2][1:4] == ("2", "61.0\xa0±\xa01.4", "64.0\xa0±\xa01.4")


def test_networks_with_the_small_data_recipe_have_their_own_rates(results_folder):
    steps, lrs = ("resnet50", "fewer_acts", "convnext"), (0.004, 0.008)
    logs = [
        {"trial": f"{step}, {lr:g}", "seed": 0, "epoch": 5, "val_loss": abs(lr - best)}
        for step, best in zip(steps, (0.004, 0.008, 0.008))
        for lr in lrs
    ]
    write_csv(results_folder / "small_recipe_lr" / "curves.csv", logs)
    trials = {"resnet50, 0.004": [60, 62], "fewer_acts, 0.008": [70, 72], "convnext, 0.008": [58, 60]}
    write_experiment(results_folder, "small_recipe_by_architecture", trials, 100)
    first, second, third = road_figures.small_recipe_table().rows
    assert first == ("ResNet-50", "0.004", "61.0\xa0±\xa01.4", "2", "")
    assert second[:2] == ("fewer activations", "0.008") and second[4].startswith("+10.0 (")
    assert third[0] == "separate downsampling" and third[4].startswith("-2.0 (")
