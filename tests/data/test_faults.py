"""Data that are not as they should be: hazards D1 to D14 and F14."""

import io
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jemjax.data import (
    ArraySource,
    Crop,
    DataError,
    Reading,
    batches,
    in_memory,
    open_data,
)
from jemjax.data.images import read_image, to_channels
from jemjax.errors import printable

SKIP = Reading(on_bad_image="skip", max_bad_share=0.2)


def write(path, size=(6, 4), color=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def numbered_folder(folder, count=20, spoiled=()):
    """Images that say which they are, some of them spoiled behind their header."""
    for i in range(count):
        path = write(folder / "train" / f"{i:03d}.png", (3, 2), i, "L")
        if i in spoiled:
            path.write_bytes(path.read_bytes()[:50])
    write(folder / "test" / "x.png", (3, 2), 0, "L")
    return f"folder:{folder}"


def pixel(value, mode, name="x.tiff", reading=None, size=(6, 4)):
    """The first pixel of an image of one value, as it is read."""
    file = io.BytesIO()
    if isinstance(value, np.ndarray):
        image = Image.fromarray(value)
    else:
        image = Image.new(mode, size, value)
    image.save(file, {"tiff": "TIFF", "png": "PNG"}[name.split(".")[1]])
    channels = 1 if mode in ("I;16", "I", "F", "L", "LA") else 3
    options = [reading] if reading else []
    pixels = read_image(file, (None, None, channels), name, *options)
    return pixels if isinstance(value, np.ndarray) else pixels[0, 0].tolist()


# ------------------------------------------------------------------ D1, D2: no images


BAD = {
    "empty.jpg": b"",
    "text.jpg": b"these are my notes\n",
    "page.png": b"<!DOCTYPE html><html>404</html>",
    "short.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0",
}


def test_d1_all_that_is_no_image_is_named_at_once(tmp_path):
    name = numbered_folder(tmp_path)
    for file, content in BAD.items():
        (tmp_path / "train" / file).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_data(name)
    assert "4 of 25 images cannot be read" in str(error.value)
    for file in BAD:
        assert file in str(error.value)
    assert "--on-bad-image skip" in str(error.value)


@pytest.mark.parametrize("mode", ["files", "memory", "crops"])
def test_d1_the_next_image_takes_the_place_of_a_bad_one(tmp_path, mode, caplog):
    name = numbered_folder(tmp_path, spoiled=(4, 5, 19))
    (tmp_path / "train" / "007.png").write_bytes(b"")
    source = open_data(name, reading=SKIP)
    if mode == "memory":
        source = in_memory(source)
        seen = [int(example["image"][0, 0, 0]) for example in source]
    elif mode == "crops":
        crops = (Crop(1, None),)
        stream = batches(source, batch_size=20, seed=0, crops=crops)
        batch = next(stream)
        seen = sorted(batch["views"][0][:, 0, 0, 0].tolist())
    else:
        seen = [int(example["image"][0, 0, 0]) for example in source]
    replaced = {4: 6, 5: 6, 7: 8, 19: 0}
    expected = [replaced.get(i, i) for i in range(20)]
    assert seen == (sorted(expected) if mode == "crops" else expected)
    assert set(source.unreadable) == {4, 5, 7, 19}
    assert "005.png" in source.unreadable[5]
    warned = [r.getMessage() for r in caplog.records if "takes its place" in r.message]
    assert len(warned) == 4


def test_d1_what_takes_a_place_depends_on_no_host_and_no_history(tmp_path):
    source = open_data(numbered_folder(tmp_path, spoiled=(4, 5)), reading=SKIP)

    def stream(step, **hosts):
        fresh = open_data(source.name, reading=SKIP)
        part = batches(fresh, batch_size=4, seed=1, step=step, **hosts)
        rows = [b["image"][:, 0, 0, 0] for b in itertools.islice(part, 12 - step)]
        part.close()
        return np.array(rows)

    whole = stream(0)
    assert not {4, 5} & set(whole.ravel().tolist())
    np.testing.assert_array_equal(stream(7), whole[7:])
    for host in range(2):
        part = stream(0, process_index=host, process_count=2)
        np.testing.assert_array_equal(part, whole[:, 2 * host : 2 * host + 2])


def test_d1_more_than_the_stated_share_is_refused(tmp_path):
    name = numbered_folder(tmp_path, spoiled=(1, 2, 3, 4, 5))
    source = open_data(name, reading=SKIP)
    with pytest.raises(DataError, match="5 of 20 images cannot be read, more than"):
        in_memory(source)
    for i in range(1, 6):  # of these the header tells
        (tmp_path / "train" / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(DataError, match="5 of 21 images cannot be read, more than"):
        open_data(name, reading=SKIP)
    with pytest.raises(DataError, match="1 of 20 .* the 1.00% of --max-bad-share"):
        in_memory(
            open_data(
                numbered_folder(tmp_path / "other", spoiled=(3,)),
                reading=Reading(on_bad_image="skip"),
            )
        )


def test_d1_a_set_without_one_good_image_is_refused_at_any_share(tmp_path):
    lenient = Reading(on_bad_image="skip", max_bad_share=1.0)
    name = numbered_folder(tmp_path, 4)
    for path in (tmp_path / "train").iterdir():  # behind the header
        path.write_bytes(path.read_bytes()[:45])
    source = open_data(name, reading=lenient)
    for _ in range(2):  # and again, now that all are known
        with pytest.raises(DataError, match="none of 4 images can be read"):
            source[1]
    for path in tmp_path.rglob("*.png"):  # of these the header tells
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 5 images can be read"):
        open_data(source.name, reading=lenient)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_d2_nothing_is_loaded_truncated(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"x\.{kind}: starts as a \w+ image but"):
            read_image(str(path), (32, 32, 3), f"x.{kind}")


# ------------------------------------------------------------------ D3 to D7: pixels


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, [77] * 3),
        ("LA", (77, 255), [77] * 3),
        ("1", 1, [255] * 3),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("YCbCr", (128, 128, 128), [128] * 3),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("PA", (0, 255), [0, 0, 0]),
    ],
)
def test_d3_every_mode_becomes_rgb_or_grey(mode, color, expected):
    image = Image.new(mode, (2, 2), color)
    for channels, name in ((3, "RGB"), (1, "L")):
        made = to_channels(image, channels, Reading())
        assert made.mode == name
    pixels = np.asarray(to_channels(image, 3, Reading()))[0, 0]
    np.testing.assert_allclose(pixels, expected, atol=3)


@pytest.mark.parametrize(
    ("alpha", "behind"),
    [("white", [255] * 3), ("black", [0] * 3), ("mean", [124, 116, 104])],
)
def test_d4_alpha_is_composited_on_the_chosen_color(alpha, behind):
    reading = Reading(alpha=alpha)
    assert pixel((255, 0, 0, 0), "RGBA", "x.png", reading) == behind
    assert pixel((255, 0, 0, 255), "RGBA", "x.png", reading) == [255, 0, 0]
    half = pixel((200, 40, 0, 128), "RGBA", "x.png", reading)
    mean = (np.array([200, 40, 0]) + behind) / 2
    np.testing.assert_allclose(half, mean, atol=1)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_d5_sixteen_bit_images_keep_their_range(name):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = pixel(ramp, "I;16", name)
    np.testing.assert_array_equal(pixels.ravel(), np.arange(256))


def test_d5_an_image_is_never_scaled_by_its_own_values():
    bright, dark = (pixel(value, "I;16") for value in (60000, 600))
    assert bright[0] > 95 * dark[0]
    assert pixel(0.5, "F") == [128] and pixel(0.25, "F") == [64]


@pytest.mark.parametrize(
    ("value", "mode"), [(200.0, "F"), (-0.5, "F"), (70000, "I"), (-3, "I")]
)
def test_d5_values_of_unknown_range_are_refused_with_the_option(value, mode):
    with pytest.raises(DataError, match="x.tiff: holds .* values .*--value-range"):
        pixel(value, mode)
    reading = Reading(value_range=(-100, 100_000))
    expected = (value + 100) * 255 / 100_100
    np.testing.assert_allclose(pixel(value, mode, reading=reading), expected, atol=0.5)


def test_d5_a_range_is_for_images_of_more_than_8_bits():
    twelve = Reading(value_range=(0, 4095))
    assert pixel(4095, "I;16", reading=twelve) == [255]
    assert pixel(819, "I;16", reading=twelve) == [51]
    assert pixel(60000, "I;16", reading=twelve) == [255]
    assert pixel(100, "L", reading=twelve) == [100]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_d6_exif_orientation_is_applied(orientation):
    upright = np.array([[10, 60, 110], [160, 210, 250]], np.uint8)
    stored = {  # how a camera that is held so stores the same picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    pixels = read_image(file, (None, None, 1), "x")
    np.testing.assert_array_equal(pixels[..., 0], upright)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_d7_of_several_frames_the_first_is_used_with_one_warning(
    kind, tmp_path, caplog
):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    for i in range(3):
        path = tmp_path / "train" / f"moving{i}.{kind}"
        path.parent.mkdir(exist_ok=True)
        options = {"lossless": True} if kind == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    write(tmp_path / "train" / "still.png")
    write(tmp_path / "test" / "x.png")
    train = open_data(f"folder:{tmp_path}")
    open_data(f"folder:{tmp_path}", split="test")
    assert all(e["image"][0, 0].tolist() == [255, 0, 0] for e in train)
    (record,) = caplog.records
    assert "3 of 5 images hold several frames" in record.getMessage()
    assert f"moving0.{kind}" in record.getMessage()


# ------------------------------------------------------------------ D8, D9: sizes


def bomb(width, height):
    """A PNG of a few bytes that says it is huge."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4) + height.to_bytes(4)
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


def test_d8_decompression_bombs_are_named_and_not_decoded(tmp_path):
    name = numbered_folder(tmp_path)
    (tmp_path / "train" / "bomb.png").write_bytes(bomb(30_000, 30_000))
    expected = "bomb.png: has more than the 89,478,485 pixels that --max-pixels allows"
    with pytest.raises(DataError, match=expected):
        open_data(name)
    source = open_data(name, reading=SKIP)
    next(batches(source, batch_size=21, seed=0))
    assert [r for r in source.unreadable.values() if "bomb.png" in r]


def test_d8_the_limit_of_pixels_is_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = str(write(tmp_path / "x.png", (20, 20)))
    with pytest.raises(DataError, match="x.png: has more than the 399 pixels"):
        read_image(path, (4, 4, 3), "x.png", Reading(max_pixels=399))
    large = Reading(max_pixels=400)
    assert read_image(path, (4, 4, 3), "x.png", large).shape == (4, 4, 3)


def test_d9_sizes_are_counted_by_the_survey(tmp_path):
    for i, size in enumerate([(1, 1), (1, 1), (300, 200)]):
        write(tmp_path / "train" / f"{i}.png", size)
    write(tmp_path / "test" / "x.png", (300, 200))
    source = open_data(f"folder:{tmp_path}")
    assert source.survey.sizes == {(1, 1): 2, (200, 300): 2}
    assert in_memory(source).survey == source.survey
    assert source[0]["image"].shape == (256, 256, 3)


# ------------------------------------------------------------------ D10: folders


def test_d10_an_empty_folder_and_one_of_one_class(tmp_path):
    with pytest.raises(DataError, match="no images below"):
        open_data(f"folder:{tmp_path}")
    for i in range(20):
        write(tmp_path / "cat" / f"{i}.png")
    assert open_data(f"folder:{tmp_path}").num_classes == 0


def as_nobody(code, *arguments):
    """Runs Python code without the rights of root."""
    start = (
        "import jemjax.data, os, sys\n"
        "jemjax.data.open_data('folder:' + sys.argv[1], split='test')\n"  # imports
        "os.getuid() or os.setgid(65534)\n"
        "os.getuid() or os.setuid(65534)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.fixture
def for_all():
    """A folder that not only root may enter, as it must pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


def test_d10_what_may_not_be_read_is_named(for_all):
    for name in ("set", "file", "folder"):
        numbered_folder(for_all / name)
    code = (
        "for name in sys.argv[2:]:\n"
        "    try: jemjax.data.open_data('folder:' + name)\n"
        "    except jemjax.data.DataError as error: print(error)"
    )
    os.chmod(for_all / "file" / "train" / "003.png", 0)
    os.chmod(for_all / "folder" / "train", 0)
    told = as_nobody(code, *[str(for_all / n) for n in ("set", "file", "folder")])
    os.chmod(for_all / "folder" / "train", 0o755)
    assert "003.png: cannot be read (Permission denied)" in told.stdout, told.stderr
    assert "train: cannot be listed (Permission denied)" in told.stdout, told.stderr


def test_d10_links_to_nothing_and_in_circles(tmp_path):
    name = numbered_folder(tmp_path)
    (tmp_path / "train" / "circle").symlink_to(tmp_path / "train" / "circle")
    assert len(open_data(name)) == 20
    (tmp_path / "train" / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "train" / "b.png").symlink_to(tmp_path / "train" / "b.png")
    with pytest.raises(DataError) as error:
        open_data(name)
    assert "a.png: is a link to a file that does not exist" in str(error.value)
    assert "b.png: is a link" in str(error.value)


def test_d10_pipes_and_devices_are_not_opened(tmp_path):
    name = numbered_folder(tmp_path)
    os.mkfifo(tmp_path / "train" / "pipe.png")
    (tmp_path / "train" / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError) as error:
        open_data(name)
    assert "pipe.png: is no regular file" in str(error.value)
    assert "zero.png: is no regular file" in str(error.value)


HOSTILE = [
    ("line\nbreak", "line\\nbreak"),
    ("bell\x07\x1b[31mred", "bell\\x07\\x1b[31mred"),
    ("byte\udcff", "byte\\xff"),
    ("turned\u202egnp", "turned\\u202egnp"),
    ("lone\ud800", "lone\\ud800"),
    ("猫 ä.png", "猫 ä.png"),
]


@pytest.mark.parametrize(("name", "shown"), HOSTILE)
def test_d10_names_are_shown_in_characters_that_show(name, shown):
    assert printable(name) == shown
    assert printable(name).isprintable()


@given(st.text())
def test_d10_any_name_is_shown_in_characters_that_show(name):
    assert printable(name).isprintable()
    printable(name).encode()


def test_d10_hostile_names_are_read_and_their_errors_are_one_line(tmp_path):
    folder = os.fsencode(tmp_path / "train")
    for label in (b"red]\n\x1b[31m", b"\xff"):
        os.makedirs(os.path.join(folder, label))
        for i in range(2):
            Image.new("L", (3, 2), i).save(
                os.fsdecode(os.path.join(folder, label, b"%d\r\n.png" % i))
            )
    write(tmp_path / "test" / os.fsdecode(b"\xff") / "x.png", (3, 2), 0, "L")
    source = open_data(f"folder:{tmp_path}")
    assert source.class_names == ("red]\\n\\x1b[31m", "\\xff")
    bad = os.path.join(folder, b"\xff", b"bad\n.png")
    with open(bad, "wb"):
        pass
    with pytest.raises(DataError) as error:
        open_data(f"folder:{tmp_path}")
    assert str(error.value).isprintable()
    assert "\\xff/bad\\n.png: is an empty file" in str(error.value)


def test_d10_names_of_data_that_are_not_utf8_are_refused_in_print(tmp_path):
    with pytest.raises(DataError) as error:
        open_data(f"folder:{tmp_path}/\udcff\n")
    assert str(error.value).isprintable()


# ------------------------------------------------------------------ D13: labels


def test_d13_labels_without_a_class_are_refused():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    with pytest.raises(ValueError, match="labels: got 0 to 2, expected .* 2 classes"):
        ArraySource(images, np.array([0, 1, 2]), class_names=["a", "b"])


# ------------------------------------------------------------------ fuzz


def encoded(kind, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


VALID = [
    encoded(kind, mode)
    for kind, mode in [
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "F"),
        ("TIFF", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "RGB"),
        ("TGA", "RGB"),
        ("ICO", "RGBA"),
        ("PCX", "RGB"),
        ("SGI", "RGB"),
        ("JPEG2000", "RGB"),
    ]
]


@st.composite
def mutated(draw):
    content = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(content)))
    return bytes(content[:cut]) if draw(st.booleans()) else bytes(content)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is odd in a file
@settings(max_examples=400)
@given(st.one_of(st.binary(max_size=300), mutated()))
def test_any_bytes_are_an_image_or_an_error_that_names_the_file(content):
    small = Reading(max_pixels=10_000)
    try:
        pixels = read_image(io.BytesIO(content), (8, 8, 3), "set/x.jpg", small)
    except DataError as error:
        assert str(error).startswith("set/x.jpg: ")
        assert str(error).isprintable()
    else:
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


# ------------------------------------------------------------------ F14: workers


class Slow:
    """Stands for a disk that does not answer."""

    def __init__(self):
        self.answers = threading.Event()

    def gather(self, indices):
        self.answers.wait()


def test_f14_a_disk_that_does_not_answer_is_given_up(capfd, monkeypatch):
    disk = Slow()
    monkeypatch.setattr(ArraySource, "gather", disk.gather)
    source = ArraySource(np.zeros((8, 2, 2, 1), np.uint8))
    stream = batches(source, batch_size=4, seed=0, timeout=0.5)
    with pytest.raises(DataError, match="arrays: no batch for 0.5 seconds") as error:
        next(stream)  # which the disk would keep for ever
    assert error.value.hangs
    disk.answers.set()
    assert "gather" in capfd.readouterr().err  # the stack


WORKERS = """
import os, signal, sys, time
from jemjax.data import DataError, Reading, batches, open_data

def workers():
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    ours = []
    for child in map(int, children):
        command = open(f"/proc/{child}/cmdline").read()
        if "spawn_main" in command:
            ours.append(child)
    return ours

if __name__ == "__main__":
    import multiprocessing
    what, folder = sys.argv[1:]
    reading = Reading(on_bad_image="skip", max_bad_share=0.2)
    source = open_data("folder:" + folder, reading=reading)
    stream = batches(source, batch_size=4, seed=0, workers=2, timeout=15)
    next(stream)
    children = [child.pid for child in multiprocessing.active_children()]
    assert len(children) == 2, children
    print("workers", *children, flush=True)
    if what == "die":
        os._exit(9)
    for child in children:
        if what == "kill":
            os.kill(child, signal.SIGKILL)
        elif what == "stop":
            os.kill(child, signal.SIGSTOP)
        elif what == "interrupt":
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGTERM)
    try:
        for _ in range(20):
            next(stream)
        print("unreadable", sorted(source.unreadable))
    except DataError as error:
        print("told:", error)
    stream.close()
"""


def run_workers(what, tmp_path, spoiled=()):
    numbered_folder(tmp_path / "set", spoiled=spoiled)
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    before = set(os.listdir("/dev/shm"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run = subprocess.run(
        [sys.executable, str(script), what, str(tmp_path / "set")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TMPDIR": str(temporary),
        },
    )
    lines = run.stdout.splitlines()
    assert lines and lines[0].startswith("workers"), run.stderr
    processes = list(map(int, lines[0].split()[1:]))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and any(map(alive, processes)):
        time.sleep(0.1)
    assert not any(map(alive, processes))
    assert not set(os.listdir("/dev/shm")) - before
    left = [name for name in os.listdir(temporary) if "jemjax" in name]
    assert not left
    return run, lines[1:]


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_f14_a_killed_worker_is_told_with_its_file(tmp_path):
    run, lines = run_workers("kill", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "of --workers, which loads images, has ended, last reading" in lines[0]
    assert ".png" in lines[0] and "Traceback" not in run.stderr


@pytest.mark.slow
def test_f14_a_worker_that_hangs_is_told_with_its_file(tmp_path):
    run, lines = run_workers("stop", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "no batch for 15 seconds" in lines[0] and "last reading" in lines[0]


@pytest.mark.slow
def test_f14_signals_of_the_terminal_are_not_for_workers(tmp_path):
    run, lines = run_workers("interrupt", tmp_path, spoiled=(4, 5))
    assert run.returncode == 0 and lines == ["unreadable [4, 5]"], run.stderr
    assert run.stderr.count("takes its place") == 2


@pytest.mark.slow
def test_f14_workers_end_with_a_run_that_is_killed(tmp_path):
    run, _ = run_workers("die", tmp_path)
    assert run.returncode == 9
