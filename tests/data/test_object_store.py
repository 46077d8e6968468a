import dataclasses

import numpy as np
import pytest

from tests.helpers.token_cache import COMMAND, small
from var_jax.data.loader import train_batches
from var_jax.data.sources import DataSetMissing, open_source
from var_jax.data.token_cache import open_token_cache
from var_jax.data.token_writer import CacheMismatch, write_cache
from var_jax.data.transforms import ToPixels
from var_jax.paths import as_path
from var_jax.tools.prepare import prepare


def test_a_data_set_is_read_from_object_storage_as_from_a_disk(bucket, digits_dir):
    data_dir = f"{bucket}/data"
    with pytest.raises(DataSetMissing, match=f"digits are not under {data_dir}"):
        open_source("digits", "train", data_dir)
    for file in (digits_dir / "digits").rglob("*.*"):
        if file.is_file():
            (as_path(data_dir) / file.relative_to(digits_dir)).write_bytes(file.read_bytes())
    for split in ("train", "test"):
        local, remote = (open_source("digits", split, folder) for folder in (digits_dir, data_dir))
        assert len(remote) == len(local) and remote.class_names == local.class_names
        assert all(remote[i]["image"] == local[i]["image"] for i in (0, 99, len(local) - 1))
    pixels = ToPixels("digits", 8, 1.0, False)
    batches = [next(train_batches(source, pixels, 64, seed=0, threads=4)) for source in (local, remote)]
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


def test_a_token_cache_is_written_to_object_storage_and_read_from_it(
    bucket, digits_dir, tiny_tokenizer, tmp_path
):
    description, sources, encode = small(digits_dir, tiny_tokenizer)
    caches = []
    for out in (tmp_path / "local", f"{bucket}/tokens"):
        write_cache(as_path(out), description, sources, encode, 2, COMMAND)
        caches.append(open_token_cache(out))
    for local, remote in zip(*caches, strict=True):
        assert len(local) == len(remote) > 39
        tokens = [np.stack([source[i]["tokens"] for i in range(len(local))]) for source in (local, remote)]
        np.testing.assert_array_equal(*tokens)
    assert {path.name for path in as_path(f"{bucket}/tokens").iterdir()} == {
        path.name for path in (tmp_path / "local").iterdir()
    }
    with pytest.raises(
        CacheMismatch, match=f"{bucket}/tokens holds something else(?s:.)*crops: 2 there, 3 now"
    ):
        other = dataclasses.replace(description, crops=3)
        write_cache(as_path(f"{bucket}/tokens"), other, sources, encode, 2, COMMAND)


def test_remote_paths_that_are_not_supported_are_rejected_by_name(tmp_path):
    with pytest.raises(ValueError, match="config.data.dir=s3://b/data: must be a local path"):
        open_source("digits", "train", "s3://b/data")
    with pytest.raises(ValueError, match="config.data.tokens=s3://b/tokens: must be a local path"):
        open_token_cache("s3://b/tokens")
    for images, data_dir, name in (("gs://b/x", tmp_path, "--images"), (tmp_path, "gs://b/x", "--data_dir")):
        with pytest.raises(ValueError, match=f"{name}=gs://b/x: must be a local path"):
            prepare(images, "colours", data_dir, 0.2, False, 1)
