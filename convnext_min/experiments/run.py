"""Train the trials of an experiment with several seeds and keep the results as tables.

`python -m convnext_min.experiments road --output book/results` writes a folder "road" with runs.csv (a row per run),
summary.csv (a row per trial), curves.csv (the logs), predictions.npz (the predicted class of each image) and card.json
(commands, commits, versions, machine). Each run is one `convnext_min.train`, or `convnext_min.dense.train`, which keeps
no predictions, in its own process. Interrupted runs are resumed, and runs that the folder has are not repeated.
Scores are in percent in runs.csv and summary.csv; curves.csv repeats the trainer's logs, in which they are fractions.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from convnext_min.environment import atomic_write, environment, write_json
from convnext_min.experiments.trials import EXPERIMENTS, DenseTrial, Trial

RUNS, SUMMARY, CURVES, PREDICTIONS, CARD = "runs.csv", "summary.csv", "curves.csv", "predictions.npz", "card.json"
SCORES = ("top1", "mask_ap", "miou")  # columns of runs.csv, of which an experiment has one, that are summarized

Row = dict[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or none if the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV, with the columns of all rows; missing values are empty."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with atomic_write(path, newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by their names, or none if the file does not exist."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        return dict(file)


def key(trial: str, seed: int | str) -> str:
    """Return the name of a run's array in predictions.npz."""
    return f"{trial}/{seed}"


class Result(NamedTuple):
    """One run: its row in runs.csv, a classifier's predictions and labels, both (N,), and the rows of its log."""

    row: Row
    predictions: np.ndarray | None
    labels: np.ndarray | None
    curve: list[Row]


@dataclass
class Results:
    """The tables of an experiment in `folder`."""

    folder: Path
    rows: list[Row]
    predictions: dict[str, np.ndarray]  # by `key`, and the true classes as "labels": each (N,)
    curves: list[Row]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Return the results of earlier runs in `folder`, which need not exist."""
        return cls(
            folder, read_rows(folder / RUNS), read_arrays(folder / PREDICTIONS), list(read_rows(folder / CURVES))
        )

    def add(self, result: Result) -> None:
        """Add a run. Raises RuntimeError if it was evaluated on other images than the runs before."""
        run = f"{result.row['trial']}, seed {result.row['seed']}"
        if result.predictions is not None:
            if not np.array_equal(result.labels, self.predictions.setdefault("labels", result.labels)):
                raise RuntimeError(f"{run}, was evaluated on other images than {self.folder}: take another --output")
            self.predictions[key(result.row["trial"], result.row["seed"])] = result.predictions
        self.rows.append(result.row)
        self.curves += result.curve

    def write(self, name: str, commands: list[list[str]]) -> None:
        """Write all tables and the card; each file is complete at any moment."""
        write_rows(self.rows, self.folder / RUNS)
        write_rows(self.curves, self.folder / CURVES)
        write_rows(summarize(self.rows), self.folder / SUMMARY)
        if self.predictions:
            with atomic_write(self.folder / PREDICTIONS, "wb") as file:
                np.savez_compressed(file, **self.predictions)
        write_json(card(name, self.rows, commands), self.folder / CARD)

    def commands(self) -> list[list[str]]:
        """Return the commands that made the rows so far, followed by this process's command if it is a new one."""
        path, command = self.folder / CARD, environment()["command"]
        earlier = json.loads(path.read_text())["commands"] if path.exists() else []
        return earlier if command in earlier else [*earlier, command]


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return one row per trial: mean and standard deviation of its score in percent, number of runs, mean CPU time.

    The score is the column of `rows` out of `SCORES`.
    """
    score = next((name for name in SCORES if rows and name in rows[0]), "")
    by_trial = defaultdict(list)
    for row in rows:
        by_trial[row["trial"]].append(row)
    return [
        {
            "trial": trial,
            score: round(mean(values := [float(run[score]) for run in runs]), 2),
            "std": round(stdev(values), 2) if len(runs) > 1 else "",
            "seeds": len(runs),
            "cpu_seconds": round(mean(float(run["cpu_seconds"]) for run in runs)),
            "parameters": runs[0]["parameters"],
        }
        for trial, runs in by_trial.items()
    ]


def card(name: str, rows: Sequence[Row], commands: list[list[str]]) -> dict[str, Any]:
    """Return the provenance of the rows: commands, commits, versions, machines and core-hours."""
    now = environment()
    return {
        "experiment": name,
        "commands": commands,
        "commits": sorted({row["commit"] for row in rows if row["commit"]}),
        "versions": now["versions"],
        "machine": now["machine"],
        "cpus": sorted({row["cpu"] for row in rows}),  # rows may come from several machines
        "runs": len(rows),
        "cpu_hours": round(sum(float(row["cpu_seconds"]) for row in rows) / 3600, 2),
    }


def run_trial(trial: Trial | DenseTrial, seed: int, data: str | None, folder: Path, threads: int) -> Result:
    """Train in a separate process, in `folder`/work. Raises RuntimeError if it fails."""
    work = folder / "work" / f"{trial.name}-{seed}".replace(" ", "_").replace("/", "by")
    work.mkdir(parents=True, exist_ok=True)
    command = ["-m", trial.trainer, "--output", str(work), "--resume", *(["--data", data] if data else [])]
    with open(work / "output.txt", "a") as text:
        done = subprocess.run(
            [sys.executable, *command, *trial.options(seed)],
            stdout=text,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        raise RuntimeError(f"{trial.name}, seed {seed}, stopped with code {done.returncode}; see {work}/output.txt")
    for weights in work.glob("*.pt"):
        weights.unlink()
    return read_result(trial, seed, work, threads)


def read_result(trial: Trial | DenseTrial, seed: int, work: Path, threads: int) -> Result:
    """Return the result of a finished run from the files that its trainer wrote into `work`."""
    summary, arrays = json.loads((work / "summary.json").read_text()), read_arrays(work / PREDICTIONS)
    row = {
        "trial": trial.name,
        "seed": seed,
        **{name: round(100 * summary[name], 3) for name in trial.metrics},
        **{name: summary[name] for name in ("images", "steps", "seconds", "cpu_seconds", "parameters")},
        "data": summary["source"],
        "options": shlex.join(trial.options(seed)),
        "recipe": json.dumps(summary["recipe"]),
        "commit": summary["commit"],
        "torch": summary["versions"]["torch"],
        "cpu": summary["machine"]["cpu"],
        "device": summary["device"],
        "threads": threads,
    }
    curve = [{"trial": trial.name, "seed": seed} | point for point in read_rows(work / "log.csv")]
    return Result(row, arrays.get("predictions"), arrays.get("labels"), curve)


def select(name: str, trials: Sequence[str] | None) -> list[Trial | DenseTrial]:
    """Return the trials of an experiment, or the named ones. Raises ValueError, listing the valid names."""
    known = {trial.name: trial for trial in EXPERIMENTS[name]}
    for wanted in trials or ():
        if wanted not in known:
            raise ValueError(f"{name} has no trial {wanted!r}; valid: {', '.join(known)}")
    return [known[wanted] for wanted in trials or known]


def run(
    name: str,
    output: Path,
    seeds: int,
    data: str | None = None,
    workers: int = 1,
    trials: Sequence[str] | None = None,
) -> list[Row]:
    """Train the runs that `output`/`name` lacks, first all trials with seed 0, then with seed 1, and return all rows.

    `workers` runs share the cores concurrently. `trials` names the trials to run, by default all. Raises ValueError,
    listing what is valid, for an unknown trial and for seeds or workers below 1; RuntimeError, after all other runs,
    if runs failed or were evaluated on other images than the rows before.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"seeds and workers must be positive, got {seeds} and {workers}")
    chosen, folder = select(name, trials), output / name
    folder.mkdir(parents=True, exist_ok=True)
    results = Results.read(folder)
    commands = results.commands()
    done = {(row["trial"], int(row["seed"])) for row in results.rows}
    jobs = [(trial, seed) for seed in range(seeds) for trial in chosen if (trial.name, seed) not in done]
    threads = max(1, (os.cpu_count() or 1) // workers)

    def keep(result: Result) -> None:
        results.add(result)
        results.write(name, commands)

    failures = _run_all(jobs, lambda trial, seed: run_trial(trial, seed, data, folder, threads), keep, workers, name)
    if failures:
        raise RuntimeError("\n".join(failures))
    return results.rows


def _run_all(
    jobs: Sequence[tuple[Trial | DenseTrial, int]],
    train: Callable[[Trial | DenseTrial, int], Result],
    keep: Callable[[Result], None],
    workers: int,
    name: str,
) -> list[str]:
    """Train all jobs, keep each result as it comes, and return the messages of those that failed."""
    failures = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc=name, unit="run") as bar:
        futures = [pool.submit(train, trial, seed) for trial, seed in jobs]
        try:
            for future in as_completed(futures):
                bar.update()
                try:
                    keep(future.result())
                except RuntimeError as error:
                    failures.append(str(error))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", help="folder of the images; by default Imagenette, or those of the experiment's name")
    parser.add_argument("--output", type=Path, default=Path("results"), help="the experiment gets a folder in it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", nargs="+", metavar="NAME", help="only these trials of the experiment")
    parser.add_argument("--workers", type=int, default=1, help="concurrent runs; they share the cores")
    args = parser.parse_args(argv)
    try:
        rows = run(args.experiment, args.output, args.seeds, args.data, args.workers, args.trials)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    for row in summarize(rows):
        name, score, std, seeds = list(row.values())[:4]
        print(f"{name:<28} {score:>6.2f} ± {std or 0:.2f} % ({seeds} seeds)")
