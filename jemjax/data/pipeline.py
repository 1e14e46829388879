"""The stream of training batches: a function of seed and step, and of nothing else."""

import contextlib
import faulthandler
import functools
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jemjax.data import images
from jemjax.data.crops import Crop, gather_crops
from jemjax.data.sources import ArraySource, EncodedSource, Source
from jemjax.data.workers import (
    mark_flags_as_parsed,
    signals_wait,
    start_worker,
    workers_of,
)
from jemjax.errors import DataError

# Seconds after which a batch that does not come is given up.
TIMEOUT = 600.0


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
    timeout: float = TIMEOUT,
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
        timeout: seconds after which a batch that does not come is given up.

    Returns:
        An iterator of {"image": (b, H, W, C) uint8, "label": (b,) int32, "index": (b,)
        int64 numbers of the examples in the source}; with crops "views", a tuple of
        (b, size, size, C) uint8, take the place of "image".

    Raises:
        ValueError: for numbers out of range, or crops of a source that is in memory.
        DataError: if the source is smaller than a batch, or, while iterating, if an
            image cannot be read, or a worker ends or hangs.
    """
    _check(
        len(source),
        batch_size=batch_size,
        seed=seed,
        step=step,
        process_index=process_index,
        process_count=process_count,
        workers=workers,
        timeout=timeout,
    )
    if crops and not isinstance(source, EncodedSource):
        raise ValueError(f"crops: got a source {source.name}, expected image files")
    gather: Any = functools.partial(_gather, source, tuple(crops), seed)
    if isinstance(source, ArraySource):
        workers = 0
    elif workers and isinstance(source, EncodedSource):
        gather = functools.partial(_gather_and_tell, source, gather)
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
    if not workers:
        return Batches(iter(dataset), source, timeout)
    mark_flags_as_parsed()
    notes = Path(tempfile.mkdtemp(prefix="jemjax-workers-"))
    # Whole batches are dealt out to the workers and taken back in turn, so their
    # number changes nothing.
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers),
        worker_init_fn=functools.partial(start_worker, notes),
    )
    with signals_wait():
        iterator = iter(dataset)
    return Batches(iterator, source, timeout, notes)


def _gather(
    source: Any, crops: tuple[Crop, ...], seed: int, number: int, indices: np.ndarray
) -> dict[str, Any]:
    if crops:
        batch = gather_crops(source, crops, seed, number, indices)
    else:
        batch = source.gather(indices)
    return {**batch, "index": indices}


def _gather_and_tell(
    source: EncodedSource, gather: Callable[..., Any], number: int, indices: np.ndarray
) -> dict[str, Any]:
    """In a worker: a batch, and what was found unreadable since the last one."""
    before = len(source.unreadable)
    batch = gather(number, indices)
    found = list(source.unreadable.items())[before:]
    return {**batch, "unreadable": tuple(found)}


class Batches(Iterator[dict[str, Any]]):
    """Batches as plain arrays.

    A thread of its own asks for them, so that one that does not come can be given up.
    It and the workers end when this is closed or dropped, or Python exits.
    """

    def __init__(
        self, iterator: Any, source: Source, timeout: float, notes: Path | None = None
    ):
        self._iterators = [iterator]
        self._source = source
        self._timeout = timeout
        self._notes = notes
        self._asked, self._requests = False, queue.SimpleQueue()
        self._answers = queue.SimpleQueue()
        threading.Thread(
            target=_serve,
            args=(self._iterators, self._requests, self._answers),
            daemon=True,
        ).start()
        self.close = weakref.finalize(
            self, _close, self._iterators, self._requests, notes
        )

    def __next__(self) -> dict[str, Any]:
        if not self._iterators:
            raise ValueError(f"{self._source.name}: its batches are closed")
        if not self._asked:  # else a wait for this one was interrupted
            self._asked = True
            self._requests.put(True)
        try:
            batch, error = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            raise self._stalled() from None
        self._asked = False
        if isinstance(error, RuntimeError) and self._notes:
            raise self._ended(error) from error
        if error is not None:
            raise error
        for index, reason in batch.pop("unreadable", ()):
            assert isinstance(self._source, EncodedSource)
            self._source.note_unreadable(index, reason)
        return {name: _plain(part) for name, part in batch.items()}

    def _ended(self, error: RuntimeError) -> Exception:
        """What to say of an error of Grain's, most of which are of ended workers."""
        ended = [worker for worker in workers_of(self._notes) if not worker.alive]
        if not ended:
            return error
        worker = ended[0]
        return DataError(
            f"{self._source.name}: the process {worker.process} of --workers, which"
            f" loads images, has ended, {worker.doing}; was it killed for want of"
            " memory? Use fewer --workers, or a smaller --batch-size"
        )

    def _stalled(self) -> DataError:
        """Tells what is being done, and lets go of what does not answer."""
        if self._notes:
            workers = workers_of(self._notes)
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process, signal.SIGUSR1)  # it writes its stack
            time.sleep(0.5)
            doing = [f"process {w.process} {w.doing}" for w in workers]
            stacks = "\n".join(worker.stack for worker in workers)
            print(stacks, file=sys.stderr)
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-"):  # some may not have said a thing
                    child.kill()
        else:
            doing = [f"reading {where}" for where in images.now_reading.values()]
            faulthandler.dump_traceback(2)
            _ABANDONED.extend(self._iterators)  # closing it would wait for its threads
            self._iterators.clear()
        error = DataError(
            f"{self._source.name}: no batch for {self._timeout:g} seconds"
            f" ({'; '.join(doing) or 'no image is being read'}), see the stacks above;"
            " does the disk or the network answer? --load-timeout SECONDS waits longer"
        )
        error.hangs = True
        return error


# Iterators whose threads hang.
_ABANDONED: list[Any] = []


def _serve(
    iterators: list[Any],
    requests: "queue.SimpleQueue[bool]",
    answers: "queue.SimpleQueue[Any]",
) -> None:
    """Answers each request with a batch, or the error in place of it, until False."""
    with signals_wait():
        while requests.get():
            answers.put(_fetch(iterators))


def _fetch(iterators: list[Any]) -> tuple[Any, BaseException | None]:
    try:
        return next(iterators[0]), None
    except BaseException as error:
        return None, error


def _plain(part: Any) -> Any:
    """Arrays of their own: a worker's lie in shared memory that goes with them."""
    if isinstance(part, tuple):
        return tuple(map(_plain, part))
    return part if type(part) is np.ndarray else np.array(part, subok=False)


def _close(
    iterators: list[Any], requests: "queue.SimpleQueue[bool]", notes: Path | None
) -> None:
    """Closes Grain's iterator and lets go of it while Python can still clean up."""
    requests.put(False)
    while iterators:
        iterators.pop().close()
    if notes is not None:
        shutil.rmtree(notes, ignore_errors=True)


def _check(
    examples: int,
    *,
    batch_size: int,
    seed: int,
    step: int,
    process_index: int,
    process_count: int,
    workers: int,
    timeout: float,
) -> None:
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: got {timeout}, expected a positive number")
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
