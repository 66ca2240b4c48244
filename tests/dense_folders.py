"""Small folders in the layouts of the data sets for detection and segmentation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (40, 30), value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def write_map(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.astype(np.uint16)).save(path)


def objects(*ids: int) -> np.ndarray:
    """Return a map of 30 rows and 40 columns with an object of 4x3 pixels for each id."""
    rows = np.zeros((30, 40))
    for i, number in enumerate(ids):
        rows[6 * i + 1 : 6 * i + 4, 2:6] = number
    return rows


def write_nuclei(folder: Path) -> Path:
    """Write ten images with none, one or two nuclei each."""
    for i in range(10):
        write_image(folder / "images" / f"{i}.png", value=i)
        write_map(folder / "labels" / f"{i}.png", objects(*range(1, 1 + i % 3)))
    return folder


def write_coco(folder: Path) -> Path:
    """Write COCO's real layout: two images with objects and one without, in each split."""
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 40, "height": 30} for i in (7, 8, 9)]
        for image in images:
            write_image(folder / f"{split}2017" / image["file_name"])
        annotations = [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 1, 4, 3]},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [10, 5, 10, 10]},
            {"id": 3, "image_id": 8, "category_id": 90, "bbox": [0, 0, 5, 5]},
        ]
        for annotation in annotations:
            x, y, w, h = annotation["bbox"]
            annotation |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 0, "area": w * h}
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def write_ade20k(folder: Path, rows: np.ndarray, names: str = "a") -> Path:
    """Write ADE20K's real layout: an image with the label map `rows` for each letter of `names`, in each split."""
    for part in ("training", "validation"):
        for name in names:
            write_image(folder / "images" / part / f"{name}.jpg")
            write_map(folder / "annotations" / part / f"{name}.png", rows)
    return folder
