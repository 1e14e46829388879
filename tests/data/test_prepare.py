import gzip
import logging
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jemjax.data import Crop, DataError, batches, load_arrays, open_data
from jemjax.data.prepare import prepare
from jemjax.data.prepare.cifar import _read_cifar_python

tfds = pytest.importorskip("tensorflow_datasets")
RANDOM = np.random.default_rng(0)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + (
        array.tobytes()
    )


def write_idx(folder, train=30, test=7, pack=True):
    """The four files; returns {split: (images, labels)}."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(data) if pack else data)
        arrays[split] = images, labels
    return arrays


def same_set(source, images, labels):
    """Prepared sets are in another order: compares them as sets of pairs."""
    got_images, got_labels = load_arrays(source)
    got = {(i.tobytes(), int(n)) for i, n in zip(got_images, got_labels, strict=True)}
    return got == {(i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True)}


# ------------------------------------------------------------------ idx


@pytest.mark.parametrize("pack", [True, False])
def test_fashion_mnist_is_read_under_its_official_name(tmp_path, pack):
    arrays = write_idx(tmp_path / "raw", pack=pack)
    out = tmp_path / "sets"
    calls = []
    path = prepare(
        "idx",
        tmp_path / "raw",
        name="fashion_mnist",
        out=out,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert path == out / "fashion_mnist" / "3.0.1"
    assert calls[-1] == (37, 37) and len(calls) == 37
    official = tfds.data_source("fashion_mnist", split="train", data_dir=out)
    assert official.dataset_info.full_name == "fashion_mnist/3.0.1"
    registered = tfds.builder_cls("fashion_mnist")
    assert str(registered.VERSION) == "3.0.1"
    features = registered(data_dir=tmp_path / "empty").info.features
    assert official.dataset_info.features["label"].names == features["label"].names
    assert official[0]["image"].shape == features["image"].shape == (28, 28, 1)
    for split, (images, labels) in arrays.items():
        source = open_data("tfds:fashion_mnist", split=split, data_dir=out)
        assert source.image_shape == (28, 28, 1)
        assert source.class_names[9] == "Ankle boot"
        assert same_set(source, images, labels)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]["image"], source[3]["image"])
    small = open_data("tfds:fashion_mnist", data_dir=out, image_size=14)
    assert small[0]["image"].shape == (14, 14, 1)
    batch = small.gather(np.array([3, 0]))
    np.testing.assert_array_equal(batch["image"][1], small[0]["image"])
    np.testing.assert_array_equal(batch["label"][0], small[3]["label"])


def test_versions_are_the_registered_ones():
    from jemjax.data.prepare import OFFICIAL_VERSIONS

    for name, version in OFFICIAL_VERSIONS.items():
        assert str(tfds.builder_cls(name).VERSION) == version


def test_preparing_brings_neither_tensorflow_nor_jax_nor_the_network(tmp_path):
    write_idx(tmp_path / "raw")
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from jemjax.data import open_data\n"
        "from jemjax.data.prepare import prepare\n"
        "prepare('idx', sys.argv[1] + '/raw', name='mnist', out=sys.argv[1])\n"
        "open_data('tfds:mnist', data_dir=sys.argv[1])[0]\n"
        "print([m for m in ('jax', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_a_prepared_set_is_left_as_it_is(tmp_path, caplog):
    write_idx(tmp_path / "raw")
    path = prepare("idx", tmp_path / "raw", name="mnist", out=tmp_path)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    with caplog.at_level(logging.WARNING):
        assert prepare("idx", tmp_path / "raw", name="mnist", out=tmp_path) == path
    assert "mnist 3.0.1 is prepared already in" in caplog.text
    assert before == {file: file.stat().st_mtime_ns for file in path.iterdir()}


def test_other_idx_sets_have_their_size_and_numbered_classes(tmp_path):
    write_idx(tmp_path / "raw")
    path = prepare("idx", tmp_path / "raw", name="kuzushiji", out=tmp_path)
    assert path.name == "1.0.0"
    source = open_data("tfds:kuzushiji", data_dir=tmp_path)
    assert source.class_names == tuple("0123456789")


def spoil(name, change):
    def apply(folder):
        path = folder / name
        data = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(change(data)))

    return apply


def cut_packed(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:2000])


def swap(folder):
    images, labels = (
        folder / f"train-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1")
    )
    content = images.read_bytes()
    images.write_bytes(labels.read_bytes())
    labels.write_bytes(content)


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, "train-images.*: starts with 00 00 08 01, expected 00 00 08 03"),
        (spoil(TRAIN_IMAGES, lambda d: d[:-1]), "its header says 23,520 bytes of val"),
        (spoil(TRAIN_IMAGES, lambda d: d + b"x"), "it has more"),
        (spoil(TRAIN_IMAGES, lambda d: b""), "starts with nothing"),
        (spoil(TRAIN_LABELS, lambda d: idx(np.zeros(29, np.uint8))), "30 images but"),
        (spoil(TRAIN_LABELS, lambda d: d[:-1] + b"\x0a"), "labels go up to 10"),
        (
            spoil(TRAIN_IMAGES, lambda d: d[:4] + b"\xff" * 12 + d[16:]),
            r"its header says [\d,]+ bytes of values, more than the 4,294,967,296",
        ),
        (cut_packed, "train-images.*: cannot be read"),
        (lambda f: (f / TRAIN_LABELS).write_bytes(b"text"), "cannot be read"),
        (lambda f: (f / TRAIN_LABELS).unlink(), "expected one file of train labels"),
    ],
)
def test_damaged_idx_files_are_named_and_nothing_is_written(tmp_path, damage, message):
    write_idx(tmp_path / "raw")
    damage(tmp_path / "raw")
    with pytest.raises(DataError, match=message):
        prepare("idx", tmp_path / "raw", name="mnist", out=tmp_path / "out")
    assert not (tmp_path / "out" / "mnist").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("zip", {}, "kind: got 'zip'"),
        ("idx", {"name": "My-Set"}, "name: got 'My-Set'"),
        ("idx", {"version": "1"}, "version: got '1'"),
        ("idx", {}, "no folder .*raw of raw files"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, kind, options, message):
    with pytest.raises(DataError, match=message):
        prepare(kind, tmp_path / "raw", **{"name": "mnist", "out": tmp_path, **options})


# ------------------------------------------------------------------ CIFAR

NAMES = [f"class {i}" for i in range(10)]
COARSE = [f"coarse {i}" for i in range(20)]
FINE = [f"fine {i}" for i in range(100)]


def cifar_parts(name):
    if name == "cifar10":
        return [*((f"data_batch_{i}", 4) for i in range(1, 6)), ("test_batch", 3)]
    return [("train", 20), ("test", 3)]


def as_python2(value):
    """What Python 2 called str, so that the pickle is of its kind."""
    if isinstance(value, dict):
        return {key.encode(): as_python2(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [item.encode() for item in value]
    return value


def write_cifar(folder, name, form):
    """Either archive; returns {split: (images, labels)}."""
    folder.mkdir(parents=True)
    fine = "labels" if name == "cifar10" else "fine_labels"
    splits = {"train": ([], []), "test": ([], [])}
    for file, count in cifar_parts(name):
        planes = RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = RANDOM.integers(0, 10 if name == "cifar10" else 100, count)
        coarse = labels // 5
        if form == "binary":
            columns = [labels] if name == "cifar10" else [coarse, labels]
            head = np.stack(columns, 1).astype(np.uint8)
            (folder / f"{file}.bin").write_bytes(np.hstack([head, planes]).tobytes())
        else:
            batch = {"data": planes, fine: labels.tolist(), "filenames": ["x"] * count}
            if name == "cifar100":
                batch["coarse_labels"] = coarse.tolist()
            write_pickle(folder / file, batch)
        images, all_labels = splits["test" if "test" in file else "train"]
        images.extend(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        all_labels.extend(labels)
    if form == "binary" and name == "cifar10":
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    elif form == "binary":
        (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
        (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    elif name == "cifar10":
        write_pickle(folder / "batches.meta", {"label_names": NAMES})
    else:
        meta = {"fine_label_names": FINE, "coarse_label_names": COARSE}
        write_pickle(folder / "meta", meta)
    return splits


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(as_python2(value), protocol=2))


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_under_its_official_name(tmp_path, name, form):
    splits = write_cifar(tmp_path / "raw" / "unpacked", name, form)
    prepare("cifar", tmp_path / "raw", name=name, out=tmp_path)
    official = tfds.data_source(name, split="test", data_dir=tmp_path)
    features = tfds.builder_cls(name)(data_dir=tmp_path / "empty").info.features
    assert set(official[0]) == set(features)
    assert {record["id"] for record in official} == {
        b"test_00000",
        b"test_00001",
        b"test_00002",
    }
    for split, (images, labels) in splits.items():
        source = open_data(f"tfds:{name}", split=split, data_dir=tmp_path)
        assert source.image_shape == (32, 32, 3)
        assert source.class_names == tuple(NAMES if name == "cifar10" else FINE)
        assert same_set(source, images, labels)
    if name == "cifar100":
        for record in official:
            assert record["coarse_label"] == record["label"] // 5


def python2_batch(planes, labels):
    """A batch as Python 2 and the NumPy of its time wrote it, byte by byte."""
    rows, columns = (int(n).to_bytes(2, "little") for n in planes.shape)
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(",
            *(b"K" + bytes([label]) for label in labels),
            b"eU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05",
            b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01",
            b"M" + rows + b"M" + columns + b"\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01",
            b"\x87Rq\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T",
            planes.nbytes.to_bytes(4, "little") + planes.tobytes() + b"tbu.",
        ]
    )


def fortran_batch(planes, labels):
    value = as_python2({"data": np.asfortranarray(planes), "labels": labels.tolist()})
    return pickle.dumps(value, protocol=2)


def batch_of_protocol(protocol):
    def dump(planes, labels):
        value = as_python2({"data": planes, "labels": labels.tolist()})
        return pickle.dumps(value, protocol=protocol)

    return dump


@pytest.mark.parametrize(
    "dump", [python2_batch, fortran_batch, *map(batch_of_protocol, range(5))]
)
def test_cifar_files_are_read_however_python_wrote_them(tmp_path, dump):
    planes = RANDOM.integers(0, 256, (300, 3072), dtype=np.uint8)
    labels = RANDOM.integers(0, 10, 300)
    (tmp_path / "batch").write_bytes(dump(planes, labels))
    if dump is python2_batch:
        assert pickle.loads(dump(planes, labels), encoding="bytes")[b"data"].any()
    keys = {"label": ("labels", "label_names")}
    images, columns = _read_cifar_python(tmp_path / "batch", keys)
    np.testing.assert_array_equal(images[7, :, :, 1].ravel(), planes[7, 1024:2048])
    np.testing.assert_array_equal(columns[:, 0], labels)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    write_cifar(tmp_path / "raw", "cifar10", "python")
    marker = tmp_path / "marker"
    (tmp_path / "raw" / "data_batch_2").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(DataError, match=r"data_batch_2: .*it asks for .*\.mkdir"):
        prepare("cifar", tmp_path / "raw", name="cifar10", out=tmp_path)
    assert not marker.exists()


def cifar_pickle(**changes):
    batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3], **changes}
    return pickle.dumps(as_python2(batch), protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no file of CIFAR's Python archive"),
        (b"text", "is no file of CIFAR's Python archive"),
        (cifar_pickle()[:-50], "is no file of CIFAR's Python archive"),
        (cifar_pickle(labels=[0, 1, 2]), "is no CIFAR batch"),
        (cifar_pickle(labels=[0, 1, 2, 300]), "is no CIFAR batch"),
        (cifar_pickle(data=np.zeros((4, 3072), np.float32)), "not bytes"),
        (cifar_pickle(data=[1, 2]), "is no CIFAR batch"),
        (cifar_pickle(labels=[0, 1, 2, 11]), "a label of 11 in train, but only 10"),
    ],
)
def test_damaged_cifar_pickles_are_named(tmp_path, content, message):
    write_cifar(tmp_path / "raw", "cifar10", "python")
    (tmp_path / "raw" / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare("cifar", tmp_path / "raw", name="cifar10", out=tmp_path)


def test_damaged_or_missing_cifar_files_are_named(tmp_path):
    raw = tmp_path / "raw"
    write_cifar(raw, "cifar10", "binary")
    with pytest.raises(DataError, match="holds cifar10, not cifar100"):
        prepare("cifar", raw, name="cifar100", out=tmp_path)
    path = raw / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="data_batch_3.bin: is damaged: 12,291 bytes"):
        prepare("cifar", raw, name="cifar10", out=tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="data_batch_3.bin: cannot be read"):
        prepare("cifar", raw, name="cifar10", out=tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no CIFAR files"):
        prepare("cifar", tmp_path / "nothing", name="cifar10", out=tmp_path)


# ------------------------------------------------------------------ folders


def write_folder(root, modes=("RGB",), kind="png"):
    for split, count in (("train", 4), ("test", 2)):
        for label in ("ant", "bee"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new(
                    "RGB", (8, 6), (40 * i, 5, 99 if label == "ant" else 7)
                )
                image.convert(modes[i % len(modes)]).save(folder / f"{i}.{kind}")


@pytest.mark.parametrize("modes", [("RGB",), ("L",), ("P", "RGBA", "L", "RGB")])
def test_a_folder_becomes_a_set_that_reads_like_it(tmp_path, modes):
    write_folder(tmp_path / "raw", modes)
    prepare("folder", tmp_path / "raw", name="insects", out=tmp_path)
    for split in ("train", "test"):
        folder = open_data(f"folder:{tmp_path / 'raw'}", split=split)
        source = open_data("tfds:insects", split=split, data_dir=tmp_path)
        assert source.class_names == folder.class_names == ("ant", "bee")
        assert source.image_shape == folder.image_shape and not source.sizes_differ
        assert same_set(source, *load_arrays(folder))
    by_tfds = tfds.data_source("insects", split="train", data_dir=tmp_path)
    assert {record["image"].shape for record in by_tfds} == {source.image_shape}


def test_a_flat_folder_becomes_an_unlabelled_set(tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(30):
        Image.new("RGB", (4 + i, 8), (i, i, i)).save(tmp_path / "raw" / f"{i}.jpg")
    prepare("folder", tmp_path / "raw", name="flat", out=tmp_path)
    source = open_data("tfds:flat", data_dir=tmp_path)
    assert source.num_classes == 0 and source[0]["label"] == -1
    assert source.image_shape == (256, 256, 3) and source.sizes_differ
    stream = batches(source, batch_size=8, seed=0, crops=[Crop(5, (0.2, 1.0))])
    assert next(stream)["views"][0].shape == (8, 5, 5, 3)
    stream.close()
    assert open_data("tfds:flat", data_dir=tmp_path, image_size=4)[0][
        "image"
    ].shape == (4, 4, 3)


def test_a_damaged_image_of_a_folder_is_named(tmp_path):
    write_folder(tmp_path / "raw", kind="jpg")
    noise = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    bad = tmp_path / "raw" / "train" / "bee" / "2.jpg"
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"bee/2\.jpg: starts as a JPEG"):
        prepare("folder", tmp_path / "raw", name="insects", out=tmp_path / "out")
    with pytest.raises(DataError, match="not prepared"):
        open_data("tfds:insects", data_dir=tmp_path / "out")


# ------------------------------------------------------------------ opening sets


def test_what_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(DataError) as error:
        open_data("tfds:cifar10", data_dir=tmp_path)
    assert "jemjax data prepare" in str(error.value)
    assert "--name cifar10" in str(error.value) and str(tmp_path) in str(error.value)


def test_names_versions_and_splits_of_prepared_sets(tmp_path):
    write_idx(tmp_path / "raw")
    for version in ("1.9.0", "1.10.0"):
        prepare("idx", tmp_path / "raw", name="mine", out=tmp_path, version=version)
    newest = open_data("tfds:mine", data_dir=tmp_path)
    assert newest.records.dataset_info.full_name == "mine/1.10.0"
    older = open_data("tfds:mine:1.9.0", data_dir=tmp_path)
    assert older.records.dataset_info.full_name == "mine/1.9.0"
    with pytest.raises(DataError, match="version 2.0.0 is not .*only 1.9.0, 1.10.0"):
        open_data("tfds:mine:2.0.0", data_dir=tmp_path)
    with pytest.raises(DataError, match="did you mean tfds:mine?"):
        open_data("tfds:mime", data_dir=tmp_path)
    with pytest.raises(DataError, match="expected tfds:NAME"):
        open_data("tfds:../mine", data_dir=tmp_path)


def make_set(out, splits):
    """A set of 3 examples a split, with the given labels; None is no label feature."""
    labelled = all(label is not None for label in splits.values())

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "made"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 3))}
            if labelled:
                features["label"] = tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(n) for s, n in splits.items()}

        def _generate_examples(self, label):
            for i in range(3):
                example = {"image": Image.new("RGB", (4, 4))}
                yield i, example | ({"label": label} if labelled else {})

    Builder(data_dir=out, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize(
    ("splits", "test_label"),
    [
        ({"train": 0, "test": 1, "validation": 2}, 1),
        ({"train": 0, "test": -1, "validation": 2}, 2),  # labels withheld
        ({"train": 0, "validation": 2}, 2),
        ({"train": None, "test": None}, -1),
    ],
)
def test_the_test_part_is_the_labelled_split(tmp_path, splits, test_label):
    make_set(tmp_path, splits)
    source = open_data("tfds:made", split="test", data_dir=tmp_path)
    assert source[0]["label"] == test_label
    assert source.num_classes == (0 if test_label == -1 else 3)


def test_a_set_without_a_test_part_says_so(tmp_path):
    make_set(tmp_path, {"train": 0})
    with pytest.raises(DataError, match="no test or validation split, only train"):
        open_data("tfds:made", split="test", data_dir=tmp_path)


def test_d14_prepared_sets_have_fingerprints(tmp_path):
    write_folder(tmp_path / "raw")
    for out in ("one", "two"):
        prepare("folder", tmp_path / "raw", name="ants", out=tmp_path / out)
    one, two = (open_data("tfds:ants", data_dir=tmp_path / n) for n in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    test = open_data("tfds:ants", split="test", data_dir=tmp_path / "one")
    assert test.fingerprint() != one.fingerprint()
    Image.new("RGB", (8, 6)).save(tmp_path / "raw" / "train" / "ant" / "new.png")
    prepare("folder", tmp_path / "raw", name="ants", out=tmp_path / "three")
    three = open_data("tfds:ants", data_dir=tmp_path / "three")
    assert three.fingerprint() != one.fingerprint()


OFFLINE = """
import socket, sys, time

def refuse(*arguments, **keywords):
    raise AssertionError(f"the network was asked, or waited for: {arguments}")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from jemjax.data import DataError, open_data
time.sleep = refuse
for name in sys.argv[1:]:
    try:
        open_data("tfds:" + name, data_dir="nowhere")
    except DataError as error:
        print(error)
"""


def test_d11_d12_a_set_that_is_not_there_is_told_at_once_without_a_network(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, "fashion_mnist", "imagenet2012"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    mnist, imagenet = run.stdout.splitlines()
    assert "asked" not in run.stderr
    assert "jemjax data prepare KIND RAW --name fashion_mnist" in mnist
    assert "--data folder:PATH" in mnist
    assert "--manual_dir" in imagenet and "ILSVRC2012_img_train.tar" in imagenet
