import errno
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import tiny_config
from var_jax.training.checkpoint import (
    CheckpointMissing,
    CheckpointNotWritten,
    Checkpoints,
    check_space,
    load_params,
)
from var_jax.training.sharding import make_mesh
from var_jax.training.state import create_state
from var_jax.training.tokenizer_task import TokenizerTask


@pytest.fixture(scope="module")
def task(digits_dir):
    return TokenizerTask(tiny_config(digits_dir).tokenizer, 6)


def state_on(task, mesh, use_ema=True, seed=0):
    make_state, abstract = create_state(task.init, task.optimizer, use_ema, jax.random.key(seed), mesh)
    state = make_state()
    # The moving average differs from the parameters, so that a mix-up would show.
    ema = jax.tree.map(lambda p: p + 1, state.ema) if use_ema else None
    return state.replace(step=jnp.array(3), ema=ema), abstract


@pytest.mark.parametrize("use_ema", [True, False])
def test_saved_on_one_mesh_equals_restored_on_another(task, tmp_path, use_ema):
    state, _ = state_on(task, make_mesh(fsdp=8), use_ema)
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(3, state, {"model": task.model_fields()}, score=1.0)
    saved.wait()
    _, abstract = state_on(task, make_mesh(data=2, fsdp=2, tensor=2), use_ema, seed=1)
    restored = saved.restore(3, abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))
    got = jax.tree.map(lambda leaf: leaf.sharding, restored)
    assert got == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert saved.config(3)["model"]["num_codes"] == 16
    saved.close()
    params, _ = load_params(tmp_path)
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(state.sampling_params))


def test_keeps_the_latest_and_the_best(task, tmp_path):
    state, _ = state_on(task, make_mesh(fsdp=8))
    saved = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 5.0), (2, 1.0), (3, 4.0), (4, None), (5, 3.0)):
        at_step = state.replace(ema=jax.tree.map(lambda p: jnp.full_like(p, step), state.ema))  # noqa: B023
        saved.save(step, at_step, {"step": step}, score)
        saved.wait()
    saved.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]
    for which, step in (("latest", 5), ("best", 2), (4, 4), ("4", 4)):
        params, config = load_params(tmp_path, which)
        assert config["step"] == step and np.all(params["quantizer"]["codebook"] == step)
    with pytest.raises(CheckpointMissing, match=r"no checkpoint of step 3 under .*there are \[2, 4, 5\]"):
        load_params(tmp_path, 3)
    with pytest.raises(CheckpointMissing, match="a step must be a number, latest or best, found 'newest'"):
        load_params(tmp_path, "newest")


def test_no_checkpoint_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(CheckpointMissing, match="no checkpoints under .*/nowhere: train this stage first"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(CheckpointMissing, match="no complete checkpoint under"):
        load_params(tmp_path)


def test_a_disk_that_fills_up_loses_nothing(task, tmp_path, monkeypatch):
    state, _ = state_on(task, make_mesh(fsdp=8))
    saved = Checkpoints(tmp_path, keep=2)
    saved.save(1, state, {}, None)
    saved.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved._manager, "save", full)
    with pytest.raises(CheckpointNotWritten) as error:
        saved.save(2, state, {}, None)
    for words in (
        str(tmp_path),
        "No space left on device",
        "the last complete one is of step 1",
        "run the same",
    ):
        assert words in str(error.value)
    saved.close()
    load_params(tmp_path)


def test_a_disk_without_room_is_noticed_before_anything_runs(task, tmp_path, monkeypatch):
    _, abstract = state_on(task, make_mesh(fsdp=8))
    check_space(tmp_path, abstract)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointNotWritten, match=r"has 0.00 GiB free, but two checkpoints of this run take"
    ):
        check_space(tmp_path, abstract)
