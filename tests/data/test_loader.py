import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from var_jax.data.loader import batch_indices, eval_batches, local_rows, train_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import CorruptImage, ToPixels


@pytest.fixture
def source(digits_dir):
    return open_source("digits", "train", digits_dir)


@pytest.fixture
def transform():
    return ToPixels("digits", 8, 1.0, False)


def test_every_epoch_has_every_image_once_in_another_order(source, transform):
    batches = train_batches(source, transform, 721, seed=0)  # 1442 = 2 x 721
    first, second = ([next(batches) for _ in range(2)] for _ in range(2))
    rows = lambda epoch: np.concatenate([b["image"].reshape(len(b["image"]), -1) for b in epoch])
    a, b = rows(first), rows(second)
    assert (a != b).any()
    np.testing.assert_array_equal(np.unique(a, axis=0, return_counts=True)[1].sum(), 1442)
    np.testing.assert_array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_batch_is_a_function_of_seed_and_step_whatever_the_processes(source, processes):
    transform = ToPixels("digits", 8, 1.25, True, shift=1)  # all random augmentations
    batches = train_batches(source, transform, 100, seed=1)
    expected = [next(batches) for _ in range(16)]  # the second epoch begins within a batch
    parts = np.arange(100).reshape(processes, -1)
    shares = [train_batches(source, transform, 100, seed=1, start=12, rows=rows) for rows in parts]
    for step in range(12, 16):
        loaded = [next(share) for share in shares]
        for name in ("image", "label"):
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in loaded]), expected[step][name]
            )
        indices = batch_indices(len(source), 100, 1, step)
        assert [source[i]["label"] for i in indices] == expected[step]["label"].tolist()


def test_every_epoch_of_an_interrupted_run_has_every_image_once():
    steps = [*range(5), *range(5, 15)]  # interrupted at step 5 and resumed
    indices = np.concatenate([batch_indices(30, 4, 7, step) for step in steps])
    assert all(sorted(epoch) == list(range(30)) for epoch in indices.reshape(2, 30))
    assert (indices[:30] != indices[30:]).any()


@dataclasses.dataclass
class ProcessSharding:
    """Sharding of a process that has only some of the devices of the mesh."""

    sharding: NamedSharding
    devices: list

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.devices}


def test_the_rows_of_a_process_are_those_of_its_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    np.testing.assert_array_equal(local_rows(sharding, 12), np.arange(12))
    of_process = lambda devices: local_rows(ProcessSharding(sharding, list(devices.flat)), 12).tolist()
    assert of_process(mesh.devices[1]) == [6, 7, 8, 9, 10, 11]
    assert of_process(mesh.devices[:, 1]) == [3, 4, 5, 9, 10, 11]  # not contiguous
    assert of_process(mesh.devices[::-1, 0]) == [0, 1, 2, 6, 7, 8]  # ascending, whatever the order of devices
    assert of_process(mesh.devices[0, :, 1]) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # rows that are replicated on other devices too
    assert of_process(mesh.devices[1, 1, :1]) == [9, 10, 11]


def test_order_follows_the_seed(source, transform):
    labels = [next(train_batches(source, transform, 64, seed=s))["label"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()


def test_evaluation_counts_every_image_once(digits_dir, transform):
    source = open_source("digits", "test", digits_dir)
    batches = list(eval_batches(source, transform, 100))
    assert [len(b["label"]) for b in batches] == [100] * 4
    parts = [
        list(eval_batches(source, transform, 100, rows=rows)) for rows in (np.arange(50), np.arange(50, 100))
    ]
    for batch, *halves in zip(batches, *parts, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([half["image"] for half in halves]))
    valid = np.concatenate([b["valid"] for b in batches]) > 0
    labels = np.concatenate([b["label"] for b in batches])[valid]
    assert labels.tolist() == [source[i]["label"] for i in range(len(source))]


def test_a_batch_larger_than_the_data_is_rejected(source, transform):
    with pytest.raises(ValueError, match="has 1442 images, fewer than one batch of 2000"):
        train_batches(source, transform, 2000, seed=0)


def test_a_corrupt_record_stops_the_loader_and_is_named(source, transform):
    class OneCorrupt:
        """Records of which number 700 is truncated."""

        def __len__(self):
            return len(source.records)

        def __getitem__(self, index):
            record = source.records[index]
            return {**record, "image": record["image"][:20]} if index == 700 else record

    corrupt_source = dataclasses.replace(source, records=OneCorrupt())
    batches = train_batches(corrupt_source, transform, 64, seed=0)
    with pytest.raises(CorruptImage, match="record 700 of data set digits holds no readable image"):
        for _ in range(len(source) // 64 + 1):
            next(batches)
