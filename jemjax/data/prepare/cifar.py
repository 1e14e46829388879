"""CIFAR-10 and CIFAR-100 as they are published: Python or binary batches."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pickletools import genops
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jemjax.data.prepare.tfds_writer import Example, RawSet, by_split
from jemjax.errors import DataError, printable


class _Cifar(NamedTuple):
    """One of the two sets, by the files of its archives."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: tuple[str, ...]  # of class names: one file, or a text file for each label
    # label feature: its key in a Python batch, its key in the Python meta file
    labels: dict[str, tuple[str, str]]


# Labels are in the order of their bytes in a binary record.
_PYTHON = {
    "cifar10": _Cifar(
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        meta=("batches.meta",),
        labels={"label": ("labels", "label_names")},
    ),
    "cifar100": _Cifar(
        train=("train",),
        test=("test",),
        meta=("meta",),
        labels={
            "coarse_label": ("coarse_labels", "coarse_label_names"),
            "label": ("fine_labels", "fine_label_names"),
        },
    ),
}
_BINARY_META = {
    "cifar10": ("batches.meta.txt",),
    "cifar100": ("coarse_label_names.txt", "fine_label_names.txt"),
}


def read_cifar_set(raw: Path, name: str) -> RawSet:
    """The set in a folder, or in one within it, of an unpacked archive."""
    folder, which, binary = _find_cifar(raw)
    if name in _PYTHON and name != which:
        raise DataError(f"{printable(folder)}: holds {which}, not {name}")
    files = _PYTHON[which]
    class_names = _read_cifar_names(folder, which, binary)
    arrays = {}
    for split, names in (("train", files.train), ("test", files.test)):
        read = _read_cifar_binary if binary else _read_cifar_python
        suffix = ".bin" if binary else ""
        parts = [read(folder / f"{n}{suffix}", files.labels) for n in names]
        images = np.concatenate([images for images, _ in parts])
        labels = np.concatenate([labels for _, labels in parts])
        for column, (key, known) in enumerate(class_names.items()):
            highest = int(labels[:, column].max(initial=0))
            if highest >= len(known):
                raise DataError(
                    f"{printable(folder)}: a {key} of {highest} in {split}, but"
                    f" only {len(known)} class names; the files are damaged or mixed"
                )
        arrays[split] = images, labels

    def examples(split: str) -> Iterator[Example]:
        for index, (image, label) in enumerate(zip(*arrays[split], strict=True)):
            yield {
                "id": f"{split}_{index:05d}",
                "image": Image.fromarray(image),
                **dict(zip(class_names, map(int, label), strict=True)),
            }

    return RawSet(
        image_shape=(32, 32, 3),
        class_names=class_names,
        has_ids=True,
        sizes={split: len(labels) for split, (_, labels) in arrays.items()},
        examples=by_split(examples, arrays),
    )


def _find_cifar(raw: Path) -> tuple[Path, str, bool]:
    """The folder of the batches (`raw` or one in it), which set, whether binary."""
    for folder in (raw, *sorted(path for path in raw.iterdir() if path.is_dir())):
        for which, files in _PYTHON.items():
            if (folder / f"{files.test[0]}.bin").is_file():
                return folder, which, True
            if (folder / files.test[0]).is_file():
                return folder, which, False
    raise DataError(
        f"{printable(raw)}: no CIFAR files, expected test_batch (CIFAR-10) or"
        " test (CIFAR-100), with or without .bin; unpack the archive first"
    )


def _read_cifar_names(
    folder: Path, which: str, binary: bool
) -> dict[str, tuple[str, ...]]:
    labels = _PYTHON[which].labels
    if binary:
        lists = [
            _read_file(folder / file).decode("utf-8", "replace").split("\n")
            for file in _BINARY_META[which]
        ]
    else:
        path = folder / _PYTHON[which].meta[0]
        meta = _read_python(_read_file(path), printable(path))
        lists = [meta.get(meta_key, []) for _, meta_key in labels.values()]
    names = [tuple(filter(None, map(_text, names))) for names in lists]
    return dict(zip(labels, names, strict=True))


def _read_cifar_binary(
    path: Path, labels: dict[str, tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Records of the labels, a byte each, and 3072 bytes of planes."""
    values = np.frombuffer(_read_file(path), np.uint8)
    record = len(labels) + 3072
    if not len(values) or len(values) % record:
        raise DataError(
            f"{printable(path)}: is damaged: {len(values):,} bytes are no multiple"
            f" of a record's {record:,}; fetch it again"
        )
    records = values.reshape(-1, record)
    return _planes_to_images(records[:, len(labels) :]), records[:, : len(labels)]


def _read_cifar_python(
    path: Path, labels: dict[str, tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    where = printable(path)
    batch = _read_python(_read_file(path), where)
    try:
        planes = batch["data"].values()
        columns = [np.asarray(batch[key], np.uint8) for key, _ in labels.values()]
        stacked = np.stack(columns, axis=1)
        if planes.shape != (len(stacked), 3072):
            raise ValueError(f"{planes.shape} values of {len(stacked)} labels")
    except (AttributeError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: is no CIFAR batch ({error})") from error
    return _planes_to_images(planes), stacked


def _planes_to_images(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{printable(path)}: cannot be read ({error.strerror}), expected a"
            " file of the official archive; unpack it again"
        ) from error


def _text(value: Any) -> str:
    return (
        value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    ).strip()


def _read_python(data: bytes, where: str) -> dict[str, Any]:
    """A file of CIFAR's Python archives, without letting it run anything.

    Such a file is a program for a machine that builds objects by calling functions
    which it names. Here its instructions are only read: dictionaries, lists and
    numbers are made of them, what stands for an array of bytes is kept, and any other
    name is refused.
    """
    try:
        return {_text(key): value for key, value in _build(data).items()}
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{where}: is no file of CIFAR's Python archive"
            f" ({printable(str(error))[:200]}); fetch it again"
        ) from error


class _Name(NamedTuple):
    """A function that a file names."""

    module: str
    name: str


class _Array:
    """Stands for a numpy array."""

    type: Any = None
    shape: Any = None
    fortran: Any = None
    data: Any = None

    def values(self) -> np.ndarray:
        if self.type not in ("u1", "|u1"):
            raise ValueError(f"values of type {self.type}, not bytes")
        data = self.data
        if isinstance(data, str):  # Python 2's bytes
            data = data.encode("latin-1")
        order = "F" if self.fortran else "C"
        return np.frombuffer(data, np.uint8).reshape(self.shape, order=order)


# Instructions whose argument is a value.
_VALUES = set(
    "INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING"
    " SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES"
    " BINBYTES8".split()
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


def _build(data: bytes) -> Any:
    """What the instructions build, of values and stand-ins only."""
    stack: list[Any] = []
    marks: list[int] = []
    memory: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    instructions: Iterator[tuple[Any, Any, Any]] = genops(data)
    for instruction, argument, _ in instructions:
        name = instruction.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memory[len(memory) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memory[argument])
        elif name in ("LIST", "TUPLE", "DICT"):
            items = since_mark()
            pairs = zip(items[::2], items[1::2], strict=False)
            made = {"LIST": list, "TUPLE": tuple, "DICT": dict}[name]
            stack.append(made(pairs if name == "DICT" else items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Name(*stack[-2:])]
        elif name == "REDUCE":
            stack[-2:] = [_stand_in(*stack[-2:])]
        elif name == "BUILD":
            state = stack.pop()
            array = stack[-1]
            if isinstance(array, _Array):
                _, array.shape, array.type, array.fortran, array.data = state
            # Else of a numpy type: byte order and fields, which bytes do not have.
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"it asks for {name}")


def _stand_in(function: _Name, arguments: tuple[Any, ...]) -> Any:
    name = f"{function.module}.{function.name}"
    if re.fullmatch(r"numpy\._?core\.multiarray\._reconstruct", name):
        return _Array()
    if name == "numpy.dtype":
        return _text(arguments[0])
    if name == "_codecs.encode":  # how Python 3 writes bytes for Python 2
        return arguments[0].encode("latin-1")
    raise ValueError(f"it asks for {name}")
