"""The batch script, run by bash with stand-ins for Slurm's commands and for Python."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "convnext_min" / "train" / "imagenet.sbatch"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=32 exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> log
[[ $1 == show ]] && printf 'node7\\nnode8\\n'
"""
PYTHON = """#!/bin/bash
echo "python $*" >> log
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >> log
touch started
while [[ -e wait ]]; do sleep 0.05; done
exit "$(cat code)"
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "60123", "SLURM_CPUS_PER_TASK": "12"}
    env = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(code, *arguments, **variables):
        (tmp_path / "code").write_text(str(code))
        return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=tmp_path, env=env | variables)

    return run


def test_bash_can_parse_it():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_each_process_gets_its_number_and_the_options(start, tmp_path):
    assert start(0, "/data/image net", "runs/a", "--keep", "3", MODEL="convnext_small").wait() == 0
    nodes, python, numbers = (tmp_path / "log").read_text().splitlines()
    assert nodes == "scontrol show hostnames node[7-8]"
    assert python.startswith(
        "python -m convnext_min.train --recipe in1k --model convnext_small --data /data/image net "
    )
    assert "--output runs/a --resume" in python and python.endswith("--keep 3")
    assert numbers == "9 1 32 node7 20123"


@pytest.mark.parametrize("code", [0, 1, 75, 138, 143])
def test_only_a_job_whose_time_is_up_goes_back_into_the_queue(start, tmp_path, code):
    """143 follows SIGTERM, as scancel sends it; 138 a SIGUSR1 before the training starts."""
    assert start(code, "data", "out", REQUEUE_AFTER="0").wait() == code
    assert ("scontrol requeue 60123" in (tmp_path / "log").read_text()) == (code == 75)


def test_a_job_too_short_to_train_does_not_go_back_into_the_queue(start, tmp_path):
    assert start(75, "data", "out").wait() == 75
    assert "scontrol requeue" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_does_not_end_it_before_the_training(start, tmp_path, number):
    (tmp_path / "wait").touch()
    process = start(75, "data", "out", REQUEUE_AFTER="0")
    while not (tmp_path / "started").exists():
        assert process.poll() is None, "the script ended before the training began"
        time.sleep(0.02)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    (tmp_path / "wait").unlink()
    assert process.wait(10) == 75 and "scontrol requeue" in (tmp_path / "log").read_text()


def test_missing_folders_are_asked_for(start):
    assert start(0).wait() != 0
    assert start(0, "data").wait() != 0
