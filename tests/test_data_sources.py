"""Sources of images: strings in two arrays, and the columns of Hugging Face datasets."""

import sys
import types
from dataclasses import dataclass, replace

import pytest

from convnext_min import recipes
from convnext_min.data.disk import loader, open_source
from convnext_min.data.sources import Folder, StringArray

RECIPE = replace(
    recipes.get("in1k", model="convnext_tiny"), batch_size=6, base_batch=6, resolution=48, eval_resolution=40
)


@dataclass
class Image:
    decode: bool = True


@dataclass
class ClassLabel:
    names: list


@dataclass
class Value:
    dtype: str


class Table:
    """The few parts of a `datasets.Dataset` that are used."""

    def __init__(self, features, rows):
        self.features, self.rows = features, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return {column: [row[column] for row in self.rows[index]] for column in self.features}
        return self.rows[index]

    def cast_column(self, column, feature):
        assert feature == Image(decode=False)
        return Table(self.features | {column: feature}, self.rows)

    def select_columns(self, column):
        return Table({column: self.features[column]}, self.rows)


LABEL = ClassLabel(["tench", "English springer"])


@pytest.fixture
def dataset(image_root, monkeypatch):
    """Return a function that makes a dataset with columns of the given features; all splits have the same images."""
    folder, asked = Folder(image_root / "val"), []

    def make(features, change=lambda row: row, splits=("train", "validation")):
        rows = []
        for index in range(len(folder)):
            content, label = folder.read(index)
            encoded = {"bytes": content, "path": None} if index % 2 else {"bytes": None, "path": folder.name(index)}
            rows.append(
                change({column: encoded if feature == Image() else label for column, feature in features.items()})
            )

        def load_dataset(name):
            asked.append(name)
            return {split: Table(features, rows) for split in splits}

        module = types.SimpleNamespace(load_dataset=load_dataset, Image=Image, ClassLabel=ClassLabel)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return make


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"image": Image(), "label": LABEL}, "somebody/set"),
        ({"id": Value("int64"), "img": Image(), "fine_label": LABEL}, "somebody/set"),
        ({"img": Image(), "coarse_label": ClassLabel(["fish"]), "fine_label": LABEL}, "somebody/set:fine_label"),
    ],
)
def test_a_hugging_face_dataset_holds_the_same_images(image_root, dataset, features, name):
    asked = dataset(features)
    batches = loader(f"hfds/{name}", "val", RECIPE, False, workers=0)
    assert asked == ["somebody/set"] and batches.classes == ("tench", "English springer")
    expected = loader(image_root, "val", RECIPE, False, workers=0)
    assert all(x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(batches.epoch(), expected.epoch(), strict=True))


@pytest.mark.parametrize(
    ("splits", "note"),
    [
        (("train", "test", "validation"), ""),
        (("train", "valid"), ""),
        (("train", "test"), "hfds/a/b has no validation split: its test split is used"),
    ],
)
def test_the_split_for_validation_has_several_names_and_may_be_the_test_split(dataset, splits, note, capsys):
    dataset({"image": Image(), "label": LABEL}, splits=splits)
    assert loader("hfds/a/b", "val", RECIPE, False, workers=0).images == 11
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() == note


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val", "hfds/a/b has no split 'val', its splits are all; --holdout keeps every tenth training image"),
        ("train", "hfds/a/b has no split 'train', its splits are all$"),
    ],
)
def test_a_dataset_without_the_split_is_refused_with_its_splits(dataset, split, message):
    dataset({"image": Image(), "label": LABEL}, splits=("all",))
    with pytest.raises(ValueError, match=message):
        open_source("hfds/a/b", split)


@pytest.mark.parametrize(
    ("features", "name", "message"),
    [
        ({"image": Image()}, "a/b", r"hfds/a/b has 0 columns of class labels.* its columns are image \(Image\)$"),
        ({"image": Image(), "label": Value("int64")}, "a/b", r"0 columns of class labels.* label \(Value\)"),
        (
            {"text": Value("string"), "label": LABEL},
            "a/b",
            r"0 columns of images.* text \(Value\), label",
        ),
        (
            {"image": Image(), "one": LABEL, "two": LABEL},
            "a/b",
            "2 columns of class labels.* as in hfds/a/b:one",
        ),
        ({"image": Image(), "label": LABEL}, "a/b:fine", "hfds/a/b:fine has no column 'fine' of class labels"),
    ],
)
def test_a_dataset_without_one_column_of_each_kind_is_refused_with_its_columns(dataset, features, name, message):
    dataset(features)
    with pytest.raises(ValueError, match=message):
        open_source(f"hfds/{name}", "val")


@pytest.mark.parametrize("missing", [-1, None])
def test_images_without_a_label_are_refused(dataset, missing):
    dataset({"image": Image(), "label": LABEL}, lambda row: row | {"label": row["label"] or missing})
    with pytest.raises(ValueError, match=r"hfds/a/b: 6 of 11 images of 'val' have no label, such as number 0"):
        open_source("hfds/a/b", "val")


def test_without_the_package_of_hugging_face_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"hfds/a/b needs the package datasets: pip install datasets"):
        open_source("hfds/a/b", "train")


def test_names_in_two_arrays_are_the_names():
    names = ["a/b.JPEG", "", "é/ü.png", "c"]
    packed = StringArray(names)
    assert [packed[i] for i in range(len(packed))] == names
