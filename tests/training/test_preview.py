"""Previews on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from var_jax.images import denormalize_to_uint8, normalize
from var_jax.sampling.sampler import Networks, generate_in_chunks, image_keys
from var_jax.sharding import make_mesh, replicated
from var_jax.tokenizer.model import decode_steps, encode
from var_jax.training.preview import run_in_chunks
from var_jax.training.state import create_state
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask


def state_of(task, mesh):
    make_state, abstract_state = create_state(task.init, task.optimizer, False, jax.random.key(0), mesh)
    return make_state(), abstract_state, jax.device_put(task.frozen, replicated(mesh))


@pytest.fixture(scope="module")
def tiny_task(tiny_tokenizer):
    """Return the transformer task, with a tokenizer of random weights."""
    tokenizer, params = tiny_tokenizer
    stage = tiny_config("unused").next_scale
    return NextScaleTask(stage, 6, tokenizer, params, 10, make_mesh())


def test_samples_of_a_preview_are_those_of_the_generator(tiny_task):
    """Generate in chunks on the mesh from sharded parameters, and compare with one device."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, shapes, frozen = state_of(tiny_task, mesh)
    programs = tiny_task.preview_programs(mesh, shapes.params, frozen)
    labels = tiny_task.preview_labels
    assert programs["samples"][1][2].shape == (32,)  # 8 a device, so that 80 take three calls
    keys = np.asarray(jax.random.key_data(image_keys(tiny_task.stage.seed, np.arange(len(labels)))))
    pixels, tokens = run_in_chunks(programs["samples"], state.params, frozen, labels, keys)
    networks = Networks(
        tiny_task.tokenizer,
        tiny_task.model,
        tiny_task.frozen["tokenizer"],
        jax.device_get(state.params),
    )
    parts = generate_in_chunks(
        networks,
        labels,
        tiny_task.stage.seed,
        tiny_task.options,
        len(labels),
        postprocess=denormalize_to_uint8,
    )
    ((want_pixels, want_tokens),) = parts
    assert np.mean(tokens == want_tokens) > 0.99  # sums in another order turn some ties
    same = (tokens == want_tokens).all(1)
    np.testing.assert_allclose(pixels[same].astype(int), want_pixels[same], atol=1)


def test_reconstructions_of_a_preview_are_those_of_the_tokenizer(digits_dir):
    """Reconstruct in chunks; the number of images is not a multiple of the devices."""
    mesh = make_mesh(data=4, fsdp=2)
    task = TokenizerTask(tiny_config(digits_dir).tokenizer, 6)
    state, shapes, frozen = state_of(task, mesh)
    programs = task.preview_programs(mesh, shapes.params, frozen)
    assert programs["reconstructions"][1][2].shape == (16, 8, 8, 3)
    images = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
    (steps,) = run_in_chunks(programs["reconstructions"], state.params, frozen, images)
    params = jax.device_get(state.params)
    tokens = encode(task.model, params, normalize(jnp.asarray(images)))
    want = denormalize_to_uint8(decode_steps(task.model, params, tokens))
    assert steps.shape == want.shape == (19, 3, 8, 8, 3)
    close = np.abs(steps.astype(int) - np.asarray(want)) <= 1
    assert close.mean() > 0.99  # sums in another order turn some ties between codes
    pictures = task.preview(programs, state.params, frozen, images)
    assert {name: picture.size for name, picture in pictures.items()} == {
        "reconstructions": (802, 152),
        "reconstruction_scales": (202, 502),
    }


def test_memory_of_a_preview_is_shared_by_the_devices(tiny_task):
    """Compare the temporary memory per device for the same number of images."""
    sizes = {}
    for devices in (1, 4):
        mesh = make_mesh(devices=jax.devices()[:devices])
        _, shapes, frozen = state_of(tiny_task, mesh)
        program, (*args, tokens) = tiny_task.preview_programs(mesh, shapes.params, frozen)["scales"]
        tokens = jax.ShapeDtypeStruct((40, *tokens.shape[1:]), tokens.dtype, sharding=tokens.sharding)
        memory = program.lower(*args, tokens).compile().memory_analysis()
        sizes[devices] = memory.temp_size_in_bytes
    assert sizes[4] < 0.3 * sizes[1], sizes


def test_a_state_has_the_types_that_a_step_returns(digits_dir, tiny_task):
    """A weakly typed array would make jit recompile the step at the second call."""
    for task in (TokenizerTask(tiny_config(digits_dir).tokenizer, 6), tiny_task):
        shapes = jax.eval_shape(lambda task=task: task.init(jax.random.key(0)))
        weak = [
            jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(shapes) if leaf.weak_type
        ]
        assert not weak, weak
