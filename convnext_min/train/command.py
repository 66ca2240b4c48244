"""Share between command lines that train: the options for the machine and the output, and the end of a run."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import psutil
import torch

from convnext_min.environment import printable
from convnext_min.train import distributed
from convnext_min.train.trainer import RunConfig


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run's output."""
    output = parser.add_argument_group("output")
    output.add_argument("--output", help="output folder (default: a new one in runs/)")
    output.add_argument(
        "--save-every", default="", metavar="N", help="500: iterations, 15m: minutes; always after an epoch"
    )
    output.add_argument("--keep", type=int, default=2, metavar="N", help="number of newest checkpoints to keep (2)")
    output.add_argument("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases as well")
    output.add_argument(
        "--dry-run", action="store_true", help="try an iteration, a checkpoint, an evaluation; write nothing"
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the options of the machine that suit every network, and return their group."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    machine.add_argument(
        "--micro-batch", type=int, metavar="N", help="images per process and forward pass; fewer need less memory"
    )
    machine.add_argument(
        "--checkpoint-activations", action="store_true", help="less memory, about a third more time per iteration"
    )
    machine.add_argument(
        "--no-accelerate", dest="accelerate", action="store_false", help="on a CPU: PyTorch's own layers only"
    )
    return machine


def run_config(args: argparse.Namespace, device: torch.device) -> RunConfig:
    """Return the configuration that the options ask for; minutes count from the start of the process."""
    options = {name: value for name, value in vars(args).items() if name in {f.name for f in fields(RunConfig)}}
    return RunConfig(**options | {"device": device, "started": psutil.Process().create_time()})


def run_command(
    module: str,
    name: str,
    args: argparse.Namespace,
    argv: list[str],
    run: Callable[[argparse.Namespace, torch.device], None],
) -> None:
    """Call `run` in each process of the run called `name`; print an error in one line, and after a stop how to resume.

    Without --output the results go to a new folder in runs/.
    """
    output_given = args.output
    try:
        with distributed.processes(args.device) as device:
            folder = f"runs/{name.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
            args.output = output_given or distributed.broadcast_object(folder)
            run(args, device)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error{_process()}: {error}")
    except KeyboardInterrupt as stop:
        if distributed.rank() == 0:
            launcher = "torchrun ... " if distributed.world_size() > 1 else "python "
            command = shlex.join(a for a in argv if a != "--resume")
            command += "" if output_given else f" --output {args.output}"
            print(printable(f"\n{stop or 'stopped before the first iteration'}"))
            print(printable(f"To continue: {launcher}-m {module} {command} --resume"))
        sys.exit(getattr(stop, "code", 130))


def _process() -> str:
    """Return which process this is, unless it is rank 0."""
    return f" in process {distributed.rank()}" if distributed.rank() else ""
