"""`jemjax data check`: every bad file is named, and the exit code says if any is."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jemjax.data import DataError, Reading
from jemjax.data.check import check
from jemjax.data.prepare import prepare


def write(path, size=(40, 30), color=(1, 2, 3), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def good(tmp_path):
    for label in ("ant", "bee"):
        for i in range(12):
            write(tmp_path / "set" / label / f"{i}.jpg", (40 + i, 30))
    return tmp_path / "set"


def jemjax(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "jemjax.cli", *arguments],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_good_set_is_counted(good):
    calls = []
    found = check(str(good), progress=lambda done, total: calls.append((done, total)))
    assert found.good and sum(found.parts.values()) == 24
    assert found.classes == {"ant": 12, "bee": 12}
    assert (min(found.shorter), max(found.longer)) == (30, 51)
    assert found.formats == {"JPEG": 24} and found.modes == {"RGB": 24}
    assert calls[-1] == (24, 24)


def test_all_that_is_odd_is_counted(good, tmp_path):
    write(good / "ant" / "clear.png", (4, 9), (1, 2, 3, 0), "RGBA")
    write(good / "ant" / "deep.png", (40, 30), 4095, "I;16")
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    red.save(good / "ant" / "moving.gif", save_all=True, append_images=[blue])
    write(tmp_path / "elsewhere.png")
    (good / "ant" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    found = check(f"folder:{good}")
    assert found.good and found.transparent == 1 and found.outside == 1
    assert found.values == {"I;16": (4095, 4095)}
    assert len(found.frames) == 1 and "moving.gif" in found.frames[0]
    assert found.modes == {"RGB": 25, "RGBA": 1, "I;16": 1, "P": 1}
    small = check(str(good), min_size=10)
    assert not small.good and len(small.small) == 1
    assert "clear.png: is of 9 x 4 pixels, expected at least 10" in small.small[0]


def test_every_bad_file_is_named_with_its_reason(good):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in range(9):
        path = good / "bee" / f"cut{i}.png"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:5000])  # its header is whole
    (good / "bee" / "page.jpg").write_bytes(b"<html>")
    Image.fromarray(np.full((4, 6), 9, np.float32)).save(good / "bee" / "float.tiff")
    found = check(str(good))
    assert len(found.unreadable) == 11 and not found.good
    for name in (*(f"cut{i}.png" for i in range(9)), "page.jpg", "float.tiff"):
        assert sum(f"bee/{name}: " in sentence for sentence in found.unreadable) == 1
    ranged = check(str(good), reading=Reading(value_range=(0, 9)))
    assert len(ranged.unreadable) == 10


def test_a_file_that_the_disk_does_not_give_is_one_of_the_table(good, monkeypatch):
    names, opened = sorted(os.listdir(good / "bee")), Image.open

    def fail(file, **options):
        if file == str(good / "bee" / names[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", fail)
    found = check(str(good))
    assert len(found.shorter) == 23 and not found.good
    assert f"{names[0]}: cannot be read" in found.unreadable[0]


def test_prepared_sets_and_digits_are_checked_too(good, tmp_path):
    prepare("folder", good, name="ants", out=tmp_path)
    found = check("tfds:ants", data_dir=tmp_path)
    assert found.good and sum(found.parts.values()) == 24
    assert found.classes == {"ant": 12, "bee": 12} and found.formats == {"JPEG": 24}
    assert check("digits").parts == {"train": 1442, "test": 355}


def test_a_missing_or_unordered_folder_is_an_error(good, tmp_path):
    with pytest.raises(DataError, match="there is no folder .* did you mean .*/set"):
        check(str(tmp_path / "sett"))
    write(good / "beside.png")
    with pytest.raises(DataError, match="beside class folders"):
        check(str(good))
    with pytest.raises(DataError, match="--min-size: got 0"):
        check(str(good), min_size=0)


def test_the_command_shows_a_table_and_leaves_with_0_or_3(good):
    done = jemjax("data", "check", "set", cwd=good.parent)
    assert done.returncode == 0, done.stderr
    assert b"images       24" in done.stdout and b"all is well" in done.stdout
    done = jemjax("data", "check", "sett", cwd=good.parent)
    assert done.returncode == 3 and b"did you mean" in done.stderr


def test_the_command_shows_hostile_names_as_they_are_spelt(good):
    names = [b"[red]x.png", b"line\nbreak.png", b"\x1b[2J.png", b"\xff.png"]
    for name in names:
        with open(os.path.join(os.fsencode(good), b"bee", name), "wb"):
            pass
    os.mkdir(os.path.join(os.fsencode(good), b"=cmd\r"))
    write(good / "=cmd\r" / "1.png")
    done = jemjax("data", "check", str(good))
    assert done.returncode == 3 and b"Traceback" not in done.stderr
    lines = done.stdout.decode().splitlines()
    assert all(line.isprintable() for line in lines)
    for shown in ("[red]x.png", r"line\nbreak.png", r"\x1b[2J.png", r"\xff.png"):
        assert sum(f"bee/{shown}: is an empty file" in line for line in lines) == 1
    assert any(r"=cmd\r 1" in line for line in lines)
