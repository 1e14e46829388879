"""What may differ between a run and its continuation, and what may not."""

import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from jemjax.data import ArraySource, open_data
from jemjax.errors import UserError
from jemjax.methods import BYOL, VICReg
from jemjax.training.config.file import to_toml
from jemjax.training.config.options import OptimizerOptions, PretrainConfig, ViewOptions
from jemjax.training.config.resolve import resolve
from jemjax.training.reporting.metrics_file import MetricsFile, read_metrics
from jemjax.training.storage import manifest
from jemjax.training.storage.files import write_json
from jemjax.training.storage.provenance import compare, describe_run


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


def _about(digits, method=None, **changes):
    config = PretrainConfig(method=method or VICReg(), steps=50, **changes)
    return describe_run(resolve(config, digits, num_devices=2), digits)


@pytest.fixture(scope="module")
def about(digits):
    return _about(digits)


@pytest.fixture
def folder(tmp_path, digits, about):
    """A run with a checkpoint at step 20, which holds no arrays."""
    config = resolve(PretrainConfig(method=VICReg(), steps=50), digits)
    (tmp_path / "config.toml").write_text(to_toml(config))
    manifest.unfinished(tmp_path / "checkpoints", 20).mkdir(parents=True)
    digests = manifest.Digests(tmp_path / "checkpoints", 20)
    digests.stop()
    manifest.finish(tmp_path / "checkpoints", 20, about, {}, digests)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output": "elsewhere"},
        {"log_every": 1, "eval_every": 3, "checkpoint_every": 7},
        {"resume": True, "multihost": True, "fallback": False},
        {"allow_change": ("views",), "workers": 2, "fsdp": 2},
    ],
    ids=str,
)
def test_what_changes_no_number_may_differ(folder, digits, changes):
    assert compare(folder, _about(digits, **changes), ()) == []


@pytest.mark.parametrize(
    "changes, texts",
    [
        ({"epochs": 9.0, "steps": None}, ["steps: 50 there, ", "epochs: "]),
        (
            {"optimizer": OptimizerOptions(learning_rate=0.5)},
            ["optimizer.learning_rate: 0.006 there, 0.5 now"],
        ),
    ],
    ids=["longer", "learning rate"],
)
def test_what_changes_the_rest_of_the_run_is_told(folder, digits, changes, texts):
    config = PretrainConfig(**{"method": VICReg(), "steps": 50, **changes})
    told = compare(folder, describe_run(resolve(config, digits), digits), ())
    assert len(told) == len(texts)
    for text in texts:
        assert any(text in line for line in told)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 64}, "batch_size"),
        ({"backbone": "resnet18"}, "backbone"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
        ({"accumulate": 2}, "accumulate"),
        ({"method": VICReg(gamma=2.0)}, "method.gamma"),
        ({"method": BYOL()}, "method_name"),
        ({"views": ViewOptions(blur=False)}, "views.blur"),
        ({"optimizer": OptimizerOptions(momentum=0.5)}, "optimizer.momentum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_it_another_run_is_refused_unless_it_is_allowed(
    folder, digits, changes, key
):
    now = _about(digits, **changes)
    with pytest.raises(UserError, match=f"  {key}: .* there, .* now") as caught:
        compare(folder, now, ())
    assert caught.value.exit_code == 2
    # What is to be typed is in the message.
    keys = str(caught.value).partition("--allow-change ")[2].split()
    assert key in keys
    told = compare(folder, now, keys)
    assert any(line.startswith(f"{key}: ") for line in told)


def test_a_table_is_allowed_by_its_name_and_flags_may_have_dashes(folder, digits):
    views = ViewOptions(blur=False, jitter=False)
    assert len(compare(folder, _about(digits, views=views), ["views"])) == 2
    assert len(compare(folder, _about(digits, batch_size=64), ["batch-size"])) == 2


def test_a_misspelt_key_is_not_taken_for_permission(folder, about):
    with pytest.raises(UserError, match="did you mean batch_size"):
        compare(folder, about, ["batch_sise"])


def test_other_versions_and_devices_are_told(folder, about):
    now = about | {"versions.jax": "0.99.0", "devices": "3 x cpu"}
    told = compare(folder, now, ())
    assert any("versions.jax" in line and "0.99.0 now" in line for line in told)
    assert any(line.startswith("devices: ") for line in told) and len(told) == 2


def test_other_data_under_the_same_name_are_refused(folder, about):
    now = about | {"data_sha256": "0" * 64}
    with pytest.raises(UserError, match="data_sha256: .{12} there, 000000000000 now"):
        compare(folder, now, ())
    assert compare(folder, now, ["data_sha256"])


def test_the_same_data_may_lie_elsewhere(folder, about):
    assert compare(folder, about | {"data": "folder:/other/disk"}, ()) == []


def test_a_run_without_a_checkpoint_is_known_by_its_file(folder, about):
    manifest.remove(folder / "checkpoints" / "20")
    now = about | {"versions.jax": "0.99.0", "data_sha256": "0" * 64}
    assert compare(folder, now, ()) == [], "nothing was computed with the others"
    for change in ({"seed": 1}, {"data": "folder:other"}):
        with pytest.raises(UserError, match=next(iter(change))):
            compare(folder, now | change, ())


def test_fewer_steps_than_were_done_are_refused(folder, digits):
    config = resolve(PretrainConfig(method=VICReg(), steps=10), digits)
    with pytest.raises(UserError, match="--steps: got 10, but .* has done 20"):
        compare(folder, describe_run(config, digits), ())


# ---------------------------------------------------------------- the data


def _images(folder, count=6, *, changed=None):
    rng = np.random.default_rng(0)
    for number in range(count):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        # Of several sizes, so that they are not decoded into memory.
        pixels = rng.integers(0, 256, (20 + number, 20, 3), np.uint8)
        if number == changed:
            pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(folder / str(number % 2) / f"{number}.png")
    return open_data(f"folder:{folder}").fingerprint()


def test_a_fingerprint_tells_images_by_contents_and_not_by_place(tmp_path):
    first = _images(tmp_path / "first", 60)
    assert _images(tmp_path / "second", 60) == first
    os.utime(tmp_path / "second" / "0" / "0.png", (0, 0))
    assert open_data(f"folder:{tmp_path / 'second'}").fingerprint() == first
    assert _images(tmp_path / "one pixel", 60, changed=0) != first
    (tmp_path / "first" / "0" / "0.png").rename(tmp_path / "first" / "0" / "x.png")
    assert open_data(f"folder:{tmp_path / 'first'}").fingerprint() != first
    (tmp_path / "second" / "0" / "0.png").rename(tmp_path / "second" / "1" / "0.png")
    assert open_data(f"folder:{tmp_path / 'second'}").fingerprint() != first


def test_a_fingerprint_of_arrays_is_over_all_of_them():
    images = np.zeros((1000, 4, 4, 1), np.uint8)
    labels = np.zeros(1000, np.int32)
    names = ["0", "1"]
    first = ArraySource(images, labels, class_names=names).fingerprint()
    copy = ArraySource(images.copy(), labels.copy(), class_names=names)
    assert copy.fingerprint() == first
    images[537, 3, 3] = 1
    assert ArraySource(images, labels, class_names=names).fingerprint() != first
    images[537, 3, 3] = 0
    labels[1] = 1
    assert ArraySource(images, labels, class_names=names).fingerprint() != first


# ---------------------------------------------------------------- metrics.jsonl


def test_each_step_is_written_once_after_any_number_of_kills(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first in (1, 1, 4, 4, 3, 6):  # what each start resumes behind
        file = MetricsFile(path, first)
        for step in range(first, first + 4):
            file.write({"step": step, "loss": 0.5})
        file.close()
        with path.open("ab") as cut:  # killed in the middle of a line
            cut.write(b'{"step": 9, "lo')
    file = MetricsFile(path, 10)
    file.close()
    assert [row["step"] for row in read_metrics(path)] == [*range(1, 10)]
    assert path.read_bytes().count(b"\n") == 9


def _strict(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_which_every_reader_of_json_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')  # of an earlier version
    file = MetricsFile(path, 2)
    row = {"step": 2, "loss": math.nan, "lr": -math.inf, "knn": np.float64(0.5)}
    file.write(row | {"collapse": ["inf"]})
    file.close()
    lines = path.read_text().splitlines()
    assert [_strict(line) for line in lines] == read_metrics(path)
    assert read_metrics(path)[0] == {"step": 1, "loss": None}
    null = {"loss": None, "lr": None}
    assert read_metrics(path)[1] == row | null | {"collapse": ["inf"]}
    write_json(tmp_path / "results.json", {"collapse": {"alpha_req": math.inf}})
    results = _strict((tmp_path / "results.json").read_text())
    assert results == {"collapse": {"alpha_req": None}}


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path):
    class Disk:
        """A file that takes four bytes at a time, as long as there is room."""

        name, room, held = "metrics.jsonl", 1000, b""

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = data[: min(4, self.room)]
            self.held += taken
            self.room -= len(taken)
            return len(taken)

        def close(self):
            pass

    said = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 1, said.append)
    file._file.close()
    file._file = disk = Disk()
    for step in range(1, 6):
        disk.room = {2: 6, 3: 0}.get(step, 1000)
        file.write({"step": step})
    file.close()
    rows = [json.loads(line) for line in disk.held.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert len(said) == 1 and "No space left" in said[0]
