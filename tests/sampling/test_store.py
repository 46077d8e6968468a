import errno
import shutil

import numpy as np
import pytest

from var_jax.sampling import store as store_module
from var_jax.sampling.store import OtherSamples, SamplesNotWritten, SampleStore

JOB = {"seed": 0, "top_k": [1, 2]}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 4, 4, 3)).astype(np.uint8)
TOKENS = RNG.integers(0, 99, (10, 5)).astype(np.int32)
LABELS = np.arange(10)


def opened(out, job=JOB) -> SampleStore:
    return SampleStore(out, 10, (4, 4, 3), 5, job)


def test_the_npz_is_what_numpy_would_write(tmp_path):
    store = opened(tmp_path)
    store.append(IMAGES[:6], TOKENS[:6])
    store.append(IMAGES[6:], TOKENS[6:])
    np.testing.assert_array_equal(store.tokens(), TOKENS)
    store.finish(LABELS)
    with np.load(tmp_path / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], IMAGES)
        np.testing.assert_array_equal(found["arr_1"], LABELS)
        assert found["arr_0"].dtype == np.uint8 and found["arr_1"].dtype == np.int64
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_what_a_kill_cut_short_is_dropped_back_to_a_whole_chunk(tmp_path):
    store = opened(tmp_path)
    store.append(IMAGES[:8], TOKENS[:8])
    with open(tmp_path / "samples.partial" / "images.uint8", "ab") as file:
        file.write(b"half an image")
    again = opened(tmp_path)
    assert again.done() == 8 and again.resume(chunk=3) == 6
    again.append(IMAGES[6:], TOKENS[6:])
    np.testing.assert_array_equal(again.images(), IMAGES)
    assert again.resume(chunk=3) == 10  # all there: only samples.npz is missing


def test_the_chunk_of_the_first_call_is_kept(tmp_path):
    assert opened(tmp_path).same_chunk(4) == 4
    assert opened(tmp_path).same_chunk(7) == 4


def test_unfinished_samples_of_another_call_are_not_mixed(tmp_path):
    opened(tmp_path)
    with pytest.raises(OtherSamples, match=r"another call.*\n  seed: 0 there, 1 now"):
        opened(tmp_path, {**JOB, "seed": 1})


def test_a_disk_without_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SamplesNotWritten, match="MiB free, but 10 images need"):
        opened(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.append(IMAGES, TOKENS)

    def full(array):
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_pieces", full)
        with pytest.raises(SamplesNotWritten, match="No space left on device; make room and run the same"):
            store.finish(LABELS)
    assert not (tmp_path / "samples.npz").exists()
    opened(tmp_path).finish(LABELS)
    with np.load(tmp_path / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], IMAGES)
