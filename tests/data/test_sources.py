import logging
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jemjax.data import (
    ArraySource,
    DataError,
    Reading,
    headers,
    in_memory,
    load_arrays,
    open_data,
    spread,
)


def write(path, color=(255, 0, 0), size=(6, 4), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def the_split(path):
    """A second image lets the folder have both parts; say in which `path` is."""
    for split in ("train", "test"):
        source = open_data(f"folder:{path.parent}", split=split)
        if path.name in source.files:
            return split
    raise AssertionError(path)


def one_image(folder, name, image, grey=False, **options):
    """Reads `image` through a folder that also holds another image."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    Image.new("L" if grey else "RGB", image.size).save(folder / "other.png")
    source = open_data(f"folder:{folder}", split=the_split(folder / name))
    return source[source.files.index(name)]["image"]


def test_importing_the_package_brings_neither_jax_nor_tensorflow():
    code = (
        "import sys, jemjax.data, jemjax.data.prepare\n"
        "print(sorted(m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ------------------------------------------------------------------ digits and arrays


def test_digits_are_split_by_class_and_scaled_to_bytes():
    train, test = open_data("digits"), open_data("digits", split="test")
    assert len(train) + len(test) == 1797
    assert train.image_shape == (8, 8, 1) and train.num_classes == 10
    images, labels = load_arrays(train)
    assert images.dtype == np.uint8 and images.max() == 255 and images.min() == 0
    shares = np.bincount(load_arrays(test)[1]) / np.bincount(labels)
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    assert len({i.tobytes() for i in images} & {e["image"].tobytes() for e in test}) < 3


def test_digits_are_resized_on_request():
    assert open_data("digits", image_size=16)[0]["image"].shape == (16, 16, 1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digts", "did you mean digits?"),
        ("folders:/x", "did you mean folder:/x?"),
        ("cifar10", "did you mean tfds:cifar10?"),
        ("folder:", "expected digits, folder:PATH or tfds:NAME"),
        ("tests", "did you mean folder:tests?"),
    ],
)
def test_unknown_data_gets_a_suggestion(name, hint, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_data(name)
    assert hint in str(error.value) and name in str(error.value)


def test_wrong_split_and_size_are_refused():
    with pytest.raises(ValueError, match="split: got 'val'"):
        open_data("digits", split="val")
    with pytest.raises(DataError, match="image size: got 0"):
        open_data("digits", image_size=0)


def test_array_source_gives_examples_and_batches():
    images = np.arange(2 * 3 * 3 * 1, dtype=np.uint8).reshape(2, 3, 3, 1)
    source = ArraySource(images, np.array([4, 0]))
    assert source.num_classes == 5 and len(source) == 2
    assert source[0]["label"] == 4 and source[0]["label"].dtype == np.int32
    batch = source.gather(np.array([1, 1]))
    np.testing.assert_array_equal(batch["image"], images[[1, 1]])
    assert (
        ArraySource(images)[1]["label"] == -1 and ArraySource(images).num_classes == 0
    )


@pytest.mark.parametrize(
    ("images", "labels", "argument"),
    [
        (np.zeros((2, 3, 3, 1), np.float32), None, "images"),
        (np.zeros((2, 3, 3), np.uint8), None, "images"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int32), "labels"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2), "labels"),
    ],
)
def test_array_source_refuses_wrong_arrays(images, labels, argument):
    with pytest.raises(ValueError, match=f"{argument}: got"):
        ArraySource(images, labels)


def test_load_arrays_takes_the_same_spread_subset():
    labels = np.arange(1000) % 10  # a fixed stride of 10 would see one class
    source = ArraySource(np.zeros((1000, 1, 1, 1), np.uint8), labels)
    _, first = load_arrays(source, limit=100)
    _, second = load_arrays(source, limit=100)
    assert len(first) == 100 and len(np.unique(first)) > 5
    np.testing.assert_array_equal(first, second)
    assert len(load_arrays(source, limit=5000)[1]) == 1000
    with pytest.raises(ValueError, match="limit: got 0"):
        load_arrays(source, limit=0)


def test_in_memory_decodes_what_fits_and_leaves_the_rest(tmp_path):
    for i in range(150):
        write(tmp_path / "train" / f"c{i % 2}" / f"{i:03d}.png", (i, 0, 0))
    write(tmp_path / "test" / "c0" / "a.png")
    source = open_data(f"folder:{tmp_path}")
    calls = []
    cached = in_memory(source, progress=lambda done, total: calls.append((done, total)))
    assert isinstance(cached, ArraySource)
    assert calls[-1] == (150, 150) and calls == sorted(calls) and len(calls) > 1
    assert cached.class_names == source.class_names and cached.name == source.name
    for index in (0, 77, 149):
        np.testing.assert_array_equal(cached[index]["image"], source[index]["image"])
        assert cached[index]["label"] == source[index]["label"]
    assert in_memory(source, max_bytes=100) is source
    assert in_memory(cached) is cached


# ------------------------------------------------------------------ folders


def test_folder_with_train_and_val_parts(tmp_path):
    write(tmp_path / "train" / "cat" / "a.png")
    write(tmp_path / "train" / "dog" / "deep" / "er" / "b.png", (0, 255, 0))
    write(tmp_path / "val" / "dog" / "c.png", (0, 0, 255))
    train = open_data(f"folder:{tmp_path}")
    test = open_data(f"folder:{tmp_path}", split="test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [e["label"] for e in train] == [0, 1] and [e["label"] for e in test] == [1]
    assert train.image_shape == (4, 6, 3)
    assert train[1]["image"][0, 0].tolist() == [0, 255, 0]
    assert pickle.loads(pickle.dumps(train))[0]["image"].shape == (4, 6, 3)


def test_test_classes_must_be_those_of_train(tmp_path):
    write(tmp_path / "train" / "cat" / "a.png")
    write(tmp_path / "train" / "dog" / "b.png")
    write(tmp_path / "test" / "cow" / "c.png")
    with pytest.raises(DataError, match="a class cow outside of the 2 classes"):
        open_data(f"folder:{tmp_path}", split="test")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "car", "bus"):
        for i in range(3):
            write(tmp_path / name / f"{i}.png")
    assert open_data(f"folder:{tmp_path}").class_names == ("bus", "car", "train")


def test_held_out_tenth_does_not_move_when_files_are_added(tmp_path):
    def held_out():
        return set(open_data(f"folder:{tmp_path}", split="test").files)

    for name in ("a", "b"):
        for i in range(60):
            write(tmp_path / name / f"{i}.png", size=(1, 1))
    before = held_out()
    train = set(open_data(f"folder:{tmp_path}").files)
    assert not before & train and len(before | train) == 120
    assert 4 <= len(before) <= 24
    for i in range(60, 80):
        write(tmp_path / "a" / f"{i}.png", size=(1, 1))
    assert before <= held_out() and not train & held_out()


@pytest.mark.parametrize("folders", ["", "only/"])
def test_flat_folder_and_single_folder_are_unlabelled(tmp_path, folders):
    for i in range(20):
        write(tmp_path / f"{folders}{i}.png")
    source = open_data(f"folder:{tmp_path}")
    assert source.num_classes == 0 and {int(e["label"]) for e in source} == {-1}
    assert len(source) + len(open_data(f"folder:{tmp_path}", split="test")) == 20


def test_images_beside_class_folders_are_refused(tmp_path):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "2.png")
    with pytest.raises(DataError, match="2.png beside a"):
        open_data(f"folder:{tmp_path}")


def test_files_are_sorted_by_bytes_and_odd_names_are_read(tmp_path):
    names = ["ä.png", "Z.png", "a.png", "猫 1.png", "line\nbreak.png"]
    for name in names:
        write(tmp_path / "train" / name)
    write(tmp_path / "train" / ".hidden.png")
    odd = os.path.join(os.fsencode(tmp_path / "train"), b"\xff.png")
    os.link(tmp_path / "train" / "a.png", odd)
    write(tmp_path / "test" / "x.png")
    source = open_data(f"folder:{tmp_path}")
    found = [os.fsencode(os.path.basename(name)) for name in source.files]
    assert found == sorted([*map(os.fsencode, names), b"\xff.png"])
    assert all(example["image"].shape == (4, 6, 3) for example in source)


def test_a_missing_folder_gets_a_suggestion(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="there is no folder .*did you mean .*pictures"):
        open_data(f"folder:{tmp_path}/picturs")
    write(tmp_path / "x.png")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        open_data(f"folder:{tmp_path}/x.png")


def test_a_folder_without_images_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="no images below"):
        open_data(f"folder:{tmp_path}")


def test_one_image_is_too_few(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match="too few for a train part"):
        open_data(f"folder:{tmp_path}")


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    write(tmp_path / "real" / "a.png")
    write(tmp_path / "data" / "train" / "dog" / "b.png")
    (tmp_path / "data" / "train" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    write(tmp_path / "data" / "test" / "dog" / "c.png")
    files = open_data(f"folder:{tmp_path / 'data'}").files
    assert list(files) == ["train/cat/a.png", "train/dog/b.png"]


# ------------------------------------------------------------------ unreadable files


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "is an empty file"),
        (b"these are my notes\n", "is a text file"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "starts as a JPEG image but is damaged"),
        (bytes(range(256)), "is no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is a text file"),
    ],
)
def test_what_is_no_image_is_found_when_the_folder_is_opened(tmp_path, content, looks):
    for i in range(12):
        write(tmp_path / "cat" / f"{i}.png")
        write(tmp_path / "dog" / f"{i}.png")
    (tmp_path / "cat" / "bad.jpg").write_bytes(content)
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"cat/bad\.jpg: {looks}"):
            open_data(f"folder:{tmp_path}", split=split)


def test_a_dangling_link_is_named(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="b.png: is a link to a file that does not exi"):
        open_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_truncated_image_is_named_when_it_is_read(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "train").mkdir()
    bad = tmp_path / "train" / f"bad.{kind}"
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    write(tmp_path / "test" / "a.png", size=(64, 64))
    source = open_data(f"folder:{tmp_path}")
    expected = rf"bad\.{kind}: starts as a \w+ image but is damaged or cut short"
    with pytest.raises(DataError, match=expected):
        source[0]
    with pytest.raises(DataError, match=expected):
        load_arrays(source)


def test_of_a_large_folder_a_sample_is_looked_at(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(headers, "HEADERS_READ", 10)
    monkeypatch.setattr(headers, "HEADERS_SAMPLED", 1)
    for i in range(10):
        write(tmp_path / "train" / f"{i}.png", 100, mode="L")
    write(tmp_path / "test" / "0.png", 100, mode="L")
    with caplog.at_level(logging.INFO, "jemjax.data"):
        source = open_data(f"folder:{tmp_path}")
    assert "11 files are those of 1 of them" in caplog.text
    # one of another mode and size is brought to the shape of the rest
    write(tmp_path / "train" / "3.png", size=(9, 9))
    assert source[3]["image"].shape == source.image_shape == (4, 6, 1)


def test_a_sample_does_not_tell_the_share_of_unreadable_files(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "HEADERS_READ", 10)
    monkeypatch.setattr(headers, "HEADERS_SAMPLED", 4)
    for i in range(39):
        write(tmp_path / "train" / f"{i:02d}.png")
    write(tmp_path / "test" / "0.png")
    sampled = spread(40, 4)
    (tmp_path / "train" / f"{sampled[1]:02d}.png").write_bytes(b"")
    skip = Reading(on_bad_image="skip", max_bad_share=0.1)  # 1 of 39, not of 4
    source = open_data(f"folder:{tmp_path}", reading=skip)
    load_arrays(source)
    assert list(source.unreadable) == [sampled[1]]
    for i in sampled:
        (tmp_path / "train" / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of 4 images can be read"):
        open_data(f"folder:{tmp_path}", reading=skip)


# ------------------------------------------------------------------ modes and sizes


@pytest.mark.parametrize(
    ("mode", "color", "name", "expected"),
    [
        ("1", 1, "x.png", [255]),
        ("L", 77, "x.png", [77]),
        ("LA", (0, 0), "x.png", [255]),
        ("LA", (0, 128), "x.png", [127]),
        ("I;16", 257 * 100, "x.png", [100]),
        ("I;16", 65535, "x.tiff", [255]),
        ("F", 0.5, "x.tiff", [128]),
        ("I", 257 * 9, "x.tiff", [9]),
    ],
)
def test_grey_modes_become_one_channel(tmp_path, mode, color, name, expected):
    image = Image.new(mode, (6, 4), color)
    pixels = one_image(tmp_path / "set", name, image, grey=True)
    assert pixels.shape == (4, 6, 1) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[2, 3], expected, atol=1)


@pytest.mark.parametrize(
    ("mode", "color", "name", "expected"),
    [
        ("L", 77, "x.png", [77, 77, 77]),
        ("RGB", (10, 20, 30), "x.png", [10, 20, 30]),
        ("RGBA", (255, 0, 0, 0), "x.png", [255, 255, 255]),
        ("RGBA", (0, 0, 0, 51), "x.png", [204, 204, 204]),
        ("CMYK", (255, 0, 0, 0), "x.tiff", [0, 255, 255]),
        ("CMYK", (0, 255, 0, 0), "x.jpg", [255, 0, 255]),
        ("RGB", (10, 200, 30), "x.webp", [10, 200, 30]),
        ("I;16", 257 * 100, "x.png", [100, 100, 100]),
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, color, name, expected):
    image = Image.new(mode, (6, 4), color)
    options = {"lossless": True} if name.endswith("webp") else {}
    pixels = one_image(tmp_path / "set", name, image, **options)
    assert pixels.shape == (4, 6, 3)
    np.testing.assert_allclose(pixels[2, 3], expected, atol=3)


def test_palettes_become_colors_and_their_transparency_white(tmp_path):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30, 5, 5, 5])
    assert one_image(tmp_path / "a", "x.png", image)[0, 0].tolist() == [10, 200, 30]
    pixels = one_image(tmp_path / "b", "x.png", image, transparency=1)
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = np.full((4, 6), np.nan, np.float32)
    with pytest.raises(DataError, match="x.tiff: holds values that are not finite"):
        one_image(tmp_path / "set", "x.tiff", Image.fromarray(values), grey=True)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp"])
@pytest.mark.parametrize("image_size", [None, 4])
def test_exif_orientation_is_applied(tmp_path, name, image_size):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))  # stored: dark on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown: turned right, so dark on top
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / name, exif=exif)
    write(tmp_path / "test" / "y.png", size=(8, 16))
    source = open_data(f"folder:{tmp_path}", image_size=image_size)
    side = (image_size, image_size) if image_size else (16, 8)
    pixels = source[0]["image"]
    assert pixels.shape == (*side, 3)
    assert pixels[0].max() < 40 and pixels[-1].min() > 215


def test_sizes_that_differ_are_resized_and_cropped(tmp_path):
    write(tmp_path / "train" / "a.png", size=(300, 200))
    write(tmp_path / "train" / "b.png", size=(20, 30))
    write(tmp_path / "test" / "c.png", size=(20, 30))
    assert open_data(f"folder:{tmp_path}").image_shape == (256, 256, 3)
    assert open_data(f"folder:{tmp_path}")[1]["image"].shape == (256, 256, 3)
    small = open_data(f"folder:{tmp_path}", split="test", image_size=8)
    assert small[0]["image"].shape == (8, 8, 3)


def test_a_source_knows_whether_sizes_differ_and_is_then_not_held_in_memory(tmp_path):
    for i, size in enumerate([(6, 4), (6, 4), (4, 6)]):
        write(tmp_path / "several" / f"{i}.png", size=size)
        write(tmp_path / "one" / f"{i}.png", size=(6, 4))
    several = open_data(f"folder:{tmp_path / 'several'}")
    assert several.sizes_differ and in_memory(several) is several
    one = open_data(f"folder:{tmp_path / 'one'}")
    assert not one.sizes_differ and isinstance(in_memory(one), ArraySource)
    squares = open_data(f"folder:{tmp_path / 'several'}", image_size=8)
    assert not squares.sizes_differ
    assert in_memory(squares)[0]["image"].shape == (8, 8, 3)


def test_resizing_keeps_the_center_and_the_aspect(tmp_path):
    image = Image.new("RGB", (600, 200), "white")
    image.paste("red", (200, 0, 400, 200))  # the square in the middle
    (tmp_path / "train").mkdir()
    image.save(tmp_path / "train" / "a.png")
    image.save(tmp_path / "train" / "b.jpg", quality=95)
    write(tmp_path / "test" / "c.png")
    for example in open_data(f"folder:{tmp_path}", image_size=20):
        np.testing.assert_allclose(
            example["image"][:, 1:-1], np.broadcast_to([255, 0, 0], (20, 18, 3)), atol=8
        )


def test_a_reduced_jpeg_decode_looks_like_the_full_one(tmp_path):
    y, x = np.mgrid[0:512, 0:768]
    pixels = np.stack([x / 3, y / 2, (x + y) / 5], -1).astype(np.uint8)
    (tmp_path / "train").mkdir()
    Image.fromarray(pixels).save(tmp_path / "train" / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "train" / "b.png")
    write(tmp_path / "test" / "c.png")
    jpeg, png = open_data(f"folder:{tmp_path}", image_size=32)
    difference = np.abs(jpeg["image"].astype(int) - png["image"])
    assert difference.mean() < 1.5 and difference.max() < 8


# ------------------------------------------------------------------ fingerprints


def test_d14_other_data_have_another_fingerprint(tmp_path):
    def fingerprint(split="train"):
        return open_data(f"folder:{tmp_path / 'set'}", split=split).fingerprint()

    for i in range(30):
        write(tmp_path / "set" / f"c{i % 2}" / f"{i}.png", (i, 0, 0))
    before = fingerprint()
    assert before == fingerprint() != fingerprint("test")
    seen = {before}
    bmp = write(tmp_path / "set" / "c0" / "new.bmp")
    for change in (
        lambda: bmp.write_bytes(bmp.read_bytes()[:-1] + b"9"),
        lambda: bmp.write_bytes(bmp.read_bytes() + b"0"),
        lambda: bmp.rename(bmp.with_name("other.bmp")),
        lambda: bmp.with_name("other.bmp").rename(tmp_path / "set" / "c1" / "new.bmp"),
        lambda: (tmp_path / "set" / "c1").rename(tmp_path / "set" / "c2"),
    ):
        change()
        seen.add(fingerprint() + fingerprint("test"))
    assert len(seen) == 6


def test_d14_a_copy_of_a_folder_has_its_fingerprint(tmp_path):
    for i in range(20):
        write(tmp_path / "set" / "train" / f"{i}.png", (i, 0, 0))
    write(tmp_path / "set" / "test" / "x.png")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "train" / "3.png", (0, 0))
    source, copy = (open_data(f"folder:{tmp_path / n}") for n in ("set", "copy"))
    assert source.fingerprint() == copy.fingerprint() == in_memory(copy).fingerprint()


def test_d14_arrays_have_the_fingerprint_of_their_content():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    labels = np.array([0, 1, 1])
    before = ArraySource(images, labels).fingerprint()
    assert before == ArraySource(images.copy(), labels).fingerprint()
    assert before != ArraySource(images, labels[::-1]).fingerprint()
    assert before != ArraySource(images.reshape(3, 4, 1, 1), labels).fingerprint()
    images[0, 0, 0] = 1
    assert before != ArraySource(images, labels).fingerprint()
