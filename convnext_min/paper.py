"""The numbers that the paper publishes (arXiv:2201.03545v2), for comparison with ours.

Top-1 is in percent on ImageNet-1K. The paper's FLOPs are multiply-accumulates, here in units of 1e9 ("GMACs"), for
images of 224x224 unless a `resolution` says otherwise. Numbers are as printed: the same network may have two values in
two tables.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of Table 10 or 11; in Table 10 `top1` is the mean and `std` the standard deviation of three seeds."""

    label: str
    top1: float
    std: float | None
    gmacs: float


TABLE10 = {
    "resnet50": Row("ResNet-50", 78.82, 0.07, 4.09),
    "stage_ratio": Row("stage ratio", 79.36, 0.07, 4.53),
    "patchify": Row("patchify stem", 79.51, 0.18, 4.42),
    "depthwise": Row("depthwise conv", 78.28, 0.08, 2.35),
    "width": Row("width 64 to 96", 80.50, 0.02, 5.27),
    "inverted": Row("inverted bottleneck", 80.64, 0.03, 4.64),
    "move_up": Row("move up depthwise", 79.92, 0.08, 4.07),
    "kernel5": Row("kernel 5", 80.35, 0.08, 4.10),
    "kernel7": Row("kernel 7", 80.57, 0.14, 4.15),
    "kernel9": Row("kernel 9", 80.57, 0.06, 4.21),
    "kernel11": Row("kernel 11", 80.47, 0.11, 4.29),
    "gelu": Row("ReLU to GELU", 80.62, 0.14, 4.15),
    "fewer_acts": Row("fewer activations", 81.27, 0.06, 4.15),
    "fewer_norms": Row("fewer norms", 81.41, 0.09, 4.15),
    "layer_norm": Row("BN to LN", 81.47, 0.09, 4.46),
    "convnext": Row("separate downsampling", 81.97, 0.06, 4.49),
}

TABLE11 = {
    "resnet50": Row("ResNet-200", 81.14, None, 15.01),
    "stage_ratio": Row("stage ratio, width 64 to 84", 81.33, None, 14.52),
    "patchify": Row("patchify stem", 81.59, None, 14.38),
    "depthwise": Row("depthwise conv", 80.54, None, 7.23),
    "width": Row("width 84 to 128", 81.85, None, 16.76),
    "inverted": Row("inverted bottleneck", 82.64, None, 15.68),
    "move_up": Row("move up depthwise", 82.04, None, 14.63),
    "kernel5": Row("kernel 5", 82.32, None, 14.70),
    "kernel7": Row("kernel 7", 82.30, None, 14.81),
    "kernel9": Row("kernel 9", 82.27, None, 14.95),
    "kernel11": Row("kernel 11", 82.18, None, 15.13),
    "gelu": Row("ReLU to GELU", 82.19, None, 14.81),
    "fewer_acts": Row("fewer activations", 82.71, None, 14.81),
    "fewer_norms": Row("fewer norms", 83.17, None, 14.81),
    "layer_norm": Row("BN to LN", 83.35, None, 14.81),
    "convnext": Row("separate downsampling", 83.60, None, 15.35),
}

ROADS = {"resnet50": TABLE10, "resnet200": TABLE11}

# The first rows of the two tables, quoted from others. ResNet-50 is torchvision's model with its 90-epoch recipe.
# ResNet-200 is from He et al., ECCV 2016: original residual units, tested at 320x320, so it differs from the second row
# in more than the recipe.
CLASSIC_TOP1 = {"resnet50": 76.13, "resnet200": 78.20}


class Variant(NamedTuple):
    """Parameters in millions, GMACs at 224 and 384, top-1 at 224 after training on ImageNet-1K alone.

    Parameters are as in Table 9 for Tiny, in Table 1 for Small, in Table 8 for the others; Table 1 has millions.
    """

    params: float
    gmacs_224: float
    gmacs_384: float
    top1: float | None


VARIANTS = {
    "convnext_tiny": Variant(28.6, 4.5, 13.1, 82.1),
    "convnext_small": Variant(50, 8.7, 25.5, 83.1),
    "convnext_base": Variant(88.6, 15.4, 45.0, 83.8),  # 45.1 in Table 8 and in the lower half of Table 1
    "convnext_large": Variant(197.8, 34.4, 101.0, 84.3),
    "convnext_xlarge": Variant(350.2, 60.9, 179.0, None),
}


class Classifier(NamedTuple):
    """One row of Table 1: parameters in millions, images per second on a V100."""

    model: str
    resolution: int
    params: int
    gmacs: float
    images_per_second: float | None
    top1: float


TABLE1 = (  # upper half: trained on ImageNet-1K
    Classifier("RegNetY-16G", 224, 84, 16.0, 334.7, 82.9),
    Classifier("EffNet-B7", 600, 66, 37.0, 55.1, 84.3),
    Classifier("EffNetV2-L", 480, 120, 53.0, 83.7, 85.7),
    Classifier("DeiT-S", 224, 22, 4.6, 978.5, 79.8),
    Classifier("DeiT-B", 224, 87, 17.6, 302.1, 81.8),
    Classifier("Swin-T", 224, 28, 4.5, 757.9, 81.3),
    Classifier("ConvNeXt-T", 224, 29, 4.5, 774.7, 82.1),
    Classifier("Swin-S", 224, 50, 8.7, 436.7, 83.0),
    Classifier("ConvNeXt-S", 224, 50, 8.7, 447.1, 83.1),
    Classifier("Swin-B", 224, 88, 15.4, 286.6, 83.5),
    Classifier("ConvNeXt-B", 224, 89, 15.4, 292.1, 83.8),
    Classifier("Swin-B", 384, 88, 47.1, 85.1, 84.5),
    Classifier("ConvNeXt-B", 384, 89, 45.0, 95.7, 85.1),
    Classifier("ConvNeXt-L", 224, 198, 34.4, 146.8, 84.3),
    Classifier("ConvNeXt-L", 384, 198, 101.0, 50.4, 85.5),
)
TABLE1_22K = (  # lower half: pre-trained on ImageNet-22K, fine-tuned on ImageNet-1K
    Classifier("R-101x3", 384, 388, 204.6, None, 84.4),
    Classifier("R-152x4", 480, 937, 840.5, None, 85.4),
    Classifier("EffNetV2-L", 480, 120, 53.0, 83.7, 86.8),
    Classifier("EffNetV2-XL", 480, 208, 94.0, 56.5, 87.3),
    Classifier("ViT-B/16", 384, 87, 55.5, 93.1, 85.4),
    Classifier("ViT-L/16", 384, 305, 191.1, 28.5, 86.8),
    Classifier("ConvNeXt-T", 224, 29, 4.5, 774.7, 82.9),
    Classifier("ConvNeXt-T", 384, 29, 13.1, 282.8, 84.1),
    Classifier("ConvNeXt-S", 224, 50, 8.7, 447.1, 84.6),
    Classifier("ConvNeXt-S", 384, 50, 25.5, 163.5, 85.8),
    Classifier("Swin-B", 224, 88, 15.4, 286.6, 85.2),
    Classifier("Swin-B", 384, 88, 47.0, 85.1, 86.4),
    Classifier("ConvNeXt-B", 224, 89, 15.4, 292.1, 85.8),
    Classifier("ConvNeXt-B", 384, 89, 45.1, 95.7, 86.8),
    Classifier("Swin-L", 224, 197, 34.5, 145.0, 86.3),
    Classifier("Swin-L", 384, 197, 103.9, 46.0, 87.3),
    Classifier("ConvNeXt-L", 224, 198, 34.4, 146.8, 86.6),
    Classifier("ConvNeXt-L", 384, 198, 101.0, 50.4, 87.5),
    Classifier("ConvNeXt-XL", 224, 350, 60.9, 89.3, 87.0),
    Classifier("ConvNeXt-XL", 384, 350, 179.0, 30.2, 87.8),
)


class Isotropic(NamedTuple):
    """One row of Table 2: parameters in millions, images per second on a V100, training memory in GB for 32 images."""

    model: str
    params: int
    gmacs: float
    images_per_second: float
    memory: float
    top1: float


TABLE2 = (
    Isotropic("ViT-S", 22, 4.6, 978.5, 4.9, 79.8),
    Isotropic("ConvNeXt-S (iso.)", 22, 4.3, 1038.7, 4.2, 79.7),  # 78.7 in the list of the released models
    Isotropic("ViT-B", 87, 17.6, 302.1, 9.1, 81.8),
    Isotropic("ConvNeXt-B (iso.)", 87, 16.9, 320.1, 7.7, 82.0),
    Isotropic("ViT-L", 304, 61.6, 93.1, 22.5, 82.6),
    Isotropic("ConvNeXt-L (iso.)", 306, 59.7, 94.4, 20.4, 82.6),
)


class Detector(NamedTuple):
    """One row of Table 3, COCO, 3x schedule: GFLOPs at 1280x800, frames per second on an A100, AP of boxes and masks.

    `box` and `mask` are (AP, AP50, AP75).
    """

    backbone: str
    gflops: int
    fps: float
    box: tuple[float, float, float]
    mask: tuple[float, float, float]


TABLE3_MASK_RCNN = (
    Detector("Swin-T", 267, 23.1, (46.0, 68.1, 50.3), (41.6, 65.1, 44.9)),
    Detector("ConvNeXt-T", 262, 25.6, (46.2, 67.9, 50.8), (41.7, 65.0, 44.9)),
)
TABLE3_CASCADE = (
    Detector("ResNet-50", 739, 16.2, (46.3, 64.3, 50.5), (40.1, 61.7, 43.4)),
    Detector("X101-32", 819, 13.8, (48.1, 66.5, 52.4), (41.6, 63.9, 45.2)),
    Detector("X101-64", 972, 12.6, (48.3, 66.4, 52.3), (41.7, 64.0, 45.1)),
    Detector("Swin-T", 745, 12.2, (50.4, 69.2, 54.7), (43.7, 66.6, 47.3)),
    Detector("ConvNeXt-T", 741, 13.5, (50.4, 69.1, 54.8), (43.7, 66.5, 47.3)),
    Detector("Swin-S", 838, 11.4, (51.9, 70.7, 56.3), (45.0, 68.2, 48.8)),
    Detector("ConvNeXt-S", 827, 12.0, (51.9, 70.8, 56.5), (45.0, 68.4, 49.1)),
    Detector("Swin-B", 982, 10.7, (51.9, 70.5, 56.4), (45.0, 68.1, 48.9)),
    Detector("ConvNeXt-B", 964, 11.4, (52.7, 71.3, 57.2), (45.6, 68.9, 49.5)),
)
TABLE3_CASCADE_22K = (  # backbones pre-trained on ImageNet-22K
    Detector("Swin-B", 982, 10.7, (53.0, 71.8, 57.5), (45.8, 69.4, 49.7)),
    Detector("ConvNeXt-B", 964, 11.5, (54.0, 73.1, 58.8), (46.9, 70.6, 51.3)),
    Detector("Swin-L", 1382, 9.2, (53.9, 72.4, 58.8), (46.7, 70.1, 50.8)),
    Detector("ConvNeXt-L", 1354, 10.0, (54.8, 73.8, 59.8), (47.6, 71.3, 51.7)),
    Detector("ConvNeXt-XL", 1898, 8.6, (55.2, 74.2, 59.9), (47.7, 71.6, 52.2)),
)


class Segmenter(NamedTuple):
    """One row of Table 4 or 7, ADE20K with UperNet: multi-scale and single-scale mIoU, parameters in millions, GFLOPs.

    FLOPs are for 2048x512 with crops of 512, for 2560x640 with crops of 640.
    """

    backbone: str
    crop: int
    miou: float
    miou_single_scale: float | None
    params: int
    gflops: int


TABLE4 = (  # single-scale mIoU from Table 7
    Segmenter("Swin-T", 512, 45.8, None, 60, 945),
    Segmenter("ConvNeXt-T", 512, 46.7, 46.0, 60, 939),
    Segmenter("Swin-S", 512, 49.5, None, 81, 1038),
    Segmenter("ConvNeXt-S", 512, 49.6, 48.7, 82, 1027),
    Segmenter("Swin-B", 512, 49.7, None, 121, 1188),
    Segmenter("ConvNeXt-B", 512, 49.9, 49.1, 122, 1170),
)
TABLE4_22K = (  # backbones pre-trained on ImageNet-22K
    Segmenter("Swin-B", 640, 51.7, None, 121, 1841),
    Segmenter("ConvNeXt-B", 640, 53.1, 52.6, 122, 1828),
    Segmenter("Swin-L", 640, 53.5, None, 234, 2468),
    Segmenter("ConvNeXt-L", 640, 53.7, 53.2, 235, 2458),
    Segmenter("ConvNeXt-XL", 640, 54.0, 53.6, 391, 3335),
)


class Robustness(NamedTuple):
    """One row of Table 8: top-1 on the clean images, error on C (mCE) and C-bar, top-1 on A, R and Sketch."""

    model: str
    clean: float
    c: float
    c_bar: float | None
    a: float
    r: float
    sketch: float


TABLE8 = (
    Robustness("ResNet-50", 76.1, 76.7, 57.7, 0.0, 36.1, 24.1),
    Robustness("Swin-T", 81.2, 62.0, None, 21.6, 41.3, 29.1),
    Robustness("RVT-S*", 81.9, 49.4, 37.5, 25.7, 47.7, 34.7),
    Robustness("ConvNeXt-T", 82.1, 53.2, 40.0, 24.2, 47.2, 33.8),
    Robustness("Swin-B", 83.4, 54.4, None, 35.8, 46.6, 32.4),
    Robustness("RVT-B*", 82.6, 46.8, 30.8, 28.5, 48.7, 36.0),
    Robustness("ConvNeXt-B", 83.8, 46.8, 34.4, 36.7, 51.3, 38.2),
)
TABLE8_22K = (  # pre-trained on ImageNet-22K, at 384x384
    Robustness("ConvNeXt-B", 86.8, 43.1, 30.7, 62.3, 64.9, 51.6),
    Robustness("ConvNeXt-L", 87.5, 40.2, 29.9, 65.5, 66.7, 52.8),
    Robustness("ConvNeXt-XL", 87.8, 38.8, 27.1, 69.3, 68.2, 55.0),
)


class Speed(NamedTuple):
    """One row of Table 12: images per second on an A100 with TF32, channels last, in PyTorch 1.10."""

    size: str
    resolution: int
    swin: float | None
    convnext: float


TABLE12 = (
    Speed("T", 224, 1325.6, 1943.5),
    Speed("S", 224, 857.3, 1275.3),
    Speed("B", 224, 662.8, 969.0),
    Speed("B", 384, 242.5, 336.6),
    Speed("L", 224, 435.9, 611.5),
    Speed("L", 384, 157.9, 211.4),
    Speed("XL", 224, None, 424.4),
    Speed("XL", 384, None, 147.4),
)
