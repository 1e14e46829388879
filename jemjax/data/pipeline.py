"""The stream of training batches: a function of seed and step, and of nothing else."""

import functools
import operator
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jemjax.data.crops import Crop, gather_crops
from jemjax.data.sources import ArraySource, EncodedSource, Source
from jemjax.errors import DataError


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    crops: Sequence[Crop] = (),
) -> "Batches":
    """This host's part of every global batch, without end.

    Each epoch has an order of its own; a batch may hold the end of one and the start
    of the next. With b = batch_size / process_count, host h gets rows [h b, (h + 1) b)
    of every global batch, whatever the number of hosts and workers.

    Args:
        source: the examples.
        batch_size: examples of the global batch, at most len(source).
        seed: of the order, in [0, 2^32).
        step: how many batches have gone before; the stream goes on exactly there.
        process_index: this host.
        process_count: how many hosts there are.
        workers: processes that decode images; 0 decodes in threads. Images in memory
            need none, and have none.
        crops: of the full images of an `EncodedSource`, which take the place of the
            images. What is drawn for them depends on the seed, the row's number since
            step 0 and the crop's number only.

    Returns:
        An iterator of {"image": (b, H, W, C) uint8, "label": (b,) int32}; with crops of
        {"views": a tuple of (b, size, size, C) uint8, "label": (b,) int32}.

    Raises:
        ValueError: for numbers out of range, or crops of a source that is in memory.
        DataError: if the source is smaller than a batch, or, while iterating, if an
            image cannot be read.
    """
    _check(
        len(source),
        batch_size=batch_size,
        seed=seed,
        step=step,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
    )
    gather = functools.partial(_gather_images, source)
    if crops:
        if not isinstance(source, EncodedSource):
            raise ValueError(f"crops: got a source {source.name}, expected image files")
        gather = functools.partial(gather_crops, source, tuple(crops), seed)
    import grain  # it brings jax, which this package does not

    # Grain shuffles and slices indices; images are then gathered a batch at a time,
    # which for images in memory is one NumPy index instead of a call for each.
    dataset: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch_size // process_count, drop_remainder=True)
    # Before they are dealt out to the hosts, parts are numbered in the whole stream.
    dataset = dataset.map_with_index(gather)
    dataset = dataset[process_index::process_count][step:]
    # Batches wait in memory, so no more of them than threads that make them.
    threads = 1 if workers else min(16, max(2, os.cpu_count() or 1))
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers and not isinstance(source, ArraySource):
        _mark_flags_as_parsed()
        # Whole batches are dealt out to the workers and taken back in turn, so their
        # number changes nothing.
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(iter(dataset))


def _gather_images(
    source: Source, number: int, indices: np.ndarray
) -> dict[str, np.ndarray]:
    return source.gather(indices)


class Batches(Iterator[dict[str, Any]]):
    """Batches as plain arrays.

    Their workers end when it is closed or dropped, or Python exits.
    """

    def __init__(self, iterator: Any):
        self._iterators = [iterator]
        self.close = weakref.finalize(self, _close, self._iterators)

    def __next__(self) -> dict[str, Any]:
        return {name: _plain(part) for name, part in next(self._iterators[0]).items()}


def _plain(part: Any) -> Any:
    """Arrays of their own: a worker's lie in shared memory that goes with them."""
    if isinstance(part, tuple):
        return tuple(map(_plain, part))
    return part if type(part) is np.ndarray else np.array(part, subok=False)


def _close(iterators: list[Any]) -> None:
    """Closes Grain's iterator and lets go of it while Python can still clean up."""
    while iterators:
        iterators.pop().close()


def _mark_flags_as_parsed() -> None:
    """Grain's workers read absl's flags, which outside of absl.app nobody parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check(
    examples: int,
    *,
    batch_size: int,
    seed: int,
    step: int,
    process_index: int,
    process_count: int,
    workers: int,
) -> None:
    ranges = {  # name: value, first allowed, first not allowed
        "batch_size": (batch_size, 1, None),
        "seed": (seed, 0, 2**32),
        "step": (step, 0, None),
        "process_count": (process_count, 1, None),
        "process_index": (process_index, 0, process_count),
        "workers": (workers, 0, None),
    }
    for name, (value, first, end) in ranges.items():
        value = operator.index(value)
        if value < first or (end is not None and value >= end):
            expected = f"in [{first}, {end})" if end else f"at least {first}"
            raise ValueError(f"{name}: got {value}, expected {expected}")
    if batch_size > examples:
        raise DataError(
            f"a batch of {batch_size} but only {examples} images: use --batch-size"
            f" {examples} or less"
        )
    if batch_size % process_count:
        raise DataError(
            f"a batch of {batch_size} on {process_count} hosts: use a --batch-size"
            f" that is a multiple of {process_count}"
        )
