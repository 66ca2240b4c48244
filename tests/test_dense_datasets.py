"""Data sets for detection and segmentation: what is read, and a line for each thing that is wrong."""

import json
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_folders import write_ade20k, write_coco, write_image, write_map, write_nuclei
from PIL import Image

from convnext_min.dense import datasets
from convnext_min.dense.upernet import IGNORED


@pytest.fixture
def nuclei(tmp_path):
    return write_nuclei(tmp_path)


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path)


def change(coco: Path, **values) -> Path:
    """Change the first annotation of the training images."""
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= values
    path.write_text(json.dumps(content))
    return path


def test_nuclei_are_read_with_tight_boxes(nuclei):
    train, val = datasets.nuclei("train", nuclei), datasets.nuclei("val", nuclei)
    assert (len(train), len(val)) == (8, 2) and train.classes == ("nucleus",)
    image, target = train[2]  # two objects
    assert image.shape == (3, 30, 40) and image[0, 0, 0] == 2
    assert target["boxes"].tolist() == [[2, 1, 6, 4], [2, 7, 6, 10]]
    assert target["masks"].sum((1, 2)).tolist() == [12, 12] and target["labels"].tolist() == [1, 1]
    empty = train[0][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 30, 40)


def test_an_object_of_one_pixel_has_a_box_of_one_pixel(nuclei):
    rows = np.zeros((30, 40))
    rows[4, 7] = 300  # more than a byte holds
    write_map(nuclei / "labels" / "0.png", rows)
    assert datasets.nuclei("train", nuclei)[0][1]["boxes"].tolist() == [[7, 4, 8, 5]]


def test_what_is_wrong_with_instance_maps_is_told_with_the_file(nuclei):
    write_map(nuclei / "labels" / "0.png", np.zeros((10, 40)))
    (nuclei / "labels" / "1.png").unlink()
    (nuclei / "images" / "2.png").write_bytes((nuclei / "images" / "2.png").read_bytes()[:40])
    write_image(nuclei / "labels" / "3.png")
    (nuclei / "images" / "5.png").unlink()
    dataset = datasets.nuclei("train", nuclei)
    lines = dataset.problems + datasets.check(dataset)
    images, labels = nuclei / "images", nuclei / "labels"
    assert len(lines) == 5
    assert f"{images}/1.png has no label map {labels}/1.png" in lines
    assert f"{labels}/5.png has no image {images}/5.png" in lines
    assert f"{labels}/0.png has 40x10 pixels, but its image {images}/0.png has 40x30" in lines
    assert f"{labels}/3.png is no label map: it has 3 numbers per pixel" in lines
    assert any(line.startswith(f"{images}/2.png cannot be read") for line in lines)


def test_images_of_16_bits_keep_their_greys_and_stay_as_their_label_maps_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the label map is not turned either
    Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)).save(tmp_path / "x.png", exif=exif)
    pixels = datasets.read_image(tmp_path / "x.png")
    assert pixels.shape == (3, 30, 40) and abs(pixels[0].flatten() - torch.linspace(0, 255, 1200)).max() <= 1


def test_coco_in_its_real_layout(coco):
    train, val = datasets.coco("train", coco), datasets.coco("val", coco)
    assert train.classes == ("car", "toothbrush") and not train.problems
    assert (len(train), len(val)) == (2, 3)  # an image without objects is for validation only
    target = train[0][1]
    assert target["labels"].tolist() == [1, 2] and target["boxes"].tolist() == [[2, 1, 6, 4], [10, 5, 20, 15]]
    assert target["masks"].sum((1, 2)).tolist() == [12, 100]


def test_the_boxes_of_coco_are_the_annotated_ones(coco):
    change(coco, bbox=[2.25, 1.5, 3.5, 2.25])  # smaller than the mask's pixels
    assert datasets.coco("train", coco)[0][1]["boxes"].tolist() == [[2.25, 1.5, 5.75, 3.75], [10, 5, 20, 15]]


def test_many_problems_are_listed_in_part(coco):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    boxes = [{key: content["annotations"][0][key] for key in ("image_id", "category_id", "bbox")} for _ in range(500)]
    path.write_text(json.dumps(content | {"annotations": [box | {"id": i} for i, box in enumerate(boxes)]}))
    with pytest.raises(ValueError, match=r"no valid images in COCO train\n.*has no mask") as error:
        datasets.coco("train", coco)
    assert len(str(error.value).splitlines()) == 22 and str(error.value).endswith("and 480 more")


def test_annotations_without_ids_are_an_error(coco):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["id"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_train2017\.json holds no annotations of COCO: KeyError 'id'"):
        datasets.coco("train", coco)


NO_MASK = "annotation 1 has a mask of neither polygons nor run lengths"


@pytest.mark.parametrize(
    "values, said",
    [
        ({"bbox": [2, 1, 0, 3]}, "annotation 1 has a box without area: [2, 1, 0, 3]"),
        ({"image_id": 77}, "annotation 1 is of the image 77, which is not listed"),
        ({"category_id": 4}, "annotation 1 has the category 4, which is not listed"),
        ({"bbox": [2, 1, math.nan, 3]}, "annotation 1 has a box without area: [2, 1, nan, 3]"),
        ({"bbox": None}, "annotation 1 has a box without area: None"),
        ({"segmentation": []}, "annotation 1 has no mask"),
        ({"segmentation": [[2, 1, 4, 3]]}, f"{NO_MASK}: [[2, 1, 4, 3]]"),
        ({"segmentation": "2 1 4 3"}, f"{NO_MASK}: 2 1 4 3"),
        ({"segmentation": {"counts": "12"}}, f"{NO_MASK}: {{'counts': '12'}}"),
    ],
)
def test_an_annotation_of_coco_that_cannot_be_used_is_left_out(coco, values, said):
    path = change(coco, **values)
    train = datasets.coco("train", coco)
    assert train.problems == [f"{path}: {said}"]
    assert train[0][1]["labels"].tolist() == [2]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda content: content["images"][0].pop("width"), "image 7 has no width"),
        (lambda content: content["categories"][0].pop("name"), "category 3 has no name"),
        (lambda content: content["categories"].clear(), "lists no category"),
        (lambda content: content["annotations"][1].update(id=1), "has 2 annotations with the id 1;"),
        (lambda content: content["images"].append(content["images"][0]), "has 2 images with the id 7;"),
    ],
)
def test_lists_of_coco_that_are_incomplete_are_refused(coco, change, said):
    path = coco / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"instances_train2017.json.* {said}"):
        datasets.coco("train", coco)


def test_a_mask_that_pycocotools_cannot_read_is_named(coco):
    change(coco, segmentation={"size": [30, 40], "counts": [-5]})
    (line,) = datasets.check(datasets.coco("train", coco))
    assert "annotation 1 has a damaged mask" in line and ".jpg: " in line


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [30, 40], "counts": [30 * 40]}, [[60, 1, 70, 1, 70, 9]]],
    ids=["no pixel", "outside the image"],
)
def test_an_object_whose_mask_is_empty_is_left_out(coco, segmentation):
    change(coco, segmentation=segmentation)
    train = datasets.coco("train", coco)
    assert not train.problems and not datasets.check(train)
    target = train[0][1]
    assert target["labels"].tolist() == [2] and target["boxes"].tolist() == [[10, 5, 20, 15]]
    assert [len(values) for values in target.values()] == [1, 1, 1, 1]


def test_crowds_are_for_evaluation_only(coco):
    for split in ("train", "val"):
        path = coco / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["iscrowd"] = 1
        path.write_text(json.dumps(content))
    assert datasets.coco("train", coco)[0][1]["iscrowd"].tolist() == [0]
    assert datasets.coco("val", coco)[0][1]["iscrowd"].tolist() == [1, 0]


def test_images_of_coco_that_are_missing_or_of_another_size(coco):
    (coco / "train2017" / "000000000008.jpg").unlink()
    write_image(coco / "train2017" / "000000000007.jpg", (20, 20))
    dataset = datasets.coco("train", coco)
    assert dataset.problems + datasets.check(dataset) == [
        f"{coco}/train2017/000000000008.jpg not found",
        f"{coco}/train2017/000000000007.jpg has 20x20 pixels, but its masks have 40x30",
    ]


def test_a_file_that_is_not_cocos_is_named(coco):
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"instances_val2017\.json holds no annotations of COCO"):
        datasets.coco("val", coco)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json not found"):
        datasets.coco("val", coco)


def test_ade20k_ignores_zero_and_counts_from_one(tmp_path):
    rows = np.zeros((30, 40))
    rows[:, 20:] = 150
    dataset = datasets.ade20k("train", write_ade20k(tmp_path, rows))
    assert len(dataset.classes) == 150 and not dataset.instances
    assert dataset[0][1]["labels"].unique().tolist() == [149, IGNORED]
    rows[0, 0] = 151
    write_map(tmp_path / "annotations" / "training" / "a.png", rows)
    (line,) = datasets.check(dataset)
    assert line == (f"{tmp_path}/annotations/training/a.png has the class 151; expected 1 to 150, or 0 for none")


def test_camvid_has_void(tmp_path, monkeypatch):
    write_image(tmp_path / "val" / "images" / "a.jpg")
    write_map(tmp_path / "val" / "labels" / "a.png", np.tile(np.arange(40) % 12, (30, 1)))
    monkeypatch.setenv("CAMVID_DIR", str(tmp_path))
    assert datasets.camvid("val")[0][1]["labels"].unique().tolist() == [*range(11), IGNORED]


def test_shapes_are_the_same_each_time_and_their_masks_do_not_overlap():
    train, val = datasets.shapes("train"), datasets.shapes("val")
    for i in range(8):
        (image, target), (again, _) = train[i], train[i]
        assert torch.equal(image, again) and not torch.equal(image, val[i][0])
        assert target["masks"].sum(0).max() == 1 and len(target["labels"]) == len(target["boxes"])
    semantic = datasets.shapes("train", instances=False)[0][1]["labels"]
    assert torch.equal(semantic > 0, train[0][1]["masks"].any(0))


def test_without_network_shapes_stand_in_and_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("NUCLEI_DIR", raising=False)
    monkeypatch.setattr(datasets, "data_cache", lambda: tmp_path)
    monkeypatch.setattr(datasets, "NUCLEI_URL", (tmp_path / "none.zip").as_uri())
    assert datasets.nuclei("train").source == "drawn shapes train, 64 images"
    assert "drawn shapes stand in. Set NUCLEI_DIR" in capsys.readouterr().out


def test_the_archive_of_nuclei_is_converted_once(monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    for name, size in (("a", (256, 256)), ("b", (256, 256)), ("big", (360, 360))):
        write_image(raw / name / "images" / f"{name}.png", size)
        for i in range(2):
            mask = np.zeros(size[::-1])
            mask[10 * i : 10 * i + 5, :5] = 255
            (raw / name / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask.astype(np.uint8)).save(raw / name / "masks" / f"{i}.png")
    archive = tmp_path / "stage1_train.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in raw.rglob("*.png"):
            file.write(path, path.relative_to(raw))
    monkeypatch.delenv("NUCLEI_DIR", raising=False)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(datasets, "data_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(datasets, "NUCLEI_URL", archive.as_uri())
    with pytest.raises(ValueError, match="the archive has 2 images, expected 334"):
        datasets.nuclei("train")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(datasets, "convert_nuclei", partial(datasets.convert_nuclei, expected=2))
    dataset = datasets.nuclei("train")
    assert [Path(example.image).name for example in dataset.examples] == ["a.png", "b.png"]
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 5, 5], [0, 10, 5, 15]]
    folder, convert = tmp_path / "cache" / "nuclei", datasets.convert_nuclei
    folder.rename(tmp_path / "faster")

    def while_another_process_does_the_same(raw, done):
        convert(raw, done)
        (tmp_path / "faster").rename(folder)

    monkeypatch.setattr(datasets, "convert_nuclei", while_another_process_does_the_same)
    assert len(datasets.nuclei("train")) == 2
    archive.unlink()
    assert len(datasets.nuclei("train")) == 2  # from the cache


def test_the_archive_of_camvid_is_converted(tmp_path):
    for split in ("train", "val", "test"):
        write_image(tmp_path / "master" / "CamVid" / split / "a.png", (480, 360))
        write_map(tmp_path / "master" / "CamVid" / f"{split}annot" / "a.png", np.full((360, 480), 11))
    datasets.convert_camvid(tmp_path, tmp_path / "done", (1, 1, 1))
    image, target = datasets.camvid("test", tmp_path / "done")[0]
    assert image.shape == (3, 180, 240) and target["labels"].unique().tolist() == [IGNORED]


def test_the_command_lists_problems_and_fails(nuclei, capsys):
    with pytest.raises(SystemExit) as end:
        datasets.main(["nuclei", "--data", str(nuclei)])
    assert end.value.code == 0 and "nuclei train, 8 images: 0 problems" in capsys.readouterr().out
    write_map(nuclei / "labels" / "4.png", np.zeros((5, 5)))
    with pytest.raises(SystemExit) as end:
        datasets.main(["nuclei", "--data", str(nuclei)])
    assert end.value.code == 1 and "labels/4.png has 5x5 pixels" in capsys.readouterr().out


def test_an_image_is_turned_upright_where_it_is_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert datasets.read_image(str(tmp_path / "a.jpg")).shape == (3, 30, 40)
    assert datasets.read_image(str(tmp_path / "a.jpg"), upright=True).shape == (3, 40, 30)


def test_a_part_has_the_images_of_the_slice():
    whole = datasets.shapes("train", number=10)
    part = whole.part(1, None, 4)
    assert part.source == "drawn shapes train, 3 images" and part.instances and part.classes == whole.classes
    assert all(torch.equal(part[i][0], whole[1 + 4 * i][0]) for i in range(3))
