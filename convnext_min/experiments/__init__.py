"""Many training runs that answer one question: `python -m convnext_min.experiments road --data DIR --output DIR`.

An experiment is a list of `Trial`s. Every trial and seed is one `convnext_min.train` in a process of its own, resumed
if it was interrupted, and one row of runs.csv when it is done; summary.csv and card.json follow from the rows. What a
run logged is in curves.csv, what it said of each image in answers.npz. A run that another experiment in the same folder
has made is taken from there.
"""

from convnext_min.extras import require

require(__name__, "train")

import argparse
import csv
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from convnext_min import recipes
from convnext_min.environment import environment, write_json
from convnext_min.roadmap import STEPS


@dataclass(frozen=True)
class Trial:
    """One row of a summary: a model, a recipe, what is set differently in it, and further arguments for `train`."""

    name: str
    model: str
    recipe: str
    settings: tuple[str, ...] = ()  # "key=value"
    arguments: tuple[str, ...] = ()

    def options(self, seed: int) -> list[str]:
        """The options of convnext_min.train that repeat the run, but for where the data and the output are."""
        options = ["--recipe", self.recipe, "--model", self.model, "--seed", str(seed), *self.arguments]
        return [*options, "--set", *self.settings] if self.settings else options

    def values(self) -> dict[str, Any]:
        """All values of its recipe, as a results file has them."""
        return json.loads(json.dumps(dataclasses.asdict(recipes.get(self.recipe, self.settings, self.model))))


# One choice of the plain small-data recipe made differently at a time. Judged by a tenth of the training images, held
# out, so that the validation images say how good the result is and not how well it was picked.
_THREE = ("stem=overlapping", "init=fan_in", "layer_scale_init=0.2")
_FOUR = (*_THREE, "optimizer=muon")
LEVERS = {
    "plain": (),
    "layer scale 0.2": ("layer_scale_init=0.2",),
    "fan-in init": ("init=fan_in",),
    "overlapping stem": ("stem=overlapping",),
    "stem, init, layer scale": _THREE,
    "stem, init, layer scale, Muon": _FOUR,
    "these four, learning rate / 2": (*_FOUR, "base_lr=1e-3"),
    "these four, learning rate x 2": (*_FOUR, "base_lr=4e-3"),
    "these four, learning rate x 4": (*_FOUR, "base_lr=8e-3"),
    "these four, learning rate x 8": (*_FOUR, "base_lr=1.6e-2"),
    "these four, learning rate x 16": (*_FOUR, "base_lr=3.2e-2"),
    "Muon, learning rate x 8": ("optimizer=muon", "base_lr=1.6e-2"),
    "these four, batch 128": (*_FOUR, "batch_size=128"),
    "these four, CutMix": (*_FOUR, "cutmix=1.0"),
    "these four, weight decay x 4": (*_FOUR, "weight_decay=0.2"),
    "learning rate / 2": ("base_lr=1e-3",),
    "learning rate x 2": ("base_lr=4e-3",),
    "steps instead of the cosine": ("schedule=steps",),
    "gradient clipping": ("clip_grad=1.0",),
    "Muon": ("optimizer=muon",),
    "batch 32": ("batch_size=32",),
    "batch 128": ("batch_size=128",),
    "no average of weights": ("ema_decay=0.0",),
    "64 px throughout": ("progressive=()", "resolution=64"),
    "96 px throughout": ("progressive=()",),
    "crops of 8% and more": ("crop_scale=(0.08, 1.0)",),
    "crops of 60% and more": ("crop_scale=(0.6, 1.0)",),
    "CutMix": ("cutmix=1.0",),
    "Mixup": ("mixup=0.2",),
    "half the width, 8 epochs": ("dims=(20, 40, 80, 160)", "epochs=8"),
    "half the depth, 8 epochs": ("depths=(1, 1, 3, 1)", "epochs=8"),
    "learning rate x 40": ("base_lr=0.08",),  # what happened in the release's issue 39, also on Imagenette
    "average longer than the run": ("ema_horizon=None",),
}

# The two ends of the road, and the two recipes: which of them brings the gain?
ENDS = ("resnet50", "convnext")

# The ends, and ConvNeXt with the initial weights that suit its small size, with a part of the images, at as many steps;
# with three times the epochs; with larger images.
CONTESTANTS = {
    "resnet50": ("resnet50", ()),
    "convnext": ("convnext", ()),
    "convnext, fan-in init": ("convnext", ("init=fan_in",)),
}
CONDITIONS = {
    "10% of the images": ("fraction=0.1", "epochs=90"),
    "30% of the images": ("fraction=0.3", "epochs=30"),
    "all images": (),
    "three times the epochs": ("epochs=27",),
    "128 px": ("resolution=128", "eval_resolution=128"),
}

# What the paper's recipe adds to a small ConvNeXt, one thing at a time.
ADDED = {
    "plain": (),
    "no layer scale": ("layer_scale_init=0.0",),
    "layer scale 0.2": ("layer_scale_init=0.2",),
    "stochastic depth 0.1": ("drop_path=0.1",),
    "no average of weights": ("ema_decay=0.0",),
    "average with decay 0.9999 throughout": ("ema_horizon=None",),
    "no label smoothing": ("label_smoothing=0.0",),
    "Mixup": ("mixup=0.8",),
    "CutMix": ("cutmix=1.0",),
    "random erasing": ("erasing=0.25",),
}

# What the road's recipes chose their learning rates by: ones that suit networks all along the road, on held-out images.
TRIED = {"road": ("resnet50", "inverted", "gelu", "convnext"), "road-classic": ENDS}
RATES = {"road": (1e-3, 2e-3, 4e-3, 8e-3), "road-classic": (0.025, 0.1, 0.4)}

# Why a small road may go another way than the paper's: its initial weights shrink the signal of a narrow network where
# no norm restores it, and one learning rate for all steps suits some better than others.
EXPLANATIONS = {"as on the road": (), "fan-in init": ("init=fan_in",), "half the rate": ("base_lr=0.002",)}

# Each step of the road at several learning rates: five epochs on held-out images choose, nine epochs of the chosen one
# say what it is worth.
ROAD_RATES = (1e-3, 2e-3, 4e-3, 8e-3)

EXPERIMENTS = {
    "rates": [
        Trial(
            f"{step}, {rate:g}" + ", classic" * (recipe == "road-classic"),
            f"road:{step}",
            recipe,
            (f"base_lr={rate}", "epochs=5"),
            ("--holdout",),
        )
        for recipe in RATES
        for step in TRIED[recipe]
        for rate in RATES[recipe]
    ],
    "levers": [Trial(name, "convnext_atto", "imagenette", changes, ("--holdout",)) for name, changes in LEVERS.items()],
    "road": [Trial(step, f"road:{step}", "road") for step in STEPS],
    "grid": [Trial(f"{end}, {name}", f"road:{end}", name) for end in ENDS for name in ("road-classic", "road")],
    "when": [
        Trial(f"{who}, {name}", f"road:{step}", "road", (*own, *changes))
        for name, changes in CONDITIONS.items()
        for who, (step, own) in CONTESTANTS.items()
    ],
    "why": [
        Trial(f"{step}, {name}", f"road:{step}", "road", changes)
        for step in ("resnet50", "fewer_norms", "layer_norm", "convnext")
        for name, changes in EXPLANATIONS.items()
    ],
    "road_init": [
        Trial(f"{step}, {name}", f"road:{step}", "road", (f"init={init}",))
        for step in ("fewer_acts", "fewer_norms", "layer_norm", "convnext")
        for name, init in (("truncated normal 0.02", "paper"), ("fan-in", "fan_in"))
    ],
    "road_lr": [
        Trial(f"{step}, {rate:g}", f"road:{step}", "road", (f"base_lr={rate}", "epochs=5"), ("--holdout",))
        for step in STEPS
        for rate in ROAD_RATES
    ],
    "road_tuned": [
        Trial(f"{step}, {rate:g}", f"road:{step}", "road", (f"base_lr={rate}",))
        for step in STEPS
        for rate in ROAD_RATES
    ],
    "road_width": [
        Trial(f"{step}, {name}", f"road:{step}", "road", ("width_multiplier=0.5", *changes))
        for step in ENDS
        for name, changes in (("one rule", ()), ("truncated normal 0.02", ("init=paper",)))
    ],
    "ablate": [Trial(name, "convnext_atto", "imagenette", changes) for name, changes in ADDED.items()],
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, or none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows, at least one, so that `path` is a whole file at any moment."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read_answers(path: Path) -> dict[str, np.ndarray]:
    """The classes that runs gave to the validation images, by `key`, and the right ones as "labels": each (N,)."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        return dict(file)


def key(trial: str, seed: int | str) -> str:
    """The name of a run in answers.npz."""
    return f"{trial}/{seed}"


def write_answers(answers: dict[str, np.ndarray], path: Path) -> None:
    """Write them so that `path` is a whole file at any moment."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **answers)
    partial.replace(path)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a trial: the mean of its runs' top-1 in percent, their standard deviation, their number, the mean time
    of the processor."""
    by_trial = defaultdict(list)
    for row in rows:
        by_trial[row["trial"]].append(row)
    return [
        {
            "trial": trial,
            "top1": round(mean(top1 := [float(run["top1"]) for run in runs]), 2),
            "std": round(stdev(top1), 2) if len(runs) > 1 else "",
            "seeds": len(runs),
            "cpu_seconds": round(mean(float(run["cpu_seconds"]) for run in runs)),
            "parameters": runs[0]["parameters"],
        }
        for trial, runs in by_trial.items()
    ]


class Made(NamedTuple):
    """What a run leaves: its row, its answers beside the labels, and the rows of its log."""

    row: dict[str, Any]
    answers: dict[str, np.ndarray]
    curve: list[dict[str, Any]]


def run_trial(trial: Trial, seed: int, data: str | None, output: Path, threads: int) -> Made:
    """Train in a process of its own, in `output`/work.

    Raises RuntimeError if that fails.
    """
    folder = output / "work" / f"{trial.name}-{seed}".replace(" ", "_").replace("/", "by")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "convnext_min.train", "--output", str(folder), "--resume", *(["--data", data] if data else [])]
    with open(folder / "output.txt", "a") as text:
        done = subprocess.run(
            [sys.executable, *command, *trial.options(seed)],
            stdout=text,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        raise RuntimeError(f"{trial.name}, seed {seed}, stopped with code {done.returncode}; see {folder}/output.txt")
    summary = json.loads((folder / "summary.json").read_text())
    answers = read_answers(folder / "answers.npz")
    for weights in folder.glob("*.pt"):
        weights.unlink()
    row = {
        "trial": trial.name,
        "seed": seed,
        "top1": round(100 * summary["top1"], 3),
        "images": summary["images"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "cpu_seconds": summary["cpu_seconds"],
        "parameters": summary["parameters"],
        "data": summary["source"],
        "options": shlex.join(trial.options(seed)),
        "recipe": json.dumps(summary["recipe"]),
        "commit": summary["commit"],
        "torch": summary["versions"]["torch"],
        "cpu": summary["machine"]["cpu"],
        "threads": threads,
    }
    answers = {key(trial.name, seed): answers["answers"], "labels": answers["labels"]}
    curve = [{"trial": trial.name, "seed": seed} | point for point in read_rows(folder / "log.csv")]
    return Made(row, answers, curve)


def made_elsewhere(trial: Trial, seed: int, output: Path) -> Made | None:
    """The same run out of another experiment's results in `output`, as `run_trial` returns it, if there is one."""
    options = shlex.join(trial.options(seed))
    for path in sorted(output.glob("*/runs.csv")):
        for row in read_rows(path):
            if row["options"] == options and json.loads(row["recipe"]) == trial.values():
                answers = read_answers(path.with_name("answers.npz"))
                own = {key(trial.name, seed): answers[key(row["trial"], seed)], "labels": answers["labels"]}
                run, curves = (row["trial"], str(seed)), read_rows(path.with_name("curves.csv"))
                curve = [point | {"trial": trial.name} for point in curves if (point["trial"], point["seed"]) == run]
                return Made(row | {"trial": trial.name}, own, curve)
    return None


def run(
    name: str,
    output: Path,
    seeds: int,
    data: str | None = None,
    workers: int = 1,
    trials: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Make the runs of an experiment that `output`/`name`/runs.csv does not hold yet, all trials of a seed by turns.

    `workers` runs at a time share the cores. With `trials`, only those of these names. Returns all rows. Raises
    ValueError, listing what is valid, for an unknown trial, and for seeds or workers below 1. A failed run, or one that
    was judged by other images than the rows before, is reported at the end, as RuntimeError, when the others are done.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"seeds and workers must be positive, got {seeds} and {workers}")
    known = {trial.name: trial for trial in EXPERIMENTS[name]}
    for wanted in trials or ():
        if wanted not in known:
            raise ValueError(f"{name} has no trial {wanted!r}; valid: {', '.join(known)}")
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = list(read_rows(folder / "runs.csv"))
    answers, curves = read_answers(folder / "answers.npz"), read_rows(folder / "curves.csv")
    done = {(row["trial"], int(row["seed"])) for row in rows}
    chosen = [known[wanted] for wanted in trials or known]
    jobs = [(trial, seed) for seed in range(seeds) for trial in chosen if (trial.name, seed) not in done]
    path, command = folder / "card.json", environment()["command"]
    before = json.loads(path.read_text())["commands"] if path.exists() else []
    commands = before + [command] * (command not in before)
    threads = max(1, (os.cpu_count() or 1) // workers)
    failures = []

    def make(trial: Trial, seed: int) -> Made:
        return made_elsewhere(trial, seed, output) or run_trial(trial, seed, data, folder, threads)

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc=name, unit="run") as bar:
        futures = [pool.submit(make, trial, seed) for trial, seed in jobs]
        try:
            for future in as_completed(futures):
                bar.update()
                try:
                    made = future.result()
                except RuntimeError as error:
                    failures.append(str(error))
                    continue
                if not np.array_equal(made.answers["labels"], answers.get("labels", made.answers["labels"])):
                    run_of = f"{made.row['trial']}, seed {made.row['seed']}"
                    failures.append(f"{run_of}, was judged by other images than {folder}: take another --output")
                    continue
                rows.append(made.row)
                answers |= made.answers
                curves += made.curve
                write_answers(answers, folder / "answers.npz")
                write_rows(curves, folder / "curves.csv")
                write_rows(rows, folder / "runs.csv")
                write_rows(summarize(rows), folder / "summary.csv")
                write_json(card(name, rows, commands), path)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("\n".join(failures))
    return rows


def card(name: str, rows: list[dict[str, Any]], commands: list[list[str]]) -> dict[str, Any]:
    """How the rows were made: by one command after another, if some were made later."""
    made = environment()
    return {
        "experiment": name,
        "commands": commands,
        "commits": sorted({row["commit"] for row in rows if row["commit"]}),
        "versions": made["versions"],
        "machine": made["machine"],
        "cpus": sorted({row["cpu"] for row in rows}),  # rows may have been made in several goes, on several machines
        "runs": len(rows),
        "cpu_hours": round(sum(float(row["cpu_seconds"]) for row in rows) / 3600, 2),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", help="folder with train/<class>/ and val/<class>/; without it Imagenette")
    parser.add_argument("--output", type=Path, default=Path("book/results"), help="the experiment gets a folder in it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", nargs="+", metavar="NAME", help="only these trials of the experiment")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with the cores shared among them")
    args = parser.parse_args(argv)
    try:
        rows = run(args.experiment, args.output, args.seeds, args.data, args.workers, args.trials)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    for row in summarize(rows):
        print(f"{row['trial']:<28} {row['top1']:>6.2f} ± {row['std'] or 0:.2f} % ({row['seeds']} seeds)")
