"""Small files of results, as experiments write them."""

import csv

import numpy as np

IMAGES = 200


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_experiment(folder, name, trials, images=IMAGES, **columns):
    """Write runs.csv and predictions.npz: of `images` images, the runs of a trial get `trials[trial]` right."""
    labels = np.arange(images) % 3
    answers, rows = {"labels": labels}, []
    for trial, counts in trials.items():
        for seed, right in enumerate(counts):
            answers[f"{trial}/{seed}"] = np.where(np.arange(images) < right, labels, labels + 1)
            rows.append({"trial": trial, "seed": seed, "cpu_seconds": 60} | {k: f(trial) for k, f in columns.items()})
    write_csv(folder / name / "runs.csv", rows)
    np.savez(folder / name / "predictions.npz", **answers)
