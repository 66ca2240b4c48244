"""The clock of a run: elapsed time, progress through the schedule, and one decision for all processes."""

import time
from typing import Any

import psutil

from convnext_min.recipes import Recipe
from convnext_min.train import distributed

WRITING_SECONDS = 5.0  # kept free at the end of a timed run, to write the checkpoint and the curve


class Clock:
    """Measure the time of a run and its progress from 0 to 1, in epochs or, if the recipe sets `minutes`, in minutes.

    `started` is the start of the process in seconds, as `time.time()` gives them. A resumed run continues the time of
    the processes before it. `now` and `stopped` are the same in all processes; `sync` updates them.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int, started: float):
        self.minutes, self.total_steps = recipe.minutes, recipe.epochs * steps_per_epoch
        self.started = started
        self.resumed_seconds = self.resumed_cpu_seconds = 0.0  # of the processes that this one continues
        self.window = (0.0, 0.0)  # seconds at which a timed run starts and ends training
        self.first_iteration: float | None = None  # seconds at its end
        self.stopped = False
        self.sync()

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds since the start of the run, without the time between a stop and a resume."""
        return self.resumed_seconds + time.time() - self.started

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU seconds of this process over all cores, and of the processes that it continues."""
        times = psutil.Process().cpu_times()
        return self.resumed_cpu_seconds + times.user + times.system

    def sync(self, stop: bool = False) -> None:
        """Set `now` to rank 0's clock on every process, and `stopped` if any process was asked to stop.

        All processes must take the same decisions, and these depend on both.
        """
        self.now, stops = distributed.all_reduce_sum(self.seconds if distributed.rank() == 0 else 0.0, stop)
        self.stopped = self.stopped or stops > 0

    def progress(self, step: int) -> float:
        """Return the completed fraction of the run, from 0 to 1, after `step` optimizer steps."""
        if self.minutes is None:
            return step / self.total_steps
        start, end = self.window
        if end <= start:  # not open, as in a dry run
            return 0.0
        return min(1.0, (self.now - start) / (end - start))

    def open_window(self, evaluation: float, resumed: bool) -> None:
        """Start the schedule of a timed run; training ends `evaluation + WRITING_SECONDS` before the time limit.

        A `resumed` run keeps its start. Raises ValueError if no time is left to train.
        """
        self.sync()
        start = self.window[0] if resumed else self.now
        end = 60 * self.minutes - evaluation - WRITING_SECONDS
        if start >= end:
            raise ValueError(
                f"minutes={self.minutes:g} leaves no time to train: the start took {start:.0f} s, and the last "
                f"evaluation and writing take {evaluation + WRITING_SECONDS:.0f} s"
            )
        self.window = (start, end)

    def has_time_for(self, seconds: float) -> bool:
        """Return True if training time remains after `seconds` of something else; always for runs in epochs."""
        return self.minutes is None or self.now + seconds < self.window[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint that `load_state_dict` needs."""
        times = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "first_iteration": self.first_iteration}
        return {**times, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the time of a checkpoint."""
        self.resumed_seconds, self.resumed_cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.window = state["window"]
        self.first_iteration = state.get("first_iteration")  # earlier checkpoints do not have it
        self.sync()
