"""Backbone, pyramid and heads of detection and segmentation: shapes, odd targets, and that they learn."""

from functools import partial

import pytest
import torch

from convnext_min import STEPS, ConvNeXt, build, convnext
from convnext_min.dense import recipes
from convnext_min.dense.cascade import cascade_mask_rcnn
from convnext_min.dense.features import ConvNeXtFeatures, with_fpn
from convnext_min.dense.mask_rcnn import mask_rcnn
from convnext_min.dense.models import create_dense_model
from convnext_min.dense.upernet import FCN, IGNORED, Segmenter, fcn, upernet
from convnext_min.train.optim import create_optimizer

SMALL = {"channels": 32, "hidden": 64, "anchor_scale": 2.0, "rois": 64, "min_size": (64,), "max_size": 128}
DETECTORS = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}
SEGMENTERS = {"upernet": partial(upernet, channels=32), "fcn": fcn}


def features() -> ConvNeXtFeatures:
    torch.manual_seed(0)
    return ConvNeXtFeatures(ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), layer_scale_init_value=1.0))


def target(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> dict[str, torch.Tensor]:
    """The annotation of filled boxes, all of class 1."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": masks,
    }


def image(annotation: dict[str, torch.Tensor]) -> torch.Tensor:
    return annotation["masks"].amax(0).expand(3, -1, -1).float() if len(annotation["boxes"]) else torch.zeros(3, 64, 64)


@pytest.mark.parametrize("name", sorted(name for name in vars(convnext) if name.startswith("convnext_")))
def test_every_variant_is_a_backbone_of_every_head(name):
    for task, heads in (("coco", DETECTORS), ("ade20k", SEGMENTERS)):
        for head in heads:
            recipe = recipes.get(task, head, name)
            with torch.device("meta"):
                model = create_dense_model(f"{head}:{name}", recipe, 7)
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            groups = create_optimizer(model, recipe).param_groups  # with layer-wise decay
            assert sum(len(group["params"]) for group in groups) == len(trainable)


@pytest.mark.parametrize("name", ["ConvNeXt", *STEPS])
def test_levels_have_the_strides_and_shapes_of_a_pyramid(name):
    network = build(name, width_multiplier=0.125) if name in STEPS else ConvNeXt(dims=(8, 16, 32, 64))
    backbone = ConvNeXtFeatures(network)
    assert backbone.channels == [backbone.channels[0] * 2**i for i in range(4)]
    levels = backbone(torch.zeros(2, 3, 96, 64))
    assert list(levels) == ["0", "1", "2", "3"]
    for i, (level, channels) in enumerate(zip(levels.values(), backbone.channels)):
        assert level.shape == (2, channels, 96 // 2 ** (i + 2), 64 // 2 ** (i + 2))
    pyramid = with_fpn(backbone, 24)(torch.zeros(2, 3, 128, 64))
    assert [tuple(level.shape) for level in pyramid.values()] == [
        (2, 24, 32, 16),
        (2, 24, 16, 8),
        (2, 24, 8, 4),
        (2, 24, 4, 2),
        (2, 24, 2, 1),
    ]


def test_a_convnext_gets_a_norm_on_each_level_and_keeps_its_weights():
    torch.manual_seed(0)
    network = ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128))
    before = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith(("norm", "head"))}
    levels = ConvNeXtFeatures(network)(torch.randn(1, 3, 64, 64))
    for level in levels.values():
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level.mean(1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(level.var(1, correction=0).mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    resnet = ConvNeXtFeatures(build("resnet50", width_multiplier=0.125))
    assert not list(resnet.norms.parameters())


@pytest.mark.parametrize("name", [*DETECTORS, *SEGMENTERS])
def test_one_update_lowers_the_loss_on_one_image(name):
    annotation = target((8, 8, 32, 40), size=(70, 50))  # no side is divisible by 32, also not after resizing
    images, targets = [image(annotation)], [annotation]
    if name in DETECTORS:
        model = DETECTORS[name](features(), 1, **SMALL)
    else:
        model = SEGMENTERS[name](features(), 2)
        images, targets = images * 2, [{"labels": annotation["masks"][0].long()}] * 2  # UperNet's BatchNorm needs two
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the same boxes are sampled, and the same channels dropped
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)  # as several processes need


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    "boxes",
    [[], [(5, 5, 6, 6)], [(8 * i, 8 * j, 8 * i + 6, 8 * j + 6) for i in range(8) for j in range(8)]],
    ids=["no object", "one pixel", "64 objects"],
)
def test_odd_targets_give_finite_losses_and_gradients(name, boxes):
    model = DETECTORS[name](features(), 1, **SMALL).train()
    annotation = target(*boxes)
    losses = model([image(annotation), torch.zeros(3, 64, 64)], [annotation, target()])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # as several processes need


@pytest.mark.parametrize("name", DETECTORS)
def test_an_object_whose_mask_is_empty_is_no_error(name):
    annotation = target((8, 8, 32, 40))
    annotation["masks"].zero_()
    losses = DETECTORS[name](features(), 1, **SMALL).train()([torch.zeros(3, 64, 64)], [annotation])
    assert sum(losses.values()).isfinite()


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_in_the_coordinates_of_each_image(name):
    model = DETECTORS[name](features(), 3, **SMALL).eval()
    images = [torch.rand(3, 50, 70), torch.rand(3, 97, 61)]  # neither is divisible by 32
    with torch.no_grad():
        for heads in getattr(model.roi_heads, "stages", [model.roi_heads]):
            heads.score_thresh = 0.0
        results = model(images)
    for x, result in zip(images, results):
        n = len(result["boxes"])
        assert n > 0 and result["masks"].shape == (n, 1, *x.shape[1:])
        assert set(result["labels"].tolist()) <= {1, 2, 3}
        assert result["boxes"][:, 2].max() <= x.shape[2] and result["boxes"][:, 3].max() <= x.shape[1]
        assert result["masks"].min() >= 0 and result["masks"].max() <= 1


def test_cascade_scores_are_the_mean_over_its_stages():
    model = cascade_mask_rcnn(features(), 1, **SMALL).eval()
    for bias, stage in zip((0.0, 1.0, 2.0), model.roi_heads.stages):
        for parameter in stage.box_predictor.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(stage.box_predictor.cls_score.bias[1:], bias)
    with torch.no_grad():
        (result,) = model([torch.rand(3, 64, 64)])
    mean = torch.tensor([0.0, 1.0, 2.0]).sigmoid().mean()
    torch.testing.assert_close(result["scores"], mean.expand(len(result["scores"])))


def test_each_stage_of_the_cascade_refines_the_boxes_of_the_one_before():
    model = cascade_mask_rcnn(features(), 1, **SMALL).eval()
    stages = model.roi_heads.stages
    for stage in stages:  # every box moves right by a tenth, a twentieth and a thirtieth of its width
        for parameter in stage.box_predictor.parameters():
            torch.nn.init.zeros_(parameter)
        with torch.no_grad():
            stage.box_predictor.bbox_pred.bias.view(2, 4)[1, 0] = 1.0
        stage.score_thresh = 0.0
    proposal = torch.tensor([[8.0, 8.0, 28.0, 28.0]])
    levels = {str(i): torch.zeros(1, 32, 16 // 2**i, 16 // 2**i) for i in range(4)}
    with torch.no_grad():
        ((result,), _) = model.roi_heads(levels, [proposal], [(64, 64)])
    moved = 20 * (1 / 10 + 1 / 20 + 1 / 30)
    torch.testing.assert_close(result["boxes"], proposal + torch.tensor([moved, 0.0, moved, 0.0]))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation_handles_any_size(name):
    scores = SEGMENTERS[name](features(), 3).eval()([torch.rand(3, 70, 50), torch.rand(3, 33, 64)])
    assert [tuple(one.shape) for one in scores] == [(3, 70, 50), (3, 33, 64)]


def test_ignored_pixels_add_nothing_to_the_mean_over_all_pixels():
    def loss(labels):
        torch.manual_seed(0)
        model = fcn(features(), 2)
        return model([torch.ones(3, 64, 64)] * 2, [{"labels": labels}] * 2)["loss_segmentation"]

    everywhere = torch.full((64, 64), IGNORED)
    assert loss(everywhere) == 0
    half = torch.zeros(64, 64, dtype=torch.int64)
    half[:, 32:] = IGNORED
    full = torch.zeros(64, 64, dtype=torch.int64)
    torch.testing.assert_close(loss(half), loss(full) / 2, rtol=0.2, atol=0)
    flipped = half.clone()
    flipped[:, :32] = 1
    assert not torch.isclose(loss(half), loss(flipped))


def test_the_auxiliary_head_is_for_training_alone():
    model = upernet(features(), 2, channels=32)
    assert isinstance(model, Segmenter) and isinstance(model.auxiliary, FCN)
    losses = model([torch.rand(3, 64, 64)] * 2, [{"labels": torch.zeros(64, 64, dtype=torch.int64)}] * 2)
    assert set(losses) == {"loss_segmentation", "loss_auxiliary"}
    model.eval().auxiliary = None
    assert model([torch.rand(3, 64, 64)])[0].shape == (2, 64, 64)


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_stay_exact_under_autocast(name):
    model = DETECTORS[name](features(), 1, **SMALL)
    seen = {}
    model.rpn.anchor_generator.register_forward_hook(lambda module, _, anchors: seen.update(anchors=anchors[0]))
    model.rpn.register_forward_hook(lambda module, _, result: seen.update(proposals=result[0][0]))
    annotation = target((8, 8, 32, 40))
    with torch.autocast("cpu", torch.bfloat16):
        sum(model([image(annotation)], [annotation]).values()).backward()
    assert {boxes.dtype for boxes in seen.values()} == {torch.float32}


def test_the_cascade_passes_on_proposals_without_the_true_boxes_among_them():
    model = cascade_mask_rcnn(features(), 1, **SMALL)
    first, second = model.roi_heads.stages[:2]
    sample, drawn, passed = first.select_training_samples, [], []
    first.select_training_samples = lambda *args: drawn.append(sample(*args)) or drawn[0]
    second.select_training_samples = lambda proposals, targets: passed.extend(proposals) or sample(proposals, targets)
    annotation = target((8, 8, 32, 40))
    model([image(annotation)], [annotation])
    ((boxes,), *_) = drawn[0]
    true = (boxes == annotation["boxes"]).all(1)
    assert true.sum() == 1 and len(passed[0]) == len(boxes) - 1
