import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jemjax.data import ArraySource, Crop, DataError, batches, open_data, pipeline

EXAMPLES = 23


def numbered(examples=EXAMPLES):
    """Images and labels that say which example they are of."""
    numbers = np.arange(examples)
    images = np.broadcast_to(numbers[:, None, None, None], (examples, 2, 3, 1))
    return ArraySource(images.astype(np.uint8), numbers)


def labels(count, **options):
    stream = batches(numbered(), **{"batch_size": 8, "seed": 3, **options})
    rows = [batch["label"] for batch in itertools.islice(stream, count)]
    stream.close()
    return np.array(rows)


def write_images(folder, examples):
    for i in range(examples):
        path = folder / "train" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2), i).save(path)
    (folder / "test").mkdir()
    Image.new("L", (3, 2)).save(folder / "test" / "x.png")
    return open_data(f"folder:{folder}")


def test_batches_hold_images_with_their_labels():
    batch = next(batches(numbered(), batch_size=8, seed=0))
    assert batch["image"].shape == (8, 2, 3, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    np.testing.assert_array_equal(batch["index"], batch["label"])


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    epochs = labels(EXAMPLES * 2).ravel().reshape(-1, EXAMPLES)  # batches cross epochs
    for epoch in epochs:
        assert sorted(epoch) == list(range(EXAMPLES))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_another_seed_is_another_order():
    assert (labels(3, seed=3) == labels(3, seed=3)).all()
    assert (labels(3, seed=3) != labels(3, seed=4)).any()


@given(step=st.integers(0, 60), hosts=st.sampled_from([1, 2, 4, 8]))
def test_rows_are_a_function_of_seed_and_step_on_any_number_of_hosts(step, hosts):
    expected = labels(step + 3)[step:]
    parts = [
        labels(3, step=step, process_index=host, process_count=hosts)
        for host in range(hosts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


def test_a_step_far_ahead_is_reached_at_once():
    assert labels(1, step=10**9).shape == (1, 8)


def test_image_files_give_the_stream_of_images_in_memory(tmp_path):
    source = write_images(tmp_path, EXAMPLES)
    stream = batches(source, batch_size=8, seed=3, step=2)
    for expected in labels(4, step=2):
        np.testing.assert_array_equal(next(stream)["image"][:, 0, 0, 0], expected)
    stream.close()


CROPS = (Crop(6, (0.2, 1.0)), Crop(6, (0.2, 1.0)), Crop(3, (0.05, 0.2)))


@pytest.fixture(scope="module")
def several_sizes(tmp_path_factory):
    """A folder of noise, JPEG and PNG, of several sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    for i in range(EXAMPLES):
        pixels = rng.integers(0, 256, (*rng.integers(5, 60, 2), 3), np.uint8)
        path = folder / "train" / f"{i:03d}.{('jpg', 'png')[i % 2]}"
        Image.fromarray(pixels).save(path)
    (folder / "test").mkdir()
    Image.new("RGB", (3, 2)).save(folder / "test" / "x.png")
    return open_data(f"folder:{folder}")


def cropped(source, count, **options):
    """`count` batches: for each view (count, b, size, size, C), and labels."""
    options = {"batch_size": 8, "seed": 3, "crops": CROPS, **options}
    stream = batches(source, **options)
    made = list(itertools.islice(stream, count))
    stream.close()
    return [np.stack(view) for view in zip(*(b["views"] for b in made), strict=True)]


def test_crops_take_the_place_of_images(several_sizes):
    batch = next(batches(several_sizes, batch_size=8, seed=3, crops=CROPS))
    assert set(batch) == {"views", "label", "index"}
    assert [view.shape for view in batch["views"]] == [
        (8, crop.size, crop.size, 3) for crop in CROPS
    ]
    assert all(view.dtype == np.uint8 for view in batch["views"])
    assert batch["label"].dtype == np.int32
    again, other = cropped(several_sizes, 1), cropped(several_sizes, 1, seed=4)
    for view, same, different in zip(batch["views"], again, other, strict=True):
        np.testing.assert_array_equal(view, same[0])
        assert (view != different[0]).any()


@given(step=st.integers(0, 20), hosts=st.sampled_from([1, 2, 4, 8]))
def test_crops_are_a_function_of_seed_and_step_on_any_number_of_hosts(
    several_sizes, step, hosts
):
    whole = cropped(several_sizes, step + 2)
    parts = [
        cropped(several_sizes, 2, step=step, process_index=host, process_count=hosts)
        for host in range(hosts)
    ]
    for expected, *of_hosts in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(of_hosts, axis=1), expected[step:])


def test_each_epoch_crops_an_example_anew(several_sizes):
    stream = batches(several_sizes, batch_size=EXAMPLES, seed=3, crops=CROPS[:1])
    first, second = (next(stream)["views"][0] for _ in range(2))
    stream.close()
    seen = {crop.tobytes() for crop in first}
    again = sum(crop.tobytes() in seen for crop in second)
    assert again < EXAMPLES / 4  # the fallback boxes of long and narrow images


def test_crops_of_images_in_memory_are_refused():
    with pytest.raises(ValueError, match="crops: got a source arrays, expected"):
        batches(numbered(), batch_size=8, seed=0, crops=CROPS)


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_read():
    with pytest.raises(DataError) as error:
        batches(numbered(), batch_size=512, seed=0)
    text = "a batch of 512 but only 23 images: use --batch-size 23 or less"
    assert str(error.value) == text


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(DataError, match="batch of 8 on 3 hosts: .* multiple of 3"):
        batches(numbered(), batch_size=8, seed=0, process_count=3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("step", -1),
        ("process_count", 0),
        ("process_index", 1),
        ("workers", -1),
    ],
)
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: got {value}, expected"):
        batches(numbered(), **{"batch_size": 4, "seed": 0, argument: value})


def test_one_thread_asks_for_all_batches_and_a_wait_can_be_left(monkeypatch):
    def gather(*arguments):
        fetchers.add(threading.current_thread())
        return gathered(*arguments)

    fetchers, gathered = set(), pipeline._fetch
    monkeypatch.setattr(pipeline, "_fetch", gather)
    options = {"batch_size": 4, "seed": 0}
    expected = list(itertools.islice(batches(numbered(), **options), 6))
    assert len(fetchers) == 1 and threading.main_thread() not in fetchers
    stream = batches(numbered(), **options)
    given = [next(stream), next(stream)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "_answers", Interrupted())
        next(stream)
    given += itertools.islice(stream, 4)  # the batch that was not waited for is next
    for batch, same in zip(given, expected, strict=True):
        np.testing.assert_array_equal(batch["index"], same["index"])
    before = threading.active_count()
    stream.close()
    deadline = time.monotonic() + 120
    while threading.active_count() >= before:
        assert time.monotonic() < deadline, "its thread does not end"
    with pytest.raises(ValueError, match="closed"):
        next(stream)


class Interrupted:
    """Where an answer is waited for as Ctrl-C comes."""

    def get(self, timeout):
        raise KeyboardInterrupt


def test_an_unreadable_file_reaches_the_consumer_as_one_sentence(tmp_path):
    source = write_images(tmp_path, 8)
    (tmp_path / "train" / "005.png").write_text("text")
    stream = batches(source, batch_size=8, seed=0)
    with pytest.raises(DataError) as error:
        next(stream)
    assert "005.png: is a text file" in str(error.value)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)
    stream.close()


WORKERS = """
import sys
import numpy as np
from jemjax.data import Crop, DataError, batches, open_data

def streams_of(source, *crops):
    return [
        batches(source, batch_size=8, seed=3, step=5, workers=workers,
                process_index=1, process_count=2, crops=crops)
        for workers in (0, 2)
    ]

if __name__ == "__main__":
    source = open_data("folder:" + sys.argv[1])
    streams = streams_of(source)
    cropped = streams_of(source, Crop(4, (0.2, 1.0)), Crop(2, (0.2, 1.0)))
    for _ in range(6):
        threads, processes = (
            [next(images)["image"], *next(crops)["views"]]
            for images, crops in zip(streams, cropped)
        )
        for thread, process in zip(threads, processes, strict=True):
            assert type(process) is np.ndarray
            np.testing.assert_array_equal(thread, process)
    for path in sys.argv[2:]:
        open(path, "w").write("text")
    try:
        for _ in range(20):
            next(streams[1])
    except DataError as error:
        print("told:", error)
"""


def run_with_workers(folder, *spoiled):
    script = folder / "script.py"
    script.write_text(WORKERS)
    return subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, spoiled)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
def test_worker_processes_change_nothing_and_end_quietly(tmp_path):
    write_images(tmp_path, EXAMPLES)
    run = run_with_workers(tmp_path)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    assert "Traceback" not in run.stderr and "leaked" not in run.stderr


@pytest.mark.slow
def test_an_error_in_a_worker_process_reaches_the_consumer(tmp_path):
    write_images(tmp_path, EXAMPLES)
    files = sorted((tmp_path / "train").iterdir())
    run = run_with_workers(tmp_path, *files)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("told:") and "is a text file" in run.stdout
    assert "Traceback" not in run.stderr
