"""Real processes that exchange gradients: they do what one process does, stop together and go on together."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, command, equal, folder_of_images
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from convnext_min.data import Batches, ImageSet
from convnext_min.recipes import Recipe
from convnext_min.train import RunConfig, Stopped, Trainer, clock, create_model, distributed, evaluate, loop, train
from convnext_min.train.__main__ import evaluate_weights, main, read_arguments
from convnext_min.train.checkpoint import load_checkpoint

PLAIN = replace(TINY, epochs=2, clip_grad=100.0)  # 10 steps of 8 images
RANDOM = replace(PLAIN, drop_path=0.3, mixup=0.8, cutmix=1.0, erasing=0.5)

# Processes are forked from one that has imported these, and so start at once.
multiprocessing.set_forkserver_preload(
    [
        *("convnext_min.train.__main__", "convnext_min.dense.train", "torch.distributed.fsdp"),
        *("torch.distributed.checkpoint.state_dict", "pytest"),
    ]
)


@pytest.fixture(scope="module")
def alone(images):
    return with_gradients(images)


def trained(images, recipe=PLAIN, output=None, resume=False, config=None, after_step=None):
    """The weights to use after a whole run."""
    sets = images, images.subset(slice(13))
    history = train("convnext_atto", recipe, *sets, output, 0, resume, config, after_step=after_step)
    return distributed.full_state_dict(history.model)


def with_gradients(images, config=None):
    """The weights after a whole run, and the gradients of its first step: AdamW does not mind their scale."""
    gradients = {}

    def note(optimizer, *_):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for number, parameter in enumerate(parameters):
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            gradients.setdefault(f"gradient {number}", grad.clone())

    hook = register_optimizer_step_pre_hook(note)
    weights = trained(images, config=config)
    hook.remove()
    return weights | gradients


def member(rank, world, port, function, arguments, results):
    """What one process does, joined with the others, unless that is left to the `main` of a command line."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.nullcontext() if function.__name__ == "main" else distributed.processes("cpu"):
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
        process.join(300)
        process.kill()
    files = [results / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def assert_close(got, right):
    """Equal but for the order in which numbers are added: after ten steps, to a thousandth of the learning rate."""
    assert got.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=4e-6)


# ---- The same result, however it is computed


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (1, RunConfig(micro_batch=2)),
        (1, RunConfig(checkpoint_activations=True)),
        (2, RunConfig()),
        (2, RunConfig(micro_batch=2)),
        (2, RunConfig(fsdp=True)),
        (2, RunConfig(fsdp=True, micro_batch=2, checkpoint_activations=True)),
    ],
    ids=["accumulation", "checkpointed", "two", "two-accumulation", "fsdp", "fsdp-all"],
)
def test_processes_parts_of_batches_and_shards_give_the_weights_of_one_process(images, alone, tmp_path, world, config):
    if world == 1:
        results = [with_gradients(images, config)]
    else:
        results = in_processes(world, tmp_path, with_gradients, images, config)
    for weights in results:
        assert_close(weights, alone)
    assert equal(results[0], results[-1])


def calls(images, config):
    """In one process: gradients sent in a step, seeds of its parts, and their images."""
    seen = {"sent": 0, "seeds": [], "images": []}

    def note(model, inputs):
        seen["seeds"].append((trainer.step, torch.initial_seed()))
        seen["images"].append(len(inputs[0]))

    def send(state, bucket):
        seen["sent"] += 1
        return (
            torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])
        )

    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = Batches(images, 8, 32, True, 0, **place)
    model = create_model("convnext_atto", RANDOM, 10)
    trainer = Trainer(model, "convnext_atto", RANDOM, batches, 0, torch.device("cpu"), config)
    trainer.parallel_model.register_comm_hook(None, send)
    model.register_forward_pre_hook(note)
    for x, y in batches.epoch(0):
        trainer.train_step(x, y)
    return seen


def test_each_part_of_a_batch_draws_its_own_and_gradients_are_sent_once(images, tmp_path):
    one, two = in_processes(2, tmp_path, calls, images, RunConfig(micro_batch=2))
    assert one["images"] == two["images"] == [2] * 10  # 5 steps, 2 parts each
    assert one["sent"] == two["sent"] == 5
    assert len({*one["seeds"], *two["seeds"]}) == 20
    assert [step for step, _ in one["seeds"]] == [step for step in range(5) for _ in range(2)]


def timed(images):
    """A run of minutes in which a step takes a second, on a clock that is an hour ahead in the second process."""
    now = SimpleNamespace(seconds=3600.0 * distributed.rank())

    def tick(trainer):
        now.seconds += 1

    clock.time = SimpleNamespace(time=lambda: now.seconds)
    loop.evaluation_seconds = lambda *_: 4.0
    run = ("convnext_atto", replace(PLAIN, minutes=0.4), images, images)
    history = train(*run, config=RunConfig(started=0.0), after_step=tick)
    return history.rows[-1]["step"], history.rows[-1]["lr"], history.model.state_dict()


def test_processes_go_by_the_clock_of_the_first(images, tmp_path):
    one, two = in_processes(2, tmp_path, timed, images)
    steps = 24 - 4 - clock.WRITING_SECONDS
    assert one[0] == two[0] == steps and one[1] == two[1] == PLAIN.lr_at((steps - 1) / steps)
    assert equal(one[2], two[2])


def test_batch_norm_has_the_same_statistics_in_all_processes(images, tmp_path):
    of_road = {"depths": None, "dims": None, "layer_scale_init": Recipe.layer_scale_init, "width_multiplier": 0.125}
    recipe = replace(PLAIN, epochs=1, **of_road)
    one, two = in_processes(2, tmp_path, with_batch_norm, images, recipe)
    (weights, told), (other, _) = one, two
    assert "2 processes, BatchNorm over 4 images" in told
    assert equal(weights, other) and weights["stages.0.0.norm.running_mean"].abs().max() > 0


def with_batch_norm(images, recipe):
    """The weights, and what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) if distributed.rank() == 0 else contextlib.nullcontext() as text:
        history = train("road:fewer_norms", recipe, images, images.subset(slice(13)))
    return history.model.state_dict(), text.getvalue() if text else ""


def evaluated(images, fsdp):
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    torch.manual_seed(1)
    model = create_model("convnext_atto", TINY, 10)
    if fsdp:
        distributed.apply_fsdp(model, torch.device("cpu"))
    return evaluate(model, Batches(images, 12, 32, False, **place), "fp32")


@pytest.mark.parametrize("number, fsdp", [(25, False), (25, True), (3925, False)])
def test_three_processes_validate_every_image_once(images, tmp_path, number, fsdp):
    few = images.subset(torch.arange(number) % len(images))  # in batches of 12: the last is for one process only
    right = evaluated(few, False)
    for result in in_processes(3, tmp_path, evaluated, few, fsdp):
        assert torch.equal(result.predictions, right.predictions) and torch.equal(result.labels, few.labels)
        assert result.top1 == right.top1 and result.loss == pytest.approx(right.loss, rel=1e-5)


# ---- Runs that break off


def weights_evaluated(arguments):
    return evaluate_weights(read_arguments(arguments), torch.device("cpu"))


@pytest.mark.parametrize("loader", ["disk", "memory"])
def test_weights_are_evaluated_on_every_image_once(folder, images, tmp_path, loader):
    path = tmp_path / "run" / "checkpoint.pt"
    few = ImageSet(images.images, images.labels % 2, ("class0", "class1"), "")
    train("convnext_atto", replace(TINY, epochs=1, loader=loader), few, few, path.parent)
    arguments = ["--evaluate", str(path), "--data", str(folder), "--workers", "0"]
    alone, shared = weights_evaluated(arguments), in_processes(2, tmp_path, weights_evaluated, arguments)
    for result in shared:
        assert len(result.labels) == 16 and result.loss == pytest.approx(alone.loss, rel=1e-5)
        assert result.top1 == alone.top1


def killed(images, folder, step, config, recipe=RANDOM):
    """A run whose last process dies without a word when `step` is done."""

    def die(trainer):
        if trainer.step == step and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(images, recipe, folder, config=config, after_step=die)


# Killed between two checkpoints, right before one, and in the first step of an epoch.
@pytest.mark.parametrize(("world", "fsdp", "step"), [(1, False, 8), (2, False, 4), (2, True, 6)])
def test_a_run_that_was_killed_ends_with_the_same_weights(images, tmp_path, world, fsdp, step):
    config = RunConfig(save_every="2", fsdp=fsdp)
    whole = in_processes(world, tmp_path, trained, images, RANDOM, None, False, replace(config, save_every=""))[0]
    in_processes(world, tmp_path, killed, images, tmp_path / "run", step, config)
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved == max(k for k in (2, 4, 5, 7, 9) if k < step)  # every second step, and the end of the epoch
    resumed = in_processes(world, tmp_path, trained, images, RANDOM, tmp_path / "run", True, config)[0]
    assert equal(resumed, whole)


def test_a_run_is_continued_with_other_processes(images, alone, tmp_path):
    config = RunConfig(save_every="3", fsdp=True)
    in_processes(2, tmp_path, killed, images, tmp_path / "run", 8, config, PLAIN)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 5
    weights = {key: value for key, value in alone.items() if not key.startswith("gradient")}
    assert_close(trained(images, PLAIN, tmp_path / "run", True), weights)


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(tmp_path):
    """As a cluster does it that takes the machine away: torchrun passes the signal on."""
    folder_of_images(tmp_path / "data")
    folders = ("--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"))
    python, *arguments = command(*folders, "--epochs", "4", "--device", "cpu")
    with subprocess.Popen(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 1:"):
                process.send_signal(signal.SIGTERM)
                break
        rest, errors = process.communicate()
    assert process.returncode != 0 and rest.count("stopped after iteration") == 1, errors
    stopped = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert f"stopped after iteration {stopped}, saved in" in rest and 24 <= stopped < 96  # 24 steps an epoch
    in_processes(2, tmp_path, main, [*arguments[2:], "--resume"])
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["24", "48", "72", "96"]


def stopped_by_one(images, folder):
    def request(trainer):
        if trainer.step == 3 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped after iteration 3, saved in") as stop:
        trained(images, PLAIN, folder, after_step=request)
    return stop.value.code


def test_a_request_to_one_process_stops_all_at_the_same_step(images, tmp_path):
    assert in_processes(2, tmp_path, stopped_by_one, images, tmp_path / "run") == [143, 143]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


class BrokenBatches(Batches):
    """Batches of which the fourth has an image that is not a number, in the second process."""

    def epoch(self, epoch=0, start=0):
        for k, (x, y) in enumerate(super().epoch(epoch, start), start):
            if k == 3 and self.rank == 1:
                x[1, 2] = float("nan")
            yield x, y


def with_nan(images, folder):
    batches = BrokenBatches(images, 8, 32, True, rank=distributed.rank(), world_size=distributed.world_size())
    with pytest.raises(FloatingPointError, match="the loss is nan at iteration 3") as error:
        train("convnext_atto", PLAIN, batches, images, folder)
    return str(error.value)


def test_a_loss_that_is_not_finite_stops_all_and_leaves_the_batches(images, tmp_path):
    messages = in_processes(2, tmp_path, with_nan, images, tmp_path / "run")
    for rank, message in enumerate(messages):
        file = tmp_path / "run" / f"failed-step-3-process-{rank}.pt"
        batch = torch.load(file, weights_only=True)
        assert str(file) in message and batch["x"].shape == (4, 3, 32, 32) and batch["step"] == 3
        assert batch["x"].isnan().any() == (rank == 1)
        assert all(value.isfinite().all() for value in batch["weights"].values())


# ---- What is wrong is said


def test_batches_that_cannot_be_divided_are_refused(images):
    with pytest.raises(ValueError, match="a batch of 8 images cannot be divided among 3 processes"):
        Batches(images, 8, 32, True, world_size=3)
    with pytest.raises(ValueError, match="a batch of 8 images cannot be divided into micro-batches of 3 images"):
        trained(images, config=RunConfig(micro_batch=3))
    with pytest.raises(ValueError, match=r"mixup and cutmix need an even micro-batch, got 1 images"):
        trained(images, RANDOM, config=RunConfig(micro_batch=1))


def test_parts_of_training_batches_make_up_the_whole(images):
    whole = list(Batches(images, 8, 24, True, 5).epoch(1))
    parts = [list(Batches(images, 8, 24, True, 5, rank=rank, world_size=4).epoch(1)) for rank in range(4)]
    for k, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[k][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[k][1] for part in parts]))


def test_fsdp_needs_processes_and_blocks(images):
    with pytest.raises(ValueError, match="--fsdp shards the network over processes: start several, with torchrun"):
        trained(images, config=RunConfig(fsdp=True))
    with pytest.raises(ValueError, match="Linear has no residual blocks"):
        distributed.blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["road:convnext", "road:resnet50", "timm:convnext_atto", "torchvision:convnext_tiny"])
def test_the_blocks_of_any_model_are_found(name):
    model = create_model(name, Recipe(), 3)
    assert len(distributed.blocks(model)) == {"timm:convnext_atto": 12, "road:resnet50": 16}.get(name, 18)
