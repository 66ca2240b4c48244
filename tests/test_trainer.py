"""One step of training: schedule, EMA, clipping, precision, compilation, random numbers."""

from dataclasses import asdict, replace

import pytest
import torch
from helpers import EVERYTHING_RANDOM, TINY, equal, new_trainer
from torch import nn

from convnext_min.data import Batches
from convnext_min.dense.recipes import FOR_CLASSIFIERS, DenseRecipe
from convnext_min.fast import FastDepthwise
from convnext_min.recipes import Recipe
from convnext_min.train import RunConfig, Trainer, create_model, evaluate


def test_the_learning_rate_of_a_step_is_the_schedules(images):
    run = new_trainer(TINY, images)  # 5 steps an epoch, 15 in all
    rates = []
    for epoch in range(3):
        for x, y in run.batches.epoch(epoch):
            run.train_step(x, y)
            rates.append({group["lr"] for group in run.optimizer.param_groups})
    assert rates == [{TINY.lr_at(k / 15)} for k in range(15)]
    assert run.progress == 1.0


def test_averaged_weights_follow_their_recursion(images):
    run = new_trainer(replace(TINY, ema_horizon=0.5), images)
    weight, mean = run.model.head.weight, None
    for updates, (x, y) in enumerate(run.batches.epoch(0)):
        run.train_step(x, y)
        now = weight.detach().double()
        decay = 1 - 1 / (1 + 0.5 * updates)
        mean = now.clone() if mean is None else decay * mean + (1 - decay) * now
    torch.testing.assert_close(run.eval_model.head.weight.double(), mean, rtol=1e-5, atol=1e-7)
    assert not torch.equal(run.eval_model.head.weight, weight)


def test_averages_hold_the_running_statistics_of_batch_norm(images):
    of_road = {"depths": None, "dims": None, "layer_scale_init": Recipe.layer_scale_init, "width_multiplier": 0.125}
    recipe = replace(TINY, **of_road)
    run = new_trainer(recipe, images, name="road:fewer_norms")
    for x, y in run.batches.epoch(0):
        run.train_step(x, y)
    norm = run.eval_model.stages[0][0].norm
    assert norm.running_mean.abs().max() > 0
    assert int(norm.num_batches_tracked) <= 5


def test_on_a_cpu_depthwise_convolutions_are_accelerated(images):
    run = new_trainer(TINY, images)
    assert isinstance(run.model.stages[0][0].dwconv, FastDepthwise)
    assert "accelerated" in str(run)
    plain = new_trainer(TINY, images, config=RunConfig(accelerate=False))
    assert type(plain.model.stages[0][0].dwconv) is nn.Conv2d
    assert "accelerated" not in str(plain)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(images):
    run = new_trainer(TINY, images)
    x, y = next(run.batches.epoch(0))
    run.train_step(x, y)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss is nan at iteration 1, at learning rate"):
        run.train_step(x * float("nan"), y)
    assert equal(before, run.model.state_dict())


def test_gradients_are_clipped_only_if_asked(images):
    x, y = next(new_trainer(TINY, images).batches.epoch(0))
    norms = {}
    for clip in (None, 1e-3):
        run = new_trainer(replace(TINY, clip_grad=clip), images)

        def note(optimizer, args, kwargs, clip=clip):
            grads = [parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]]
            norms[clip] = torch.cat(grads).norm().item()

        run.optimizer.register_step_pre_hook(note)
        run.train_step(x, y)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[None] > 0.1


@pytest.mark.parametrize(("kind", "field"), [(Recipe, "exif_orientation"), (DenseRecipe, "window")])
def test_a_checkpoint_from_before_a_field_existed_is_resumed_with_its_default(images, kind, field):
    recipe = kind(**{name: value for name, value in asdict(TINY).items() if name not in FOR_CLASSIFIERS})
    before = new_trainer(recipe, images)
    before.train_step(*next(before.batches.epoch(0)))
    state = before.state_dict()
    state["recipe"] = {name: value for name, value in state["recipe"].items() if name != field}
    after = new_trainer(recipe, images)
    after.load_state_dict(state)
    assert after.step == 1
    other = new_trainer(replace(recipe, **{field: 64 if field == "window" else False}), images)
    with pytest.raises(ValueError, match=rf"its recipe is \{{'{field}': (0|True)\}}, here it is"):
        other.load_state_dict(state)


def test_overfits_twenty_images(images):
    few = images.subset(slice(20))
    recipe = replace(TINY, epochs=100, batch_size=20, base_batch=20, dims=(16, 16, 32, 32), label_smoothing=0.0)
    run = new_trainer(replace(recipe, crop_scale=(0.8, 1.0)), few)
    first = last = None
    for epoch in range(100):
        for x, y in run.batches.epoch(epoch):
            last = run.train_step(x, y)
            first = first or last
    assert first > 2.0 and last < 0.2
    assert evaluate(run.model, Batches(few, 7, 32, train=False)).top1 == 1.0


# ---- The machine


def test_the_scaler_of_fp16_leaves_the_steps_and_is_part_of_the_checkpoint(images):
    plain, scaled = new_trainer(replace(TINY, clip_grad=0.5), images), new_trainer(replace(TINY, clip_grad=0.5), images)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # fp16 itself needs a GPU
    for x, y in plain.batches.epoch(0):
        assert scaled.train_step(x, y) == pytest.approx(plain.train_step(x, y), rel=1e-5)
    torch.testing.assert_close(dict(scaled.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-4, atol=1e-5)
    other = new_trainer(replace(TINY, clip_grad=0.5), images)
    other.scaler = torch.amp.GradScaler("cpu")
    other.load_state_dict(scaled.state_dict())
    assert other.scaler.get_scale() == 4096.0  # doubled twice in five steps


def test_compiling_changes_neither_the_result_nor_the_names_of_the_weights(images, monkeypatch):
    compiled = []
    plain_compile = torch.compile  # "eager" traces and wraps, without generating code
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or plain_compile(net, backend="eager"))
    config = RunConfig(compile=True)
    run, plain = new_trainer(TINY, images, config=config), new_trainer(TINY, images)
    assert (
        compiled == [run.model] and type(run.model.stages[0][0].dwconv) is nn.Conv2d
    )  # the compiler gets plain layers
    for x, y in plain.batches.epoch(0):
        run.train_step(x, y), plain.train_step(x, y)
    torch.testing.assert_close(dict(run.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients_where_blocks_draw(images):
    config = RunConfig(checkpoint_activations=True)
    run, plain = new_trainer(EVERYTHING_RANDOM, images, config=config), new_trainer(EVERYTHING_RANDOM, images)
    kept = []
    for each in (run, plain):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            for x, y in each.batches.epoch(0):
                each.train_step(x, y)
        kept.append("end")
    assert equal(run.model.state_dict(), plain.model.state_dict())
    first, second = kept[: kept.index("end")], kept[kept.index("end") + 1 : -1]
    assert sum(first) < sum(second) / 2


def test_checkpointed_activations_count_running_statistics_once(images):
    recipe = replace(TINY, width_multiplier=0.125, depths=None, dims=None, layer_scale_init=Recipe().layer_scale_init)
    states = []
    for config in (RunConfig(), RunConfig(checkpoint_activations=True)):
        run = new_trainer(recipe, images, name="road:resnet50", config=config)
        for x, y in run.batches.epoch(0):
            run.train_step(x, y)
        states.append(run.model.state_dict())
    assert any(key.endswith("num_batches_tracked") for key in states[0])
    assert equal(*states)


def test_random_erasing_is_left_to_a_loader_that_does_it(images):
    recipe = replace(TINY, erasing=0.5)
    assert new_trainer(recipe, images).erase is not None
    batches = Batches(images, 8, 32, True)
    batches.erases = True
    model = create_model("convnext_atto", recipe, 10)
    assert Trainer(model, "", recipe, batches, 0, torch.device("cpu"), RunConfig()).erase is None
