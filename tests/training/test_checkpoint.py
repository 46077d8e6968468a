import errno
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from tests.helpers.toy import Toy, toy_stage
from var_jax.data.sources import open_source
from var_jax.sharding import make_mesh
from var_jax.training import checkpoint_integrity
from var_jax.training.checkpoint import (
    CHECKPOINT_DIR,
    CheckpointMismatch,
    CheckpointMissing,
    Checkpoints,
    load_config,
    load_params,
    save_params,
    unfinished_notice,
)
from var_jax.training.checkpoint_integrity import (
    MANIFEST_FILE,
    UNLISTED_FILES,
    CheckpointDamaged,
    CheckpointNotWritten,
    check_checkpoint_space,
    is_storage_error,
    quarantine_corrupt,
    steps_under,
    writing,
)
from var_jax.training.state import create_state
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.trainer import train


@pytest.fixture(scope="module")
def task(digits_dir):
    return TokenizerTask(tiny_config(digits_dir).tokenizer, 6)


def abstract_state(task, mesh, use_ema=True):
    return create_state(task.init, task.optimizer, use_ema, jax.random.key(0), mesh)[1]


def random_state(abstract):
    """Fill every leaf with other values, so that a mix-up shows (and no initialization is compiled)."""
    rng = np.random.default_rng(0)
    fill = lambda leaf: jax.device_put((9 * rng.random(leaf.shape)).astype(leaf.dtype), leaf.sharding)
    return jax.tree.map(fill, abstract).replace(step=jnp.array(3))


def toy_state(use_ema=False):
    toy, mesh = Toy(), make_mesh(fsdp=8)
    make_state, abstract = create_state(toy.init, toy.optimizer, use_ema, jax.random.key(0), mesh)
    return make_state(), abstract


@pytest.mark.parametrize("use_ema", [True, False])
def test_saved_on_one_mesh_equals_restored_on_another(task, tmp_path, use_ema):
    state = random_state(abstract_state(task, make_mesh(fsdp=8), use_ema))
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(3, state, {"model": task.model_fields()}, score=1.0)
    saved.wait()
    abstract = abstract_state(task, make_mesh(data=2, fsdp=2, tensor=2), use_ema)
    restored = saved.restore(3, abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    got = jax.tree.map(lambda leaf: leaf.sharding, restored)
    assert got == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert saved.config(3)["model"]["num_codes"] == 16
    saved.close()
    params, _ = load_params(tmp_path)
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(state.sampling_params))


def test_keeps_the_latest_and_the_best(tmp_path):
    state, _ = toy_state(use_ema=True)
    saved = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 5.0), (2, 1.0), (3, 4.0), (4, None), (5, 3.0)):
        at_step = state.replace(ema=jax.tree.map(lambda p: jnp.full_like(p, step), state.ema))  # noqa: B023
        saved.save(step, at_step, {"step": step}, score)
        saved.wait()
    saved.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]
    for name, step in (("latest", 5), ("best", 2), (4, 4), ("4", 4)):
        params, config = load_params(tmp_path, name)
        assert config["step"] == step and np.all(params["w"] == step)
    with pytest.raises(CheckpointMissing, match=r"no checkpoint of step 3 under .*there are \[2, 4, 5\]"):
        load_params(tmp_path, 3)
    with pytest.raises(CheckpointMissing, match="a step must be a number, latest or best, got 'newest'"):
        load_params(tmp_path, "newest")


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(CheckpointMissing, match="no checkpoints under .*/nowhere: train this stage first"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(CheckpointMissing, match="no complete checkpoint under"):
        load_params(tmp_path)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, caplog):
    """Fail the save by a patched error, without filling a disk."""
    state, _ = toy_state()
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, state, {}, None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved.wait()
    monkeypatch.setattr(saved._manager, "save", full)
    saved.save(2, state, {}, None)
    assert "Training goes on" in caplog.text and "last complete one is of step 1" in caplog.text
    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        saved.wait()  # the last of a run must be written
    with pytest.raises(CheckpointNotWritten) as error:
        saved.save(3, state, {}, None)
    for words in (str(tmp_path), "No space left on device", "last complete one is of step 1", "GiB are free"):
        assert words in str(error.value)
    saved.close()
    load_params(tmp_path)


@pytest.fixture
def train_on(small_disk, digits_dir, monkeypatch):
    """Train 12 steps with a checkpoint (0.8 MB) every two, while the disk is full at some steps."""
    sources = tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))
    save, filler = Checkpoints.save, small_disk / "filler"

    def run(full: range) -> None:
        def save_beside(self, step, *rest):
            filler.unlink(missing_ok=True)
            if step in full:
                filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
            save(self, step, *rest)

        monkeypatch.setattr(Checkpoints, "save", save_beside)
        train(Toy(ballast=200_000), toy_stage(digits_dir, every=2), 12, small_disk, sources)

    return run


def test_a_disk_that_is_full_once_is_warned_of_and_training_goes_on(train_on, small_disk, caplog):
    train_on(full=range(4, 5))
    folder = small_disk / "toy" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["10", "12"]
    load_params(folder)
    (message,) = (
        record.getMessage() for record in caplog.records if "Training goes on" in record.getMessage()
    )
    for words in (f"could not be written under {folder}", "last complete one is of step 2", "GiB are free"):
        assert words in message


def test_a_disk_that_stays_full_ends_training_and_loses_nothing(train_on, small_disk):
    with pytest.raises(
        CheckpointNotWritten, match="last complete one is of step 4.*the same command goes on"
    ):
        train_on(full=range(6, 13))
    folder = small_disk / "toy" / "checkpoints"
    assert steps_under(folder) == [2, 4]  # a late write may leave a temporary folder
    train_on(full=range(0))
    assert sorted(path.name for path in folder.iterdir()) == ["10", "12"]


def every_file(folder) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("damage", ["deleted", "emptied", "halved"])
def test_a_checkpoint_that_was_cut_off_is_never_taken_for_whole(digits_dir, tmp_path, caplog, damage):
    """Damage each file of the newer of two checkpoints in turn."""
    state, abstract = toy_state()
    saved = Checkpoints(tmp_path / "sound", keep=2)
    for step in (1, 2):
        saved.save(step, state.replace(step=jnp.array(step)), {"step": step}, score=1.0)
    saved.wait()
    saved.close()
    files = every_file(tmp_path / "sound" / "2")
    assert len(files) > 12
    for number, name in enumerate(files):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "sound", folder)
        damaged = folder / "2" / name
        caplog.clear()
        content = damaged.read_bytes()
        damaged.unlink()
        if damage != "deleted":
            damaged.write_bytes(content[: len(content) // 2 if damage == "halved" else 0])
        harmless = name == UNLISTED_FILES[2]  # a word of Orbax that nothing reads
        try:
            params, _ = load_params(folder)
            assert harmless or (name, damage) == (MANIFEST_FILE, "deleted")  # as of an older version
            np.testing.assert_array_equal(params["w"], state.params["w"])
        except CheckpointDamaged as error:
            assert str(folder / "2") in str(error)
        again = Checkpoints(folder, keep=2)
        restored = again.restore(again.latest(), abstract)
        assert again.config(again.latest())["step"] == int(restored.step) == (2 if harmless else 1), name
        again.close()
        if not harmless:
            assert f"{folder / '2'} is damaged: " in caplog.text and "going on from step 1" in caplog.text
        shutil.rmtree(folder)


def test_a_run_without_one_whole_checkpoint_stops_with_their_names(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, toy_state()[0], {}, None)
    saved.wait()
    saved.close()
    (tmp_path / "1" / "config" / "metadata").write_text("{")
    with pytest.raises(CheckpointDamaged, match=r"no checkpoint under .*\n  1: config/metadata has 1 bytes"):
        Checkpoints(tmp_path, keep=2)
    assert (tmp_path / "1").is_dir()
    with pytest.raises(CheckpointDamaged, match="/1 is damaged: config/metadata has 1 bytes in place of 2"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    "params, config, error, words",
    [
        ({"w": np.zeros(3)}, {"a": object()}, TypeError, "object is not JSON serializable"),
        ({"w": object()}, {}, ValueError, "type.*<class 'object'>"),
    ],
)
def test_a_bug_in_saving_ends_at_once_as_itself(tmp_path, params, config, error, words):
    state, _ = toy_state()
    saved = Checkpoints(tmp_path / "run", keep=2)
    with pytest.raises(error, match=words):
        saved.save(1, state.replace(params=params), config, None)
        saved.wait()
    with pytest.raises(error, match=words):
        save_params(tmp_path / "converted", params, {}, config)


@pytest.mark.parametrize("free", [0, 20_000, 200_000])
def test_whatever_a_full_disk_raises_is_told_as_that(small_disk, free, tmp_path):
    """Errors of Python, of TensorStore's metadata, or of its data, depending on the free space."""
    saved = Checkpoints(small_disk, keep=2)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
    make_state, _ = create_state(
        Toy(ballast=200_000).init, Toy().optimizer, False, jax.random.key(0), make_mesh(fsdp=8)
    )
    saved.save(1, make_state(), {}, None)
    with pytest.raises(CheckpointNotWritten, match="No space left on(.|\n)* GiB are free there") as error:
        saved.wait()
    assert is_storage_error(error.value.__cause__)


def test_the_free_space_of_a_folder_that_is_gone_hides_no_error(tmp_path):
    with (
        pytest.raises(CheckpointNotWritten, match="^a checkpoint could not be written under .*: the cable\n"),
        writing(tmp_path / "gone"),
    ):
        raise OSError("the cable")


def test_statuses_of_tensorstore_are_told_from_bugs():
    assert is_storage_error(ValueError("RESOURCE_EXHAUSTED: Error writing local file"))
    assert is_storage_error(ValueError("NOT_FOUND: Error opening"))
    wrapped = Exception("Encountered error while reading array")  # as Orbax does
    assert not is_storage_error(wrapped)
    wrapped.__cause__ = ValueError("OUT_OF_RANGE: Error reading")
    assert is_storage_error(wrapped)
    for bug in (ValueError("INVALID_ARGUMENT: dtype"), TypeError("NOT_FOUND: x"), ValueError("shape")):
        assert not is_storage_error(bug)


def test_a_checkpoint_of_another_network_names_the_arrays(tmp_path):
    state, abstract = toy_state()
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, state, {}, None)
    saved.wait()
    _, wider = create_state(Toy(ballast=3).init, Toy().optimizer, False, jax.random.key(0), make_mesh(fsdp=8))
    with pytest.raises(
        CheckpointMismatch, match=r"/1 is of another(.|\n)*ballast: \(1,\) in .*, \(3,\) in this"
    ):
        saved.restore(1, wider)
    renamed = abstract.replace(params={"v": abstract.params["w"], "ballast": abstract.params["ballast"]})
    with pytest.raises(CheckpointMismatch) as error:
        saved.restore(1, renamed)
    for line in (
        "v: missing in the checkpoint, (8,) in this run",
        "w: (8,) in the checkpoint, missing in this",
    ):
        assert line in str(error.value)
    assert "ballast" not in str(error.value)
    assert int(saved.restore(1, abstract).step) == 0
    saved.close()


def test_files_that_the_manifest_does_not_know_of_are_damage_when_read(tmp_path):
    """Remove the manifest, as in a checkpoint of an older version."""
    state, _ = toy_state()
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, state, {}, None)
    saved.wait()
    saved.close()
    (tmp_path / "1" / MANIFEST_FILE).unlink()
    for name in ("params/_METADATA", "params/manifest.ocdbt", "config/metadata"):
        content = (tmp_path / "1" / name).read_bytes()
        (tmp_path / "1" / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointDamaged, match="/1 cannot be read: "):
            load_params(tmp_path)
        (tmp_path / "1" / name).write_bytes(content)
    shutil.rmtree(tmp_path / "1" / "params")
    with pytest.raises(CheckpointDamaged, match="/1 cannot be read: params is missing"):
        load_params(tmp_path)


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_followed_by_the_next(tmp_path, monkeypatch, name):
    state, _ = toy_state()
    training = Checkpoints(tmp_path, keep=1)
    training.save(1, state, {"step": 1}, 5.0)
    training.wait()
    # Two saves at a time: a score counts from the next one on, so that only then the best of before goes.
    restore, saves = type(training._manager).restore, iter(((2, 3), (4, 5)))

    def restore_after_saves(manager, step, *args, **kwargs):
        for number in next(saves, ()):
            training.save(number, state, {"step": number}, 5.0 - number)
            training.wait()
        return restore(manager, step, *args, **kwargs)

    monkeypatch.setattr(type(training._manager), "restore", restore_after_saves)
    assert load_params(tmp_path, name)[1]["step"] == 5
    assert load_config(tmp_path, name) == (5, {"step": 5})
    with pytest.raises(CheckpointMissing, match=r"no checkpoint of step 1 under .*there are \[4, 5\]"):
        load_params(tmp_path, 1)
    training.close()


class TwoProcesses:
    """Fake collectives of process 0, then of process 1, which receives the values that process 0 sent."""

    def __init__(self, monkeypatch):
        self.index, self.sent = 0, []
        monkeypatch.setattr(checkpoint_integrity.jax, "process_count", lambda: 2)
        monkeypatch.setattr(checkpoint_integrity.jax, "process_index", lambda: self.index)
        monkeypatch.setattr(checkpoint_integrity.multihost_utils, "sync_global_devices", lambda name: None)
        monkeypatch.setattr(checkpoint_integrity.multihost_utils, "broadcast_one_to_all", self.broadcast)

    def broadcast(self, value):
        if self.index == 0:
            self.sent.append(value)
            return value
        first = self.sent.pop(0)
        assert np.shape(first) == np.shape(value) and first.dtype == value.dtype
        return first


def test_the_first_process_judges_checkpoints_for_all(tmp_path, monkeypatch):
    """Let process 1 see an older state of the directories, in which all or no checkpoints are damaged."""
    state, _ = toy_state()
    saved = Checkpoints(tmp_path / "0", keep=2)
    for step in (1, 2):
        saved.save(step, state, {}, None)
        saved.wait()
    saved.close()
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "0" / "2" / "config" / "metadata").write_text("{")
    for step in (1, 2):
        (tmp_path / "1" / str(step) / "config" / "metadata").write_text("{")
    processes = TwoProcesses(monkeypatch)
    for processes.index in (0, 1):
        quarantine_corrupt(tmp_path / str(processes.index))
    assert steps_under(tmp_path / "0") == [1] and steps_under(tmp_path / "1") == [1, 2]
    (tmp_path / "0" / "1" / "config" / "metadata").write_text("{")
    shutil.rmtree(tmp_path / "1")
    for processes.index in (0, 1):
        with pytest.raises(CheckpointDamaged, match="\n  1: config/metadata has 1 bytes in place of 2"):
            quarantine_corrupt(tmp_path / str(processes.index))


def test_a_disk_without_room_is_noticed_before_anything_runs(task, tmp_path, monkeypatch):
    abstract = abstract_state(task, make_mesh(fsdp=8))
    check_checkpoint_space(tmp_path, abstract)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointNotWritten, match=r"has 0.00 GiB free, but two checkpoints of this run take"
    ):
        check_checkpoint_space(tmp_path, abstract)


def test_a_stage_that_stopped_early_is_named_with_the_command_that_goes_on(tmp_path):
    folder = tmp_path / "tokenizer"
    assert unfinished_notice(tmp_path, "tokenizer") == ""
    save_params(folder / CHECKPOINT_DIR, {"x": np.zeros(2, np.float32)}, {}, {"steps": 3})
    expected = f"warning: {folder} stopped at step 0 of 3"
    assert unfinished_notice(tmp_path, "tokenizer") == expected
    (folder / "config.json").write_text(json.dumps({"command": "train.py --workdir=x"}))
    assert unfinished_notice(tmp_path, "tokenizer") == f"{expected}; to go on: python train.py --workdir=x"


def test_opening_a_checkpoint_to_read_logs_nothing(tmp_path, caplog):
    save_params(tmp_path / "run", {"x": np.zeros(2, np.float32)}, {}, {"steps": 0})
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        params, _ = load_params(tmp_path / "run")
    assert params["x"].tolist() == [0, 0] and caplog.text == ""
