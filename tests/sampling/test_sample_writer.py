import contextlib
import errno
import os
import shutil

import numpy as np
import pytest

from var_jax.sampling import sample_writer
from var_jax.sampling.sample_writer import OtherSamples, SamplesNotWritten, SampleStore

JOB = {"seed": 0, "top_k": [1, 2]}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 4, 4, 3)).astype(np.uint8)
TOKENS = RNG.integers(0, 99, (10, 5)).astype(np.int32)
LABELS = np.arange(10)


def open_store(out, job=JOB) -> SampleStore:
    return SampleStore(out, 10, (4, 4, 3), 5, job)


def filled_store(out) -> SampleStore:
    """Return a store with all images, before `finish`."""
    store = open_store(out)
    store.append(IMAGES, TOKENS)
    return store


def test_the_npz_is_what_numpy_would_write(tmp_path):
    store = open_store(tmp_path)
    store.append(IMAGES[:6], TOKENS[:6])
    store.append(IMAGES[6:], TOKENS[6:])
    np.testing.assert_array_equal(store.tokens(), TOKENS)
    store.finish(LABELS)
    with np.load(tmp_path / "samples.npz") as result:
        np.testing.assert_array_equal(result["arr_0"], IMAGES)
        np.testing.assert_array_equal(result["arr_1"], LABELS)
        assert result["arr_0"].dtype == np.uint8 and result["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "tokens.npy"]


def test_a_finished_job_is_not_done_again_and_its_images_are_there(tmp_path):
    filled_store(tmp_path).finish(LABELS)
    written = (tmp_path / "samples.npz").stat().st_mtime_ns
    again = open_store(tmp_path)
    assert again.finished and again.done() == again.resume(chunk=3) == 10 and again.resolve_chunk(3) == 3
    np.testing.assert_array_equal(again.images(), IMAGES)
    np.testing.assert_array_equal(again.tokens(), TOKENS)
    again.finish(LABELS)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == written
    assert not open_store(
        tmp_path, {**JOB, "seed": 1}
    ).finished  # it begins, and replaces the file at its end
    assert (tmp_path / "samples.npz").exists()


def test_tokens_of_other_images_are_not_taken_for_these(tmp_path):
    filled_store(tmp_path).finish(LABELS)
    np.save(tmp_path / "tokens.npy", TOKENS + 1)
    with pytest.raises(OSError, match="tokens.npy does not belong to the images in samples.npz"):
        open_store(tmp_path).tokens()


@pytest.mark.parametrize("killed_in", ["tokens", "samples", "removal"])
def test_a_kill_while_it_finishes_loses_nothing(tmp_path, monkeypatch, killed_in):
    """The flat files are removed only after the other files are synced under their final names."""
    store, synced = filled_store(tmp_path), []

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if killed_in == "samples" and synced[-1].endswith("samples.npz.partial"):
            raise Killed

    monkeypatch.setattr(os, "fsync", fsync)
    if killed_in == "tokens":
        monkeypatch.setattr(sample_writer, "_write_array", kill)
    if killed_in == "removal":
        monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(Killed):
        store.finish(LABELS)
    monkeypatch.undo()
    if killed_in == "removal":
        assert synced == [f"{tmp_path}{x}" for x in ("/tokens.npy.partial", "", "/samples.npz.partial", "")]
    assert (tmp_path / "samples.npz").exists() == (killed_in == "removal")
    again = open_store(tmp_path)
    assert again.resume(chunk=3) == 10
    again.finish(LABELS)
    with np.load(tmp_path / "samples.npz") as result:
        np.testing.assert_array_equal(result["arr_0"], IMAGES)
    assert not (tmp_path / "samples.partial").exists()


def test_what_is_left_of_a_folder_that_was_being_removed_is_not_counted(tmp_path):
    filled_store(tmp_path)
    (tmp_path / "samples.partial" / "job.json").unlink()
    assert open_store(tmp_path, {**JOB, "seed": 1}).done() == 0


def test_what_a_kill_cut_short_is_dropped_back_to_a_whole_chunk(tmp_path):
    store = open_store(tmp_path)
    store.append(IMAGES[:8], TOKENS[:8])
    with open(tmp_path / "samples.partial" / "images.uint8", "ab") as file:
        file.write(b"half an image")
    again = open_store(tmp_path)
    assert again.done() == 8 and again.resume(chunk=3) == 6
    again.append(IMAGES[6:], TOKENS[6:])
    np.testing.assert_array_equal(again.images(), IMAGES)
    assert again.resume(chunk=3) == 10  # all there: only samples.npz is missing


def test_the_chunk_of_the_first_call_is_kept(tmp_path):
    assert open_store(tmp_path).resolve_chunk(4) == 4
    assert open_store(tmp_path).resolve_chunk(7) == 4
    assert open_store(tmp_path).resolve_chunk(5, is_explicit=True) == 5  # --batch
    assert open_store(tmp_path).resolve_chunk(7) == 5


def test_a_chunk_that_a_kill_left_without_its_number_is_noted_again(tmp_path):
    store = open_store(tmp_path)
    (tmp_path / "samples.partial" / "chunk").touch()
    assert store.resolve_chunk(4) == 4
    assert open_store(tmp_path).resolve_chunk(7) == 4


def test_a_disk_that_is_full_says_so_at_every_step_and_nothing_is_lost(small_disk):
    """Use a real file system of 6 MB."""
    images = RNG.integers(0, 256, (40, 100, 100, 3)).astype(np.uint8)  # 1.2 MB
    tokens, labels = np.zeros((40, 5), np.int32), np.arange(40)
    filler, full = (
        small_disk / "filler",
        pytest.raises(SamplesNotWritten, match="No space left on device; make"),
    )

    def fill() -> None:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    start = lambda: SampleStore(small_disk, 40, (100, 100, 3), 5, JOB)
    store = start()
    fill()
    with full:
        store.resolve_chunk(8)
    filler.unlink()
    assert store.resolve_chunk(8) == 8
    store.append(images[:8], tokens[:8])
    fill()
    with full:
        store.append(images[8:16], tokens[8:16])
    with pytest.raises(SamplesNotWritten, match="0.0 MiB free, but 40 images need 2.1 MiB"):
        start()
    filler.unlink()
    store = start()
    assert store.resolve_chunk(5) == 8 and store.resume(8) == 8
    store.append(images[8:], tokens[8:])
    fill()
    with full:
        store.finish(labels)
    assert not (small_disk / "samples.npz").exists()
    filler.unlink()
    start().finish(labels)
    with np.load(small_disk / "samples.npz") as result:
        np.testing.assert_array_equal(result["arr_0"], images)


def test_unfinished_samples_of_another_call_are_not_mixed(tmp_path):
    open_store(tmp_path)
    with pytest.raises(OtherSamples, match=r"another call.*\n  seed: 0 there, 1 now"):
        open_store(tmp_path, {**JOB, "seed": 1})


def test_a_disk_without_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SamplesNotWritten, match="MiB free, but 10 images need"):
        open_store(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.append(IMAGES, TOKENS)

    def full(array):
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample_writer, "_byte_blocks", full)
        with pytest.raises(SamplesNotWritten, match="No space left on device; make room and run the same"):
            store.finish(LABELS)
    assert not (tmp_path / "samples.npz").exists()
    open_store(tmp_path).finish(LABELS)
    with np.load(tmp_path / "samples.npz") as result:
        np.testing.assert_array_equal(result["arr_0"], IMAGES)
