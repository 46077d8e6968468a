"""Adversarial training: gradients of both networks, the adaptive weight, and regularization."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests.helpers.arrays import close
from tests.helpers.tiny import tiny_config
from var_jax.images import normalize
from var_jax.sharding import make_mesh
from var_jax.tokenizer.discriminator import hinge
from var_jax.training.state import create_state
from var_jax.training.tokenizer_task import LAST_LAYER, TokenizerTask

STEPS = 20
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)}
KEY = jax.random.key(5)


def make(weight=0.4, frozen=None, **fields):
    """Return a task and its initial state, with the codebook trained by its gradient."""
    config = tiny_config("none").tokenizer
    config.codebook.update(dict(kmeans_steps=0, ema_decay=0.0, restart_every=0))
    config.model.quantizer_dropout = 0.0
    fields = dict(start_fraction=0.25, warmup_fraction=0.5, augment=False) | fields
    config.adversarial.update(dict(weight=weight, layers=1, channels=8, **fields))
    task = TokenizerTask(config, STEPS, frozen)
    make_state, _ = create_state(
        task.init, task.optimizer, False, jax.random.key(0), make_mesh(devices=jax.devices()[:1])
    )
    return task, make_state()


def at(state, step):
    return state.replace(step=jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module")
def with_adversary():
    task, state = make()
    return task, state, jax.jit(lambda state: task.train_step(state, {}, BATCH, KEY).state_and_metrics())


@pytest.fixture(scope="module")
def plain():
    task, state = make(weight=0.0)
    return jax.jit(lambda state: task.train_step(state, {}, BATCH, KEY).state_and_metrics())(state)


def test_before_its_start_the_numbers_are_those_of_the_plain_losses(with_adversary, plain):
    _, state, step = with_adversary
    assert "adversary" not in plain[0].extra
    after, metrics = step(state)
    chex.assert_trees_all_close(after.params, plain[0].params, atol=1e-8)  # two programs, fused otherwise
    chex.assert_trees_all_equal(after.extra["adversary"], state.extra["adversary"])
    assert float(metrics["loss"]) == pytest.approx(float(plain[1]["loss"]), rel=1e-6)
    for name in ("adversarial", "adversarial_weight", "discriminator"):
        assert float(metrics[name]) == 0


def test_each_loss_reaches_its_own_parameters_alone(with_adversary, plain):
    task, state, step = with_adversary
    running = at(state, 12)
    after, metrics = step(running)
    # The discriminator learns from its hinge on these images and their fixed reconstructions.
    real = normalize(BATCH["image"])
    fake = jax.jit(task.model.apply)({"params": state.params}, real).images
    judge = lambda params: hinge(*(task.adversary.logits(params, {}, x, KEY) for x in (real, fake)))
    loss, grads = jax.jit(jax.value_and_grad(judge))(state.extra["adversary"]["params"])
    close(metrics["discriminator"], loss, 1e-5)
    moments = after.extra["adversary"]["opt_state"][1][0].mu
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
    close(metrics["discriminator_gradient_norm"], norm, 1e-5)
    scale = 0.5 * min(1, task.stage.adversarial.train.grad_clip_norm / norm)  # 1 - b1
    chex.assert_trees_all_close(moments, jax.tree.map(lambda g: scale * g, grads), atol=1e-6)
    # With another discriminator the tokenizer moves otherwise: its loss does reach the tokenizer.
    assert not np.array_equal(after.params["decoder"]["conv_out"]["kernel"], _kernel(plain[0]))


def _kernel(state):
    return state.params["decoder"]["conv_out"]["kernel"]


def test_the_weight_is_the_ratio_of_gradients_at_the_last_layer(with_adversary):
    """Compare with two backward passes to the last kernel, and the gradient of the weighted sum."""
    task, state, _ = with_adversary
    images, params, adversary = normalize(BATCH["image"]), state.params, state.extra["adversary"]
    output = lambda params: task.model.apply({"params": params}, images, train=True)

    def rebuild(params):
        error = output(params).images - images
        return task.weights["l2"] * jnp.mean(error**2)

    def fool(params):
        logits = task.adversary.model.apply({"params": adversary["params"]}, output(params).images)
        return -logits.mean()

    def norm(loss):
        leaf = jax.jit(jax.grad(loss))(params)
        for name in LAST_LAYER:
            leaf = leaf[name]
        return jnp.linalg.norm(leaf)

    ratio = jnp.clip(norm(rebuild) / (norm(fool) + 1e-4), 0.015, 1e4)
    grads, (metrics, _) = jax.jit(task._gradient)(params, state.extra, {}, BATCH, 9, KEY)
    weight = 0.4 * (9 - 5 + 1) / 10  # the fifth step of ten that it rises in
    close(metrics["adversarial_weight"], weight * ratio)

    def weighted_sum(params):
        codebook = task.weights["codebook"] * output(params).quantized.loss.mean()
        return rebuild(params) + codebook + weight * ratio * fool(params)

    close(ravel_pytree(grads)[0], ravel_pytree(jax.jit(jax.grad(weighted_sum))(params))[0])


def test_the_weight_rises_from_its_start():
    adversary = make()[0].adversary
    np.testing.assert_allclose(
        [float(adversary.weight(step)) for step in (0, 4, 5, 9, 14, 19)],
        [0, 0, 0.04, 0.2, 0.4, 0.4],
        rtol=1e-5,
    )


def test_r1_is_half_the_squared_slope_at_real_images_and_lecam_uses_the_moving_means():
    task, state = make(r1=10.0, lecam=0.1)
    params, part = state.extra["adversary"]["params"], {"real": jnp.full((2, 8, 8, 3), 0.3)}
    part["fake"] = -part["real"]
    means = jnp.array([0.5, -0.5])
    loss, (metrics, _) = jax.jit(lambda params: task.adversary._loss(params, means, {}, part, KEY))(params)
    judge = jax.jit(lambda x: task.adversary.model.apply({"params": params}, x))
    slopes = [jax.grad(lambda x: judge(x[None]).mean())(image) for image in part["real"]]
    r1 = 5.0 * np.mean([float(jnp.sum(slope**2)) for slope in slopes])
    means_apart = jnp.mean((judge(part["real"]) + 0.5) ** 2) + jnp.mean((judge(part["fake"]) - 0.5) ** 2)
    np.testing.assert_allclose(loss, metrics["discriminator"] + r1 + 0.1 * means_apart, rtol=1e-4)
    assert r1 > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "resnet"}, r"network must be one of \('patch', 'dino'\), got 'resnet'"),
        ({"start_fraction": 1.0}, r"adversarial.start_fraction must be a share in \[0, 1\), got 1.0"),
        ({"r1": -1.0}, "adversarial.r1 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_too_many_layers_for_small_images_are_refused():
    config = tiny_config("none").tokenizer
    config.adversarial.update(dict(weight=0.4, layers=3))
    with pytest.raises(ValueError, match="layers=3 leaves nothing of images of 8 pixels"):
        TokenizerTask(config, STEPS)


def random_dino(depth=4, width=64) -> dict:
    rng, linear = np.random.default_rng(0), {}
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)
    for name, rows, columns in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1)):
        kernel = draw(depth, rows * width, columns * width)
        linear[name] = {"kernel": kernel, "bias": jnp.zeros((depth, columns * width))}
    norm = {"scale": jnp.ones((depth, width)), "bias": jnp.zeros((depth, width))}
    return {
        "patch": {"kernel": draw(16, 16, 3, width), "bias": jnp.zeros(width)},
        "class_token": draw(1, width),
        "positions": draw(17, width),
        "blocks": {**linear, "norm1": norm, "norm2": norm},
    }


def test_heads_on_dino_learn():
    task, state = make(network="dino", frozen={"dino": random_dino()}, train=dict(base_learning_rate=0.05))
    adversary, real = state.extra["adversary"], normalize(BATCH["image"])
    step = jax.jit(lambda adversary: task.adversary.train_step(adversary, task.frozen, real, -real, KEY, 12))
    first = step(adversary)[1]
    for _ in range(5):
        adversary, metrics = step(adversary)
    assert float(metrics["discriminator"]) < float(first["discriminator"])
    assert float(metrics["logits_real"]) > float(metrics["logits_fake"])
