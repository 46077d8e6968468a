"""Training and evaluation batches of a source, loaded with grain.

A batch on the host is {"image": uint8 [b, H, W, 3], "label": int32 [b], "valid": float32 [b]}, or has
"tokens": int32 [b, L] instead of "image"; b is the number of rows that this process loads.  With captions or
embeddings, it has "condition", too: int32 [b, T] or float32 [b, T, D] (`var_jax.conditions`).  Row r of the
training batch of step s (from 0) is item s * batch + r of one endless shuffled sequence, and its random
augmentation depends only on the seed and that position.  So training can resume at any step, with any number
of processes, on exactly the same batches.
"""

import sys
from collections.abc import Callable
from functools import partial

import grain
import numpy as np
from jax.sharding import Sharding

from var_jax.data.sources import Source
from var_jax.data.token_cache import TokenSource
from var_jax.data.transforms import ToPixels

TOKEN_THREADS = 2  # each reads a batch


def local_rows(sharding: Sharding, batch: int) -> np.ndarray:
    """Return the rows of a global batch on the devices of this process: int64 [b], ascending."""
    parts = [
        np.arange(batch)[index[0]] for index in sharding.addressable_devices_indices_map((batch,)).values()
    ]
    return np.unique(np.concatenate(parts))


def train_batches(
    source: Source,
    transform: ToPixels | None,
    batch: int,
    seed: int,
    threads: int = 16,
    workers: int = 0,
    start: int = 0,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator:
    """Return an iterator over endless training batches, globally reshuffled every epoch.

    Args:
      source: the data.
      transform: applied with a random generator that depends only on the seed and the position; None if
        the items are tokens.
      batch: global batch size, over all processes.
      seed: of the order and the crops.
      threads: number of threads that read and decode images ahead, in this process or in each worker; tokens
        need TOKEN_THREADS.
      workers: number of worker processes; 0 reads in this process.  Workers need parsed absl flags.
      start: step of the first batch, from 0.
      rows: rows of the global batch that this process loads, int [b]; all by default.

    Raises:
      ValueError: if there are fewer images than one batch.
    """
    if len(source) < batch:
        raise ValueError(f"data set {source.name} has {len(source)} images, fewer than one batch of {batch}")
    rows = np.arange(batch) if rows is None else rows
    if transform is None:
        order = _shuffled(grain.MapDataset.range(len(source)), seed)
        return _token_batches(source, lambda row: order[row], batch, rows, sys.maxsize // batch, start)
    dataset = _shuffled(grain.MapDataset.source(source), seed).random_map(transform)
    position = partial(_position, batch=batch, rows=rows, start=start, workers=max(workers, 1))
    dataset = _reordered(dataset, position, sys.maxsize)
    dataset = read_ahead(dataset, len(rows), threads).batch(len(rows), drop_remainder=True)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def batch_indices(num: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the indices of the records, of `num`, in the global training batch of a step: int64 [batch]."""
    order = _shuffled(grain.MapDataset.range(num), seed)
    return np.array([order[i] for i in range(step * batch, (step + 1) * batch)])


def eval_batches(
    source: Source, transform: ToPixels | None, batch: int, threads: int = 16, rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Return an iterator over every image once, in order, center-cropped.

    The last batch is padded with rows of `valid` = 0.  Arguments as for `train_batches`.
    """
    rows = np.arange(batch) if rows is None else rows
    source = source.pad_to_multiple(batch)
    if transform is None:
        return _token_batches(source, int, batch, rows, len(source) // batch)
    dataset = grain.MapDataset.source(source).map(transform)
    position = partial(_position, batch=batch, rows=rows)
    dataset = _reordered(dataset, position, len(source) // batch * len(rows))
    return iter(read_ahead(dataset, len(rows), threads).batch(len(rows)))


def _token_batches(
    source: TokenSource,
    index: Callable[[int], int],
    batch: int,
    rows: np.ndarray,
    num_batches: int,
    start: int = 0,
) -> grain.DatasetIterator:
    """Read whole batches of tokens: one by one, a busy node's GPUs would wait for 300 us of Python an item.

    Args:
      source: the tokens.
      index: of the record at a position in the sequence that the batches divide.
      batch: global batch size.
      rows: rows of the global batch that this process loads.
      num_batches: number of batches.
      start: number of the first batch.
    """

    def read(i: int) -> dict:
        return source.batch([index((start + i) * batch + int(row)) for row in rows])

    options = grain.ReadOptions(num_threads=TOKEN_THREADS, prefetch_buffer_size=2 * TOKEN_THREADS)
    return iter(grain.MapDataset.range(num_batches).map(read).to_iter_dataset(options))


def read_ahead(dataset: grain.MapDataset, batch: int, threads: int) -> grain.IterDataset:
    """Prefetch two batches of items with threads.

    Prefetching is per item: if it were per batch, each thread would fill a batch of its own.
    """
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch))


def _shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Return the endless sequence that batches are taken from, reshuffled every epoch."""
    return dataset.seed(seed).shuffle().repeat()


def _reordered(dataset: grain.MapDataset, position, length: int) -> grain.MapDataset:
    """Return the items at position(0), position(1), ..., position(length - 1)."""
    return grain.MapDataset.range(length).map(lambda i: dataset[position(i)])


def _position(i: int, batch: int, rows: np.ndarray, start: int = 0, workers: int = 1) -> int:
    """Return the position in the shuffled sequence of the i-th item that this process reads.

    Grain assigns items to workers round-robin, and takes batches from the workers round-robin: worker w reads
    items i = w, w + workers, ... and makes batches w, w + workers, ... of them.
    """
    item, worker = divmod(i, workers)
    batch_of_worker, row = divmod(item, len(rows))
    return (start + batch_of_worker * workers + worker) * batch + int(rows[row])
