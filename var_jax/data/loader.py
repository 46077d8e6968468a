"""Batches of a source for this process, by grain: shuffled and endless, or once in order.

A batch on the host is {"image": uint8 [b, H, W, 3], "label": int32 [b], "valid": float32 [b]} with
b = batch / number of processes, or has "tokens": int32 [b, L] in place of the images.  The training
iterator's position is a small piece of state that goes into the checkpoint.
"""

import grain
import jax

from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels


def _local_batch(batch: int) -> int:
    processes = jax.process_count()
    if batch % processes:
        raise ValueError(f"batch {batch} cannot be divided by {processes} processes")
    return batch // processes


def train_batches(
    source: Source, transform: ToPixels | None, batch: int, seed: int, threads: int = 16, workers: int = 0
) -> grain.DatasetIterator:
    """Endless batches, reshuffled every epoch over all processes, then sliced.

    Args:
      source: the data.
      transform: applied with a random generator that depends on the seed and the position alone; None
        where the items are tokens.
      batch: images of one batch over all processes.
      seed: of the order and the crops.
      threads: that read and decode ahead in this process (or in each worker).
      workers: processes that do so instead; needs parsed absl flags.

    Returns:
      An iterator with `get_state` and `set_state`.
    """
    if len(source) < batch:
        raise ValueError(f"data set {source.name} has {len(source)} images, fewer than one batch of {batch}")
    local = _local_batch(batch)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        dataset = dataset.random_map(transform)
    dataset = dataset[jax.process_index() :: jax.process_count()]
    dataset = read_ahead(dataset, local, threads).batch(local, drop_remainder=True)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def eval_batches(
    source: Source, transform: ToPixels | None, batch: int, threads: int = 16
) -> grain.DatasetIterator:
    """Every image once, in order, centre-cropped; the last batch is filled up with `valid` = 0."""
    local = _local_batch(batch)
    dataset = grain.MapDataset.source(source.pad_to_multiple(batch))
    dataset = dataset[jax.process_index() :: jax.process_count()]
    dataset = dataset if transform is None else dataset.map(transform)
    return iter(read_ahead(dataset, local, threads).batch(local))


def read_ahead(dataset: grain.MapDataset, batch: int, threads: int) -> grain.IterDataset:
    """Threads keep two batches ready, image by image: by batches, each thread would fill one of its own."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch))
