"""Batches of a source, by grain: shuffled and endless, or once in order.

A batch on the host is {"image": uint8 [b, H, W, 3], "label": int32 [b], "valid": float32 [b]}, or has
"tokens": int32 [b, L] in place of the images; b is the number of rows that this process feeds.  Row r of
the training batch of step s (from 0) is item s * batch + r of one endless shuffled sequence, and what chance
does to it depends on the seed and that position alone.  So training goes on at any step, with any number of
processes, on the very same batches.
"""

import sys
from functools import partial

import grain
import numpy as np
from jax.sharding import Sharding

from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels


def local_rows(sharding: Sharding, batch: int) -> np.ndarray:
    """int64 [b]: the rows of a global batch, ascending, that the devices of this process hold."""
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
    """Endless batches, reshuffled every epoch over all processes.

    Args:
      source: the data.
      transform: applied with a random generator that depends on the seed and the position alone; None
        where the items are tokens.
      batch: images of one batch over all processes.
      seed: of the order and the crops.
      threads: that read and decode ahead in this process (or in each worker).
      workers: processes that do so instead; needs parsed absl flags.
      start: step of the first batch, from 0.
      rows: of the global batch that this process feeds; by default all.
    """
    if len(source) < batch:
        raise ValueError(f"data set {source.name} has {len(source)} images, fewer than one batch of {batch}")
    rows = np.arange(batch) if rows is None else rows
    dataset = _shuffled(grain.MapDataset.source(source), seed)
    if transform is not None:
        dataset = dataset.random_map(transform)
    position = partial(_position, batch=batch, rows=rows, start=start, workers=max(workers, 1))
    dataset = _reordered(dataset, position, sys.maxsize)
    dataset = read_ahead(dataset, len(rows), threads).batch(len(rows), drop_remainder=True)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def batch_indices(num: int, batch: int, seed: int, step: int) -> np.ndarray:
    """int64 [batch]: which of `num` records make the global training batch of a step, from 0."""
    order = _shuffled(grain.MapDataset.range(num), seed)
    return np.array([order[i] for i in range(step * batch, (step + 1) * batch)])


def eval_batches(
    source: Source, transform: ToPixels | None, batch: int, threads: int = 16, rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Every image once, in order, centre-cropped; the last batch is filled up with `valid` = 0."""
    rows = np.arange(batch) if rows is None else rows
    source = source.pad_to_multiple(batch)
    dataset = grain.MapDataset.source(source)
    dataset = dataset if transform is None else dataset.map(transform)
    position = partial(_position, batch=batch, rows=rows)
    dataset = _reordered(dataset, position, len(source) // batch * len(rows))
    return iter(read_ahead(dataset, len(rows), threads).batch(len(rows)))


def read_ahead(dataset: grain.MapDataset, batch: int, threads: int) -> grain.IterDataset:
    """Threads keep two batches ready, image by image: by batches, each thread would fill one of its own."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch))


def _shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    """The endless sequence that batches are cut from, in another order every epoch."""
    return dataset.seed(seed).shuffle().repeat()


def _reordered(dataset: grain.MapDataset, position, length: int) -> grain.MapDataset:
    """The items at position(0), position(1), ..."""
    return grain.MapDataset.range(length).map(lambda i: dataset[position(i)])


def _position(i: int, batch: int, rows: np.ndarray, start: int = 0, workers: int = 1) -> int:
    """Where in the sequence the i-th item that this process reads stands.

    Grain deals items out to workers in turn, and takes whole batches from them in turn: worker w reads
    i = w, w + workers, ... and makes batches w, w + workers, ... of them.
    """
    count, worker = divmod(i, workers)
    turn, row = divmod(count, len(rows))
    return (start + turn * workers + worker) * batch + int(rows[row])
