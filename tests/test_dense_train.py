"""Training, evaluation and prediction of detectors and segmentation networks, on drawn shapes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from dense_folders import write_ade20k, write_coco, write_map, write_nuclei
from PIL import Image
from PIL.ImageColor import getrgb
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_distributed import assert_close, in_processes
from torch import nn
from torchvision import tv_tensors

from convnext_min import ConvNeXt, build, convnext_atto, weights
from convnext_min.dense import datasets, evaluation, predict, recipes
from convnext_min.dense.batches import DenseBatches, augment_instances, augment_semantic, plain
from convnext_min.dense.features import ConvNeXtFeatures
from convnext_min.dense.models import create_dense_model
from convnext_min.dense.train import main, prepare, read_data, train
from convnext_min.dense.upernet import IGNORED
from convnext_min.experiments.backbone import save
from convnext_min.train.loop import Stopped
from convnext_min.train.optim import create_optimizer, learning_rate_scales
from convnext_min.train.trainer import RunConfig

TINY = {  # networks of a few thousand weights, images of 64 pixels
    "depths": "(1, 1, 1, 1)",
    "dims": "(16, 32, 64, 128)",
    "channels": "16",
    "hidden": "32",
    "rois": "32",
    "min_size": "(64,)",
    "max_size": "64",
    "crop": "64",
    "batch_size": "4",
    "base_batch": "4",
    "drop_path": "0.0",
    "amp": "fp32",
}
PLAIN = RunConfig(device="cpu", accelerate=False)


def settings(**changes: str) -> list[str]:
    return [f"{key}={value}" for key, value in (TINY | changes).items()]


def recipe(head: str, **changes: str) -> recipes.DenseRecipe:
    return recipes.get("shapes", head, "convnext_atto", settings(**changes))


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_SIZE", 64)


def shapes(head: str, split: str = "train", number: int = 4) -> datasets.DenseDataset:
    return datasets.shapes(split, instances="rcnn" in head, number=number)


@pytest.mark.parametrize(
    "head, epochs, channels, hidden",
    [("mask_rcnn", 80, 32, 128), ("cascade_mask_rcnn", 70, 16, 32), ("upernet", 80, 32, 32)],
)
def test_four_images_are_learned_by_heart(head, epochs, channels, hidden, monkeypatch):
    monkeypatch.setattr("convnext_min.dense.batches.augment_instances", lambda image, target, _: plain(image, target))
    monkeypatch.setattr("convnext_min.dense.batches.augment_semantic", lambda image, target, _: plain(image, target))
    data = shapes(head)
    sizes = {"epochs": str(epochs), "channels": str(channels), "hidden": str(hidden)}
    fast = recipe(head, base_lr="5e-3", evaluate_every="0", **sizes)
    _, scores = train(f"{head}:convnext_atto", fast, data, data, config=PLAIN)
    if "rcnn" in head:
        assert scores["mask_ap50"] > 0.9 and scores["box_ap50"] > 0.9
    else:
        assert scores["miou"] > 0.9


def test_average_precision_is_that_of_pycocotools():
    data = shapes("mask_rcnn", number=6)
    rng = np.random.default_rng(0)
    scores, truth, found = evaluation.Scores(data), [], []
    for number in range(len(data)):
        _, target = plain(*data[number])
        shift = rng.integers(-3, 4, 2).tolist()
        guess = {  # the truth, moved, some of another class, and with doubles of the first
            "boxes": torch.cat([target["boxes"], target["boxes"][:1]]) + torch.tensor([*shift[::-1], *shift[::-1]]),
            "masks": torch.cat([target["masks"], target["masks"][:1]]).bool().roll(shift, (1, 2)),
            "labels": torch.cat([target["labels"], target["labels"][:1]]),
            "scores": torch.from_numpy(rng.random(len(target["labels"]) + 1)).float(),
        }
        guess["labels"][0] = guess["labels"][0] % 3 + 1
        scores.update(guess, target)
        for values, into in ((target, truth), (guess, found)):
            for box, mask, label, i in zip(values["boxes"], values["masks"], values["labels"], range(99)):
                x0, y0, x1, y1 = box.tolist()
                entry = {"image_id": number, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0]}
                entry |= {"segmentation": rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))}
                entry |= {"area": float(mask.sum()), "iscrowd": 0, "id": len(into) + 1}
                into.append(entry | ({"score": float(values["scores"][i])} if "scores" in values else {}))
    index = COCO()
    images = [{"id": number, "height": 64, "width": 64} for number in range(len(data))]
    index.dataset = {"images": images, "annotations": truth, "categories": [{"id": i} for i in (1, 2, 3)]}
    index.createIndex()
    expected = {}
    for kind, name in (("segm", "mask"), ("bbox", "box")):
        results = COCO()
        results.dataset = index.dataset | {"annotations": found}
        results.createIndex()
        judge = COCOeval(index, results, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        expected |= {f"{name}_ap": judge.stats[0], f"{name}_ap50": judge.stats[1]}
    assert 0.1 < expected["mask_ap"] < 0.9
    assert scores.compute() == pytest.approx(expected, abs=1e-6)


def test_mean_iou_by_hand():
    scores = evaluation.Scores(shapes("upernet"))  # four classes, of which the last does not occur
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, IGNORED, IGNORED]])
    guess = torch.tensor([[0, 1, 1, 1], [2, 0, 3, 0]])
    scores.update({"labels": guess}, {"labels": truth})
    assert scores.compute()["miou"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("head", ["upernet", "fcn"])
def test_one_class_and_void_are_trained_on_and_scored(head):
    def read(example):
        image, target = drawn.read(example)
        return image, {"labels": torch.where(target["labels"] > 0, 0, IGNORED)}

    drawn = shapes(head)
    data = datasets.DenseDataset(drawn.examples, read, ("object",), "one class", instances=False)
    model, scores = train(f"{head}:convnext_atto", recipe(head, epochs="1"), data, data, config=PLAIN)
    assert scores == {"miou": 1.0} and all(value.isfinite().all() for value in model.state_dict().values())


def test_segmentation_averages_sizes_and_flips(monkeypatch):
    model = create_dense_model("fcn:convnext_atto", recipe("fcn"), 3).eval()
    sizes = []

    def forward(images):
        sizes.append(tuple(images[0].shape[1:]))
        logits = torch.zeros(3, *images[0].shape[1:])
        logits[1, :, 0] = 9.0  # the left edge, whatever is there
        return [logits]

    monkeypatch.setattr(model, "forward", forward)
    multi = recipe("fcn", test_scales="(0.5, 1.0)", test_flip="True", max_size="128")
    found = evaluation.predict(model, torch.rand(3, 32, 48), multi)
    assert sizes == [(32, 48), (32, 48), (64, 96), (64, 96)]
    assert found["labels"].shape == (32, 48)
    assert (found["labels"][:, [0, -1]] == 1).all() and (found["labels"][:, 10:-10] != 1).all()


@pytest.mark.parametrize(
    "length, window, places",
    [(512, 512, [0]), (300, 512, [0]), (513, 512, [0, 1]), (853, 512, [0, 341]), (1024, 512, [0, 341, 512])],
)
def test_windows_cover_a_side_in_steps_of_two_thirds(length, window, places):
    assert evaluation.starts(length, window) == places


def test_a_sliding_window_averages_logits_where_windows_overlap():
    seen = []

    def model(images):
        seen.append(tuple(images[0].shape[1:]))
        return [images[0] + len(seen)]  # 1, 2, ... are added in the first, second, ... window

    image = torch.rand(3, 32, 80)
    logits = evaluation.segment(model, image, 48)
    assert seen == [(32, 48)] * 2  # as high as the image
    expected = image + torch.cat([torch.full((32,), 1.0), torch.full((16,), 1.5), torch.full((32,), 2.0)])
    assert torch.allclose(logits, expected)
    assert torch.equal(evaluation.segment(model, image), image + 3)


def test_predictions_use_the_recipes_window(monkeypatch):
    model = create_dense_model("fcn:convnext_atto", recipe("fcn"), 3).eval()
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda images: sizes.append(images[0].shape[1:]) or forward(images))
    evaluation.predict(model, torch.rand(3, 32, 48), recipe("fcn", window="32", max_size="128"))
    assert set(sizes) == {(32, 32)} and len(sizes) == 3 * 5  # of 64x96


def test_augmented_boxes_stay_on_their_objects():
    wide = recipe("mask_rcnn", resize_and_crop="True", vertical_flip="True", max_size="1333")
    data = shapes("mask_rcnn", number=3)
    for seed in range(6):
        torch.manual_seed(seed)
        image, target = augment_instances(*data[seed % 3], wide)
        height, width = image.shape[1:]
        assert target["masks"].shape[1:] == (height, width) and len(target["labels"]) == len(target["boxes"])
        for (x0, y0, x1, y1), mask in zip(target["boxes"].round().int().tolist(), target["masks"]):
            inside = mask[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1].sum()
            assert inside >= 0.98 * mask.sum() and mask.any()


def test_a_semantic_crop_is_filled_with_pixels_that_are_ignored():
    data = shapes("upernet")
    torch.manual_seed(0)
    image, target = augment_semantic(*data[0], recipe("upernet", crop="96", min_size="(48,)"))
    assert image.shape == (3, 96, 96) and target["labels"].shape == (96, 96)
    assert (target["labels"] == IGNORED).sum() == 96 * 96 - 48 * 48
    assert image.dtype == torch.float32 and image.max() <= 1


def test_batches_depend_on_seed_epoch_and_number_alone():
    data = shapes("mask_rcnn", number=12)
    batches = DenseBatches(data, recipe("mask_rcnn"), seed=3)
    whole = list(batches.epoch(1))
    (late, _), (other, _) = next(batches.epoch(1, start=2)), next(batches.epoch(2, start=2))
    assert len(whole) == len(batches) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[2][0], late))
    assert not all(torch.equal(a, b) for a, b in zip(late, other))
    halves = [next(DenseBatches(data, recipe("mask_rcnn"), 3, rank, 2).epoch(1))[0] for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[0][0], [*halves[0], *halves[1]]))
    with pytest.raises(ValueError, match="batch_size=4 is larger than the data set"):
        DenseBatches(shapes("mask_rcnn", number=3), recipe("mask_rcnn"), 0)


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn", "upernet"])
def test_a_resumed_run_ends_with_the_same_weights(head, tmp_path, monkeypatch):
    run = (f"{head}:convnext_atto", recipe(head, epochs="2"), shapes(head, number=8), shapes(head, "val", 2))
    whole, scores = train(*run, tmp_path / "whole", config=PLAIN)

    original = DenseBatches.epoch

    def interrupted(self, epoch=0, start=0):
        for batch in original(self, epoch, start):
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(DenseBatches, "epoch", interrupted)
        with pytest.raises(Stopped, match="stopped after iteration 3"):
            train(*run, tmp_path / "part", config=PLAIN)
    resumed, _ = train(*run, tmp_path / "part", resume=True, config=PLAIN)
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)

    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"checkpoint.pt", "best.pt", "log.csv", "summary.json"} <= files
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert {key: summary[key] for key in scores} == scores and summary["model"] == run[0]


def test_gradient_accumulation_takes_lists_of_images():
    data = shapes("mask_rcnn")
    config = RunConfig(device="cpu", accelerate=False, micro_batch=2)
    trainer = prepare("mask_rcnn:convnext_atto", recipe("mask_rcnn"), data, config=config)
    seen = []
    forward = trainer.model.forward
    trainer.compiled_model = lambda x, y: seen.append((len(x), len(y))) or forward(x, y)
    trainer.train_step(*next(trainer.batches.epoch(0)))
    assert seen == [(2, 2), (2, 2)] and trainer.step == 1


def test_layer_decay_is_for_the_backbone():
    network = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    scales = learning_rate_scales(torch.nn.Sequential(ConvNeXtFeatures(network), torch.nn.Linear(2, 2)), 0.5)
    assert scales["1.weight"] == scales["0.norms.0.weight"] == 1.0
    assert scales["0.network.stages.3.0.gamma"] == 0.5
    assert scales["0.network.downsample_layers.0.0.weight"] == 0.5**5


def test_segmentation_of_ade20k_decays_by_stage():
    ade20k = recipes.get("ade20k", "upernet", "convnext_tiny")
    groups = create_optimizer(create_dense_model("upernet:convnext_tiny", ade20k, 150), ade20k).param_groups
    scales = sorted({group["lr_scale"] for group in groups}, reverse=True)
    assert scales == pytest.approx([0.9**power for power in (0, 3, 4, 5, 6, 7)])  # heads, four stages, downsampling


def test_the_backbone_starts_from_a_checkpoint(tmp_path):
    source = ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), num_classes=10)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    model = create_dense_model("mask_rcnn:convnext_atto", recipe("mask_rcnn"), 3, str(tmp_path / "weights.pth"))
    mine = model.backbone.features.network.state_dict()
    assert mine and all(torch.equal(value, source.state_dict()[key]) for key, value in mine.items())


@pytest.mark.parametrize(
    "backbone, source, settings",
    [
        ("convnext_atto", convnext_atto(num_classes=7), []),
        ("road:resnet50", build("resnet50", num_classes=7, width_multiplier=0.125), ["width_multiplier=0.125"]),
    ],
    ids=["convnext_atto", "resnet50"],
)
def test_the_backbone_starts_from_a_folder_in_half_precision(backbone, source, settings, tmp_path):
    expected = {key: value.half().float() for key, value in source.state_dict().items() if value.is_floating_point()}
    save(source, tmp_path, tuple("abcdefg"), 64)  # as the book's backbones are, which have seven classes
    model = create_dense_model(f"fcn:{backbone}", recipes.get("shapes", "fcn", backbone, settings), 3, str(tmp_path))
    mine = model.features.network.state_dict()
    kept = [key for key in expected if not key.startswith(("norm.", "head."))]
    assert len(kept) > 100 and all(torch.equal(mine[key], expected[key]) for key in kept)


def test_the_backbone_starts_from_a_tag(tmp_path, monkeypatch):
    expected = convnext_atto(num_classes=7).state_dict()
    torch.save({"model": expected}, tmp_path / "atto_22k.pth")
    monkeypatch.setattr(weights, "OFFICIAL_URL", f"{tmp_path.as_uri()}/")
    monkeypatch.setitem(weights.PRETRAINED, "convnext_atto", {"in22k": "atto_22k.pth"})
    model = create_dense_model("fcn:convnext_atto", recipe("fcn", depths="None", dims="None"), 3, "in22k")
    mine = model.features.network.state_dict()
    assert len(mine) == len(expected) - 4  # without the last norm and the classifier
    assert all(torch.equal(value, expected[key]) for key, value in mine.items())


def test_missing_weights_are_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no weights '.*missing' of convnext_atto"):
        create_dense_model("fcn:convnext_atto", recipe("fcn", depths="None", dims="None"), 3, missing)
    road = recipes.get("shapes", "fcn", "road:resnet50", ["width_multiplier=0.125"])
    with pytest.raises(ValueError, match=r"no weights '.*missing' of road:resnet50"):
        create_dense_model("fcn:road:resnet50", road, 3, missing)


@pytest.mark.parametrize("name", ["yolo:convnext_atto", "mask_rcnn", "fcn:timm:resnet18"])
def test_other_networks_are_refused(name):
    with pytest.raises(ValueError, match=r"expected <head>:<backbone> with one of the heads mask_rcnn"):
        create_dense_model(name, recipe("fcn"), 3)


@pytest.mark.parametrize("backbone", ["road:resnet50", "road:convnext"])
def test_steps_of_the_road_are_backbones(backbone):
    values = recipes.get("shapes", "mask_rcnn", backbone, ["width_multiplier=0.125", "channels=16", "hidden=32"])
    model = create_dense_model(f"mask_rcnn:{backbone}", values, 3).eval()
    assert model([torch.rand(3, 64, 64)])[0]["masks"].shape[1:] == (1, 64, 64)


def test_predictions_are_drawn_into_the_users_image(tmp_path, capsys):
    for head in ("mask_rcnn", "upernet"):
        data = shapes(head)
        train(f"{head}:convnext_atto", recipe(head, epochs="1"), data, data, tmp_path / head, config=PLAIN)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "mine.jpg")
        Image.new("RGB", (500, 400)).save(tmp_path / "large.jpg")
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        files = [str(tmp_path / name) for name in ("mine.jpg", "broken.jpg", "out/mine.png", "large.jpg")]
        (tmp_path / "out").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(files[2])
        checkpoint = str(tmp_path / head / "checkpoint.pt")
        with pytest.raises(SystemExit) as end:
            options = ["--checkpoint", checkpoint, "--output", str(tmp_path / "out"), "--threshold", "0"]
            predict.main([*options, *files])
        assert end.value.code == 1
        sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
        assert sizes == {"mine.png": (40, 30), "mine-2.png": (70, 50), "mine-3.png": (40, 30), "large.png": (160, 128)}
        said = capsys.readouterr()
        assert f"{files[0]}: " in said.out and f"error: {files[1]} cannot be read" in said.err
        assert ("Colours: background #0072b2" in said.out) == (head == "upernet")


def test_drawings_show_masks_above_the_threshold_only():
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.2]),
        "masks": torch.zeros(2, 40, 40, dtype=torch.bool),
    }
    found["masks"][0, :10, :10] = found["masks"][1, 20:30, 20:30] = True
    drawn = predict.draw(torch.zeros(3, 40, 40, dtype=torch.uint8), found, ("nucleus",))
    assert drawn[:, 5, 5].any() and not drawn[:, 25, 25].any()
    assert predict.describe(found, ("disc", "square")) == "1 disc"
    assert predict.describe({"labels": torch.tensor([[0, 0, 0, 1]])}, ("sky", "road")) == "75% sky, 25% road"


@pytest.mark.parametrize("number", [11, 150])  # of CamVid and of ADE20K
def test_every_class_has_a_colour_of_its_own(number):
    colors = torch.tensor([getrgb(color) for color in predict.palette(number)])
    assert len(colors) == number
    distances = (colors[:, None] - colors).abs().amax(2) + 255 * torch.eye(number, dtype=torch.int64)
    assert distances.min() >= 5


@pytest.mark.parametrize("task, head", [("coco", "cascade_mask_rcnn"), ("ade20k", "upernet")])
def test_commands_for_coco_and_ade20k_pass_a_dry_run(task, head, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    if task == "coco":
        path = write_coco(folder) / "annotations" / "instances_train2017.json"
        path.write_text(path.read_text().replace('"bbox": [2, 1, 4, 3]', '"bbox": [2, 1, 4, 0]'))
    else:
        write_ade20k(folder, np.full((30, 40), 7), "ab")
    command = ["--task", task, "--data", str(folder), "--head", head, "--backbone", "convnext_tiny", "--dry-run"]
    command += ["--device", "cpu", "--output", str(tmp_path / "run"), "--set"]
    main([*command, *settings(batch_size="2", base_batch="2")])
    said = capsys.readouterr().out
    assert "OK: batch" in said and ("annotation 1 has a box without area" in said) == (task == "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_command_names_what_is_wrong_with_the_data(tmp_path):
    options = ["--task", "nuclei", "--data", str(write_nuclei(tmp_path)), "--head", "mask_rcnn", "--dry-run"]
    options += ["--set", *settings()]
    write_map(tmp_path / "labels" / "0.png", np.zeros((5, 5)))
    with pytest.raises(SystemExit, match=r"nuclei train, 8 images: 1 broken\n  .*labels/0.png has 5x5 pixels"):
        main(options)
    options[options.index("mask_rcnn")] = "upernet"
    with pytest.raises(SystemExit, match="nuclei has objects: upernet is not for them"):
        main(options)
    with pytest.raises(SystemExit, match=r"nothing\.pt"):  # before the damaged map
        main([*options, "--head", "mask_rcnn", "--pretrained", str(tmp_path / "nothing.pt")])


def test_both_splits_must_have_the_same_classes(tmp_path):
    folder = write_coco(tmp_path)
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    gone = content["categories"].pop(0)
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != gone["id"]]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"COCO train, .* must list the same classes.* differ in {gone['name']}$"):
        read_data("coco", "mask_rcnn", str(folder))


def test_random_colours_keep_the_order_of_the_channels_unless_asked():
    image, labels = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.int64)
    image[0] = 200  # red
    for photometric, permuted in (("mmseg", False), ("torchvision", True)):
        setting = recipe("upernet", photometric=photometric)
        torch.manual_seed(0)
        example = tv_tensors.Image(image), {"labels": tv_tensors.Mask(labels)}
        seen = [augment_semantic(*example, setting)[0] for _ in range(40)]
        assert any(x.mean((1, 2)).argmax() != 0 for x in seen) == permuted
        assert len({round(x.mean().item(), 4) for x in seen}) > 10  # but the colours do change


def test_upernet_needs_two_images_at_a_time(tmp_path):
    options = ["--task", "shapes", "--head", "upernet", "--device", "cpu", "--dry-run", "--micro-batch", "1"]
    with pytest.raises(SystemExit, match=r"upernet has a BatchNorm .* needs two images at a time"):
        main([*options, "--set", *settings()])


def test_a_detector_is_evaluated_again_with_other_sizes(tmp_path, monkeypatch):
    data = shapes("mask_rcnn")
    train("mask_rcnn:convnext_atto", recipe("mask_rcnn", epochs="1"), data, data, tmp_path, config=PLAIN)
    tested = []
    monkeypatch.setattr("convnext_min.dense.train.evaluate", lambda model, *_: tested.append(model) or {"mask_ap": 0.0})
    command = ["--task", "shapes", "--device", "cpu", "--evaluate", str(tmp_path / "checkpoint.pt"), "--set"]
    main([*command, "min_size=(48,)", "detections=7"])
    assert tested[0].transform.min_size == (48,) and tested[0].roi_heads.detections_per_img == 7
    with pytest.raises(SystemExit, match=r"the weights of .*checkpoint\.pt do not fit its recipe with"):
        main([*command, "channels=24"])


def test_a_checkpoint_is_evaluated_again_with_other_tests(tmp_path, capsys, monkeypatch):
    options = ["--task", "shapes", "--head", "upernet", "--device", "cpu", "--epochs", "1", "--set", *settings()]
    main([*options, "--output", str(tmp_path)])
    trained = capsys.readouterr().out.split("miou ")[1].split()[0]
    command = ["--task", "shapes", "--device", "cpu", "--evaluate", str(tmp_path / "checkpoint.pt")]
    main(command)
    assert capsys.readouterr().out.split("miou ")[1].split() == [trained]
    windows, starts = [], evaluation.starts
    monkeypatch.setattr(evaluation, "starts", lambda *sides: windows.append(sides) or starts(*sides))
    main([*command, "--set", "window=32"])
    assert set(windows) == {(64, 32)} and "miou" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot set 'windows=32'"):
        main([*command, "--set", "windows=32"])
    monkeypatch.setattr(datasets, "SHAPES", ("disc", "square"))
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is for 4 other classes than shapes: "):
        main(command)
    with pytest.raises(SystemExit, match=r"nothing\.pt"):
        main([*command[:-1], str(tmp_path / "nothing.pt")])
    with pytest.raises(SystemExit):
        main(["--task", "shapes"])
    assert "--head is needed: mask_rcnn, " in capsys.readouterr().err


def test_two_processes_share_batches_and_evaluation(tmp_path, monkeypatch):
    options = ["--task", "shapes", "--head", "mask_rcnn", "--device", "cpu", "--output", str(tmp_path / "run")]
    in_processes(2, tmp_path, main, [*options, "--set", *settings(batch_size="32", base_batch="32", epochs="1")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["processes"], summary["micro_batch"], summary["steps"]) == (2, 16, 2)
    monkeypatch.undo()  # images as large as those of the other processes
    model, state = predict.load_model(tmp_path / "run" / "checkpoint.pt")
    scores = evaluation.evaluate(model, datasets.shapes("val"), state["recipe"])
    assert {key: summary[key] for key in scores} == pytest.approx(scores, abs=1e-3)


def scores_of(head, number):
    """The scores on some shapes: of an untrained segmentation network, or of a detector that finds all, but shifted."""
    torch.manual_seed(0)
    model, data = create_dense_model(f"{head}:convnext_atto", recipe(head), 4), shapes(head, "val", number)
    if head == "upernet":
        return evaluation.evaluate(model, data, recipe(head))
    truth = {image.sum().item(): plain(image, target)[1] for image, target in data}

    def detect(model, image, recipe):
        target = truth[round((255 * image).sum().item())]
        return {
            "boxes": target["boxes"] + 1,
            "masks": target["masks"].bool().roll((1, 1), (1, 2)),
            "labels": target["labels"],
            "scores": torch.linspace(0.5, 1, len(target["labels"])),
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "predict", detect)
        return evaluation.evaluate(model, data, recipe(head))


@pytest.mark.parametrize("head, number", [("mask_rcnn", 1), ("mask_rcnn", 3), ("upernet", 3)])
def test_processes_may_have_different_numbers_of_images(head, number, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHAPES_SIZE", 96)  # as in the other processes
    first, second = in_processes(2, tmp_path, scores_of, head, number)
    expected = scores_of(head, number)
    assert first == second == pytest.approx(expected, abs=1e-6) and 0.02 < min(expected.values()) < 0.98


def trained_by_sgd():
    """The weights of a segmentation network before and after three iterations; SGD minds the scale of gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "SHAPES_SIZE", 64)
        for layer in ("BatchNorm2d", "Dropout2d"):  # on CPUs, each process has statistics and draws of its own
            patch.setattr(nn, layer, nn.Identity)
        sgd = recipe("fcn", optimizer="sgd", betas="None", base_lr="0.02", warmup="0.0")
        trainer = prepare("fcn:convnext_atto", sgd, shapes("fcn", number=12), config=PLAIN)
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        for images, targets in trainer.batches.epoch():
            trainer.train_step(images, targets)
    return before, dict(trainer.model.state_dict())


def test_two_processes_give_the_weights_of_one(tmp_path):
    before, alone = trained_by_sgd()
    for mine in in_processes(2, tmp_path, trained_by_sgd):
        assert_close(mine[0], before)
        assert_close(mine[1], alone)
    moved = max((alone[key] - before[key]).abs().max() for key in alone)
    assert moved > 0.01  # far more than the tolerance
