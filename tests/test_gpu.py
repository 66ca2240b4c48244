"""What only a GPU computes: 16-bit training, compiled networks, NCCL, synchronized BatchNorm; skipped without one."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import TINY
from torch import nn

from convnext_min.convnext import convnext_atto
from convnext_min.data import Batches
from convnext_min.dense import datasets, recipes
from convnext_min.dense.train import train as train_dense
from convnext_min.train import RunConfig, Trainer, create_model, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and TEST_GPU=1")


def first_losses(images, recipe, device, config=None, name="convnext_atto"):
    """The losses of the first five steps from the same weights on the same images."""
    torch.manual_seed(0)
    model = create_model(name, recipe, len(images.classes))
    batches = Batches(images, recipe.batch_size, recipe.resolution, True, 0, recipe.crop_scale)
    run = Trainer(model, name, recipe, batches, 0, torch.device(device), config or RunConfig(started=0.0))
    return [run.train_step(x, y) for x, y in batches.epoch(0)]


@pytest.mark.parametrize(("amp", "tolerance"), [("fp32", 0.01), ("fp16", 0.03), ("bf16", 0.05)])
def test_a_gpu_takes_the_steps_of_the_cpu_in_every_number_format(images, amp, tolerance):
    expected = first_losses(images, TINY, "cpu")
    losses = first_losses(images, replace(TINY, amp=amp), "cuda")
    assert losses == pytest.approx(expected, abs=tolerance)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(images):
    torch.manual_seed(0)
    recipe = replace(TINY, amp="fp16")
    model = create_model("convnext_atto", recipe, len(images.classes))
    batches = Batches(images, 8, 32, True, 0)
    run = Trainer(model, "convnext_atto", recipe, batches, 0, torch.device("cuda"), RunConfig(started=0.0))
    run.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**127)  # the first gradients are infinite
    x, y = next(batches.epoch(0))
    before = model.head.weight.detach().clone()
    run.train_step(x, y)
    assert torch.equal(model.head.weight, before)
    assert run.scaler.get_scale() == 2.0**126


def test_compiled_training_takes_the_same_steps(images):
    plain = first_losses(images, TINY, "cuda")
    compiled = first_losses(images, TINY, "cuda", RunConfig(started=0.0, compile=True))
    assert compiled == pytest.approx(plain, abs=0.01)


def test_a_run_on_a_gpu_is_resumed_and_its_weights_are_read_on_a_cpu(images, tmp_path):
    recipe = replace(TINY, epochs=1, ema_decay=0.0)
    history = train("convnext_atto", recipe, images, images, tmp_path)
    again = train("convnext_atto", recipe, images, images, tmp_path, resume=True)
    assert torch.equal(history.predictions, again.predictions)
    state = torch.load(tmp_path / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = create_model("convnext_atto", TINY, len(images.classes)).eval()
    model.load_state_dict(state["weights"])
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), history.model.cpu()(x))


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn", "upernet"])
def test_detection_and_segmentation_train_on_a_gpu(head, tmp_path):
    recipe = recipes.get("shapes", head, "convnext_atto", ["epochs=1"])
    sets = [datasets.shapes(split, instances=head != "upernet").part(0, 8) for split in ("train", "val")]
    _, scores = train_dense(f"{head}:convnext_atto", recipe, *sets, tmp_path)
    assert all(0 <= score <= 1 for score in scores.values())
    assert (tmp_path / "best.pt").exists()


@pytest.fixture
def nccl(tmp_path):
    """A group of this process alone that communicates over NCCL."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_process_reduces_its_gradients_over_nccl(nccl):
    torch.manual_seed(0)
    model = convnext_atto(num_classes=10).cuda()
    alone, x = copy.deepcopy(model), torch.rand(2, 3, 64, 64, device="cuda")
    nn.parallel.DistributedDataParallel(model)(x).sum().backward()
    alone(x).sum().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


def synchronized(rank: int, folder: str) -> None:
    """Compare SyncBatchNorm in two processes on half a batch each with BatchNorm on the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = nn.BatchNorm2d(8).cuda()
    halves = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    x = torch.randn(6, 8, 5, 5, device="cuda") * torch.arange(1, 7, device="cuda").view(6, 1, 1, 1)
    expected = whole(x)[3 * rank : 3 * rank + 3]
    mine = halves(x[3 * rank : 3 * rank + 3])
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(halves.running_var, whole.running_var)
    dist.destroy_process_group()


def test_synchronized_batch_norm_sees_the_batch_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(synchronized, (str(tmp_path),), nprocs=2)
