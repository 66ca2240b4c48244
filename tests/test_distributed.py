"""Real processes that exchange gradients: they do what one process does, stop together and go on together."""

import multiprocessing
import os
import random
import socket
from dataclasses import replace

import pytest
import torch
from test_train import TINY, equal

from convnext_min import distributed, train
from convnext_min.data import offline_sample
from convnext_min.engine import Setup

PLAIN = replace(TINY, epochs=2)  # 10 steps of 8 images
RANDOM = replace(PLAIN, drop_path=0.3, mixup=0.8, cutmix=1.0, erasing=0.5)

# Processes are forked from one that has imported these, and so start at once.
multiprocessing.set_forkserver_preload(["convnext_min.train", "torch.distributed.fsdp", "matplotlib.pyplot", "pytest"])


@pytest.fixture(scope="module")
def images():
    return offline_sample("train", 32, 40)


@pytest.fixture(scope="module")
def alone(images):
    return trained(images, PLAIN)


def trained(images, recipe=PLAIN, output=None, resume=False, setup=None, val=None):
    history = train.train(
        "convnext_atto", recipe, images, val or images.subset(slice(13)), output, 0, resume, "cpu", setup=setup
    )
    return distributed.gathered(history.model.state_dict())


def member(rank, world, port, function, arguments, results):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.processes("cpu"):
        torch.save(function(*arguments), results / f"{rank}.pt")


def in_processes(world, folder, function, *arguments):
    """What `function(*arguments)` returns in each of `world` processes, None for those that failed."""
    results = folder / f"results-{random.random()}"
    results.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    members = [
        context.Process(target=member, args=(rank, world, port, function, arguments, results)) for rank in range(world)
    ]
    for process in members:
        process.start()
    for process in members:
        process.join(60)
        process.kill()
    files = [results / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def assert_close(got, right):
    """Equal but for the order in which numbers are added: after ten steps, to a thousandth of the learning rate."""
    for name, value in right.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=4e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- The same result, however it is computed


@pytest.mark.parametrize(
    ("world", "setup"),
    [
        (1, Setup(per_device_batch=2)),
        (1, Setup(checkpoint_activations=True)),
        (2, Setup()),
        (2, Setup(per_device_batch=2)),
        (2, Setup(fsdp=True)),
        (2, Setup(fsdp=True, per_device_batch=2, checkpoint_activations=True)),
    ],
    ids=["accumulation", "checkpointed", "two", "two-accumulation", "fsdp", "fsdp-all"],
)
def test_processes_parts_of_batches_and_shards_give_the_weights_of_one_process(images, alone, tmp_path, world, setup):
    if world == 1:
        results = [trained(images, setup=setup)]
    else:
        results = in_processes(world, tmp_path, trained, images, PLAIN, None, False, setup)
    for weights in results:
        assert_close(weights, alone)
    assert equal(results[0], results[-1])
