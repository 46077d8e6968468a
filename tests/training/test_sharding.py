import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers.arrays import close
from tests.helpers.tiny import tiny_config
from var_jax.sharding import (
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    partition_spec,
    replicated_fraction,
    tree_shardings,
)
from var_jax.tokenizer.codebook_updates import dead_codes
from var_jax.training.jit_steps import jit_train_step
from var_jax.training.state import create_state
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask


@pytest.fixture(scope="module")
def tasks(tiny_tokenizer, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("none"))
    config.tokenizer.codebook.dead_threshold = 0.9  # so that codes are restarted
    corrected = config.next_scale.copy_and_resolve_references()
    corrected.correction.update(dict(strength=0.5, source="model"))
    captioned = config.next_scale.copy_and_resolve_references()
    captioned.model.update(dict(condition="caption", text_depth=1))
    captions = dict(condition_length=3, condition_width=0, vocabulary=("blue", "on", "red"))
    return {
        "tokenizer": TokenizerTask(config.tokenizer, 6),
        "next_scale": NextScaleTask(config.next_scale, 6, *tiny_tokenizer, classes=10),
        "self_correction": NextScaleTask(corrected, 6, *tiny_tokenizer, classes=10),
        "captions": NextScaleTask(captioned, 6, *tiny_tokenizer, classes=1, condition_fields=captions),
    }


def losses(task, mesh, steps=5):
    """Return the losses of a few steps on a mesh, from a fixed start and batches, and the final state."""
    cfg = task.stage.train
    make_state, abstract = create_state(task.init, task.optimizer, True, jax.random.key(0), mesh)
    state, rng = make_state(), np.random.default_rng(0)
    step = jit_train_step(task, cfg, 6, mesh, abstract)
    result = []
    for _ in range(steps):
        batch = {
            "image": rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8),
            "label": rng.integers(0, 10, 16, dtype=np.int32),
            "valid": np.ones(16, np.float32),
        }
        if task.stage.model.get("condition") == "caption":
            batch["condition"] = rng.integers(0, 5, (16, 3), dtype=np.int32)
        state, metrics = step(state, task.frozen, global_batch(batch, mesh), jax.random.key(1))
        result.append(float(metrics["loss"]))
    return np.array(result), state


@pytest.mark.parametrize("name", ["tokenizer", "next_scale", "self_correction", "captions"])
def test_eight_devices_fsdp_equal_one(tasks, name):
    one, whole = losses(tasks[name], make_mesh(devices=jax.devices()[:1]))
    eight, state = losses(tasks[name], make_mesh(fsdp=8))
    np.testing.assert_allclose(eight, one, atol=1e-5, rtol=0)
    assert one[0] != one[-1]
    if name == "tokenizer":  # the steps went through all that the codebook and the adversary do
        after, alone = (jax.device_get(s.extra) for s in (state, whole))
        assert alone["adversary"]["means"].any() and alone["code_uses"].any()
        assert dead_codes(alone["code_hits"], 0.9).any()  # so that there were codes to move
        chex.assert_trees_all_close(after, alone, atol=1e-4, rtol=1e-3)
        codebooks = [tree["quantizer"]["codebook"] for s in (state, whole) for tree in (s.params, s.ema)]
        close(codebooks[0], codebooks[2])
        close(codebooks[1], codebooks[3])
    split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
    assert sum(leaf.size for leaf in split) > 0.5 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.is_fully_replicated]
    assert len(moments) == 2 * len(split)


def test_tensor_and_data_axes_equal_one(tasks):
    one, _ = losses(tasks["next_scale"], make_mesh(devices=jax.devices()[:1]), steps=3)
    mixed, state = losses(tasks["next_scale"], make_mesh(data=2, fsdp=2, tensor=2), steps=3)
    np.testing.assert_allclose(mixed, one, atol=1e-5, rtol=0)
    kernel = state.params["blocks"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")


def test_each_device_encodes_its_own_images_and_none_are_gathered(tasks):
    """Check a step from images; `tests/benchmarks/test_plan.py` checks one from tokens, for TPU."""
    task, mesh = tasks["next_scale"], make_mesh(data=2, fsdp=4)
    _, state = create_state(task.init, task.optimizer, True, jax.random.key(0), mesh)
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
    batch = {"image": put((16, 8, 8, 3), jnp.uint8), "label": put((16,), jnp.int32)}
    step = jit_train_step(task, task.stage.train, 6, mesh, state)
    program = step.lower(state, task.frozen, batch, jax.random.key(1)).compile()
    text = program.as_text()
    of = lambda kind: re.findall(rf"\w+\[([\d,]*)\]\S* {kind}\(", text)
    assert len(of("convolution")) > 5 and all(shape.startswith("2,") for shape in of("convolution"))
    gathered = [shape for shape in of("all-gather") if shape.startswith("16,") and shape.count(",") > 1]
    assert of("all-gather") and not gathered
    donated = program.memory_analysis().alias_size_in_bytes
    sizes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
    assert donated == sum(4 * math.prod(size) for size in sizes)  # the whole state


def test_moving_average_and_moments_are_split_as_the_parameters_are(tasks):
    task, mesh = tasks["next_scale"], make_mesh(data=2, fsdp=2, tensor=2)
    _, state = create_state(task.init, task.optimizer, True, jax.random.key(0), mesh)
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
    (adam,) = [part for part in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(part)]
    assert specs(state.ema) == specs(state.params) == specs(adam.mu) == specs(adam.nu)


def is_adam(part) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def test_the_table_keeps_whole_what_does_not_divide():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    assert partition_spec(("embed", "mlp"), (8, 6), mesh) == P("fsdp", "tensor")
    assert partition_spec(("embed", "mlp"), (6, 8), mesh) == P(None, "tensor")
    assert partition_spec(("embed", "embed"), (8, 8), mesh) == P("fsdp", None)
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",), (8,), mesh)


def test_parameters_that_fsdp_does_not_divide_are_counted(tasks):
    task = tasks["next_scale"]  # width 32
    share = lambda **sizes: replicated_fraction(
        create_state(task.init, task.optimizer, False, jax.random.key(0), make_mesh(**sizes))[1].params
    )
    assert share(fsdp=8) < 0.1
    assert share(fsdp=5, devices=jax.devices()[:5]) == 1


def test_every_parameter_is_named_in_the_table(tasks):
    mesh = make_mesh(fsdp=8)
    for task in tasks.values():
        boxed = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])  # noqa: B023
        shardings = tree_shardings(boxed, mesh)
        assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(nn.meta.unbox(boxed)))


def test_a_mesh_that_does_not_fit_is_refused():
    assert dict(make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for sizes in ({"data": 3, "fsdp": -1}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}):
        with pytest.raises(ValueError, match="does not fit 8 devices: the product must be 8"):
            make_mesh(**sizes)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(data=2, fsdp=4)
    check_batch(32, mesh, accumulate=2)
    with pytest.raises(ValueError, match=r"batch=24 must be a multiple of 16: 8 devices.*grad_accum_steps=2"):
        check_batch(24, mesh, accumulate=2)
    assert batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)


def test_accumulation_equals_one_go_up_to_dropout(tiny_tokenizer, tmp_path):
    config = tiny_config(tmp_path).next_scale
    config.model.update(dict(dropout=0.0, drop_path=0.0, class_dropout_prob=0.0))
    config.correction.strength = 0.5  # replaces the same tokens
    mesh = make_mesh(fsdp=8)
    whole, _ = losses(NextScaleTask(config, 6, *tiny_tokenizer, classes=10), mesh, steps=3)
    config.train.grad_accum_steps = 2
    parts, _ = losses(NextScaleTask(config, 6, *tiny_tokenizer, classes=10), mesh, steps=3)
    close(parts, whole, 1e-5)
    assert jnp.isfinite(parts).all()


def test_accumulation_of_the_tokenizer_equals_one_go_where_nothing_is_drawn(tmp_path):
    config = tiny_config(tmp_path).tokenizer
    config.model.quantizer_dropout = 0.0
    config.codebook.update(dict(kmeans_steps=0, restart_every=0))
    config.adversarial.update(dict(adaptive=False, augment=False))
    mesh, result = make_mesh(devices=jax.devices()[:1]), []
    for config.train.grad_accum_steps in (1, 2):
        result.append(losses(TokenizerTask(config, 6), mesh, steps=3))
    close(result[1][0], result[0][0], 1e-5)
    chex.assert_trees_all_close(result[1][1].extra, result[0][1].extra, atol=1e-4, rtol=1e-3)
