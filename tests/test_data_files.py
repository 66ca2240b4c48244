"""Image files are found by the same rules whoever reads them, and decoded whatever their mode, or refused cleanly."""

import contextlib
import io
import os
from dataclasses import replace

import numpy as np
import pytest
from image_folders import picture
from PIL import Image, features

from convnext_min import recipes
from convnext_min.data import DECODE_ERRORS, decode, disk, image_folder
from convnext_min.data.files import find_images, read_image, readable_formats
from convnext_min.environment import printable


@pytest.fixture
def root(tmp_path):
    """Two classes, a and b, of two images each."""
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            picture((ord(name), i)).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train"


def names(root):
    return [path.replace(os.sep, "/") for path in find_images(root).paths]


# ---- Find


def test_both_loaders_find_the_same_images_in_the_same_order(root, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    picture(1).save(more / "z.png")
    picture(2).save(root / "a" / "ü 猫.png")
    (root / "a" / "b-").mkdir()
    picture(3).save(root / "a" / "b-" / "1.png")
    (root / "a" / "b").symlink_to(more)
    in_memory, on_disk = image_folder(root, 32), disk.Folder(root)
    assert in_memory.labels.tolist() == on_disk.labels.tolist() == [0] * 5 + [1] * 2
    assert names(root) == ["a/0.png", "a/1.png", "a/b/z.png", "a/b-/1.png", "a/ü 猫.png", "b/0.png", "b/1.png"]
    for index in range(7):
        assert (in_memory.images[index].permute(1, 2, 0).numpy() == decode(on_disk.name(index), 32)).all()


@pytest.mark.parametrize("target", [".", "..", "../..", "loop"])
def test_a_link_to_a_folder_that_contains_it_is_left_out(root, target):
    (root / "a" / "loop").symlink_to(target)
    files = find_images(root)
    assert files.labels.tolist() == [0, 0, 1, 1]
    reason = "broken link or special file" if target == "loop" else "link to a folder that contains it"
    assert dict(files.left_out) == ({"file without extension": 1} if target == "loop" else {reason: 1})


def test_folders_that_link_to_each_other_are_read_once(root, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, other in ((one, two), (two, one)):
        folder.mkdir()
        picture(len(str(folder))).save(folder / "x.png")
        (folder / "other").symlink_to(other)
    (root / "a" / "one").symlink_to(one)
    assert names(root)[:4] == ["a/0.png", "a/1.png", "a/one/other/x.png", "a/one/x.png"]


def test_hidden_files_and_folders_are_no_images(root, capsys):
    (root / "a" / ".ipynb_checkpoints").mkdir()
    picture(5).save(root / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(5).save(root / "a" / "._0.png")
    (root / "a" / ".DS_Store").touch()
    (root / ".git").mkdir()
    assert len(image_folder(root, 32)) == len(disk.Folder(root)) == 4
    assert f"left out of {root}: 1 hidden file, 1 hidden folder\n" in capsys.readouterr().out


def test_every_file_that_is_left_out_is_counted_in_one_line_with_the_reason(root, capsys, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda codec: codec != "avif")
    for name in ("1.heic", "2.HEIC", "x.avif", "notes.txt", "README", "fake.jpg"):
        (root / "a" / name).touch()
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    picture(3).save(root / "loose.png")
    (root / "a" / "fake.jpg").unlink()
    recipe = replace(recipes.get("imagenette", ["loader=disk"]), batch_size=4)
    for rank in range(2):  # the first of two processes prints
        disk.loader(root.parent, "train", recipe, train=True, rank=rank, world_size=2, workers=0)
    image_folder(root, 32)
    line = (
        f"left out of {root}: 1 .avif file (no decoder in the installed Pillow), "
        "2 .heic files (no decoder in the installed Pillow), 1 .txt file (no image), "
        "1 broken link or special file, 1 file without extension, 1 image outside of the class folders\n"
    )
    assert capsys.readouterr().out.count(line) == 2


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jpe", "pbm", "ppm", "tga", "jp2", "avif", "webp", "bmp", "tif"])
def test_every_format_that_pillow_can_read_is_read(root, suffix):
    if f".{suffix}" not in readable_formats():
        pytest.skip(f"this Pillow lacks {suffix}")
    picture(7).save(root / "b" / f"9.{suffix.upper()}")
    assert len(image_folder(root, 32)) == len(disk.Folder(root)) == 5


def test_a_class_with_nothing_but_unreadable_formats_says_so(root):
    for path in (root / "b").iterdir():
        path.rename(path.with_suffix(".heic"))
    if ".heic" in readable_formats():
        pytest.skip("this Pillow reads HEIC")
    for read in (image_folder, disk.Folder):
        with pytest.raises(FileNotFoundError, match=r"class folder .*b holds no readable image.* 2 \.heic files"):
            read(root)


def test_names_that_the_terminal_cannot_show_are_escaped(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    print(printable("été 猫 \udcff"))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert printable("猫") == "猫"


# ---- Decode


def ramp(dtype, scale):
    """A grey ramp from black to white, and the same in 8 bits."""
    eight = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    return (eight.astype(np.float64) * scale).astype(dtype), eight


@pytest.mark.parametrize(
    ("dtype", "scale", "suffix"),
    [
        (np.uint16, 257, "png"),
        (np.uint16, 257, "tif"),
        (np.uint16, 4095 / 255, "png"),  # 12 bits
        (np.uint16, 1, "tif"),  # 8 bits
        (np.int32, 257, "tif"),
        (np.int32, 1e6, "tif"),
        (np.float32, 1 / 255, "tif"),
        (np.float32, 1, "tif"),
        (np.float32, 257, "tif"),
        (np.float32, 1e9, "tif"),
    ],
)
def test_grey_images_of_more_than_8_bits_keep_their_greys(tmp_path, dtype, scale, suffix):
    wide, eight = ramp(dtype, scale)
    Image.fromarray(wide).save(tmp_path / f"x.{suffix}")
    grey = np.array(read_image(tmp_path / f"x.{suffix}"))
    assert grey.shape == (64, 64, 3) and abs(grey[..., 0].astype(int) - eight).max() <= 1


def test_negative_and_missing_values_of_float_images_become_grey(tmp_path):
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    grey = np.array(read_image(tmp_path / "x.tif"))[..., 0]
    assert grey[0, 0] == 0 and grey[-1, -1] == 255 and grey[0, 4] == 128
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tif")
    assert (np.array(read_image(tmp_path / "x.tif")) == 0).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:10, :30] = 255  # white at the top left
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    stored |= {5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright.swapaxes(0, 1), 2)}
    stored[8] = np.rot90(upright, -1)
    exif, path = Image.Exif(), tmp_path / f"x.{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path, exif=exif)
    assert abs(np.array(read_image(path)).astype(int) - upright).mean() < 3
    assert abs(decode(path, 40).astype(int) - upright[:, 10:50]).mean() < 3
    if suffix != "tif":  # Pillow turns TIFFs itself
        assert abs(np.array(read_image(path, False)).astype(int) - stored[orientation]).mean() < 3
        assert (decode(path, 40, False) == decode(path, 40)).all() == (orientation == 1)


def test_both_loaders_turn_images_unless_the_recipe_says_otherwise(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "a" / "0.png", exif=exif)
    settings = ["loader=disk", "batch_size=4", "eval_resolution=32"]
    seen = []
    for on in (True, False):
        recipe = recipes.get("imagenette", [*settings, f"exif_orientation={on}"])
        batches = disk.loader(root.parent, "train", recipe, train=False, workers=0)
        seen.append((next(batches.epoch())[0][0], image_folder(root, 32, on).images[0]))
    assert not seen[0][0].equal(seen[1][0]) and not seen[0][1].equal(seen[1][1])
    upright = image_folder(root, 32).images[0]
    picture(1).transpose(Image.Transpose.ROTATE_270).save(root / "a" / "0.png")
    assert upright.equal(image_folder(root, 32).images[0])


def test_damaged_exif_data_does_not_lose_the_image(tmp_path):
    picture(1).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f" + b"\xff" * 40)
    assert np.array(read_image(tmp_path / "x.jpg")).shape == (48, 60, 3)


MODES = {
    "1.png": picture(1).convert("1"),
    "l.png": picture(1).convert("L"),
    "la.png": picture(1).convert("LA"),
    "p.png": picture(1).convert("P"),
    "rgba.png": picture(1).convert("RGBA"),
    "cmyk.jpg": picture(1).convert("CMYK"),
    "ycbcr.jpg": picture(1).convert("YCbCr"),
    "p.gif": picture(1).convert("P"),
    "rgb.webp": picture(1),
}


@pytest.mark.parametrize("name", MODES)
def test_any_mode_becomes_rgb(tmp_path, name):
    MODES[name].save(tmp_path / name)
    read = np.array(read_image(tmp_path / name)).astype(int)
    expected = np.array(MODES[name].convert("RGB")).astype(int)
    assert read.shape == (48, 60, 3) and abs(read - expected).mean() < 12


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow lacks WebP")
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    red, _, blue = np.array(read_image(tmp_path / f"x.{suffix}")).mean((0, 1))
    assert red > 240 and blue < 15


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_extreme_shapes_are_read_by_both_loaders(root, size):
    picture(1, size).save(root / "a" / "0.png")
    assert image_folder(root, 32).images.shape == (4, 3, 32, 32)
    recipe = recipes.get("in1k", ["batch_size=4", "resolution=32", "eval_resolution=32", "drop_path=0.0"], "timm:x")
    for train in (True, False):
        batches = disk.loader(root.parent, "train", recipe, train, workers=0, batch_size=4)
        assert next(batches.epoch())[0].shape == (4, 3, 32, 32) and batches.skipped == []


def damage(content, rng):
    """Truncate a file, or overwrite, remove or insert bytes."""
    data, kind = bytearray(content), rng.integers(5)
    position = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:position])
    if kind == 1:
        for place in rng.integers(len(data), size=8):
            data[place] = rng.integers(256)
    elif kind == 2:
        data[position : position + 20] = rng.bytes(20)
    elif kind == 3:
        del data[position : position + 7]
    else:
        data[position % 64] ^= 1 << int(rng.integers(8))  # in the header
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", readable_formats())
def test_damaged_files_never_raise_anything_but_decode_errors(suffix):
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = io.BytesIO()
    kind = Image.registered_extensions()[suffix]
    image = picture(3).convert("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB")
    try:
        image.save(content, kind, exif=exif)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow cannot write {suffix}")
    for _ in range(60):
        damaged = damage(content.getvalue(), rng)
        with contextlib.suppress(DECODE_ERRORS):
            read_image(io.BytesIO(damaged), size=16)
    with pytest.raises(DECODE_ERRORS):
        read_image(io.BytesIO(b""))
