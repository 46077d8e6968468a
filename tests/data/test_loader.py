import dataclasses
import json

import numpy as np
import pytest

from var_jax.data.loader import eval_batches, train_batches
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
    rows = lambda epoch: np.concatenate([b["image"].reshape(len(b["image"]), -1) for b in epoch])  # noqa: E731
    a, b = rows(first), rows(second)
    assert (a != b).any()
    np.testing.assert_array_equal(np.unique(a, axis=0, return_counts=True)[1].sum(), 1442)
    np.testing.assert_array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)])


def test_the_position_is_small_json_and_resumes_the_very_order(source, transform):
    batches = train_batches(source, transform, 64, seed=1)
    for _ in range(30):  # into the second epoch
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    rest = [next(batches) for _ in range(3)]
    again = train_batches(source, transform, 64, seed=1)
    again.set_state(state)
    for want in rest:
        got = next(again)
        for name in ("image", "label"):
            np.testing.assert_array_equal(got[name], want[name])


def test_order_follows_the_seed(source, transform):
    labels = [next(train_batches(source, transform, 64, seed=s))["label"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()


def test_evaluation_counts_every_image_once(digits_dir, transform):
    source = open_source("digits", "test", digits_dir)
    batches = list(eval_batches(source, transform, 100))
    assert [len(b["label"]) for b in batches] == [100] * 4
    valid = np.concatenate([b["valid"] for b in batches]) > 0
    labels = np.concatenate([b["label"] for b in batches])[valid]
    assert labels.tolist() == [source[i]["label"] for i in range(len(source))]


def test_a_batch_larger_than_the_data_is_refused(source, transform):
    with pytest.raises(ValueError, match="has 1442 images, fewer than one batch of 2000"):
        train_batches(source, transform, 2000, seed=0)


def test_a_corrupt_record_stops_the_loader_and_is_named(source, transform):
    class OneBad:
        """The records with the 700th cut short."""

        def __len__(self):
            return len(source.records)

        def __getitem__(self, index):
            record = source.records[index]
            return {**record, "image": record["image"][:20]} if index == 700 else record

    bad = dataclasses.replace(source, records=OneBad())
    batches = train_batches(bad, transform, 64, seed=0)
    with pytest.raises(CorruptImage, match="record 700 of data set digits holds no readable image"):
        for _ in range(len(source) // 64 + 1):
            next(batches)
