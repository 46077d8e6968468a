import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import schema
from tests.helpers.arrays import close
from var_jax.interop.published import next_scale_table, tokenizer_table
from var_jax.training.optimizer import accumulated_gradients, decay_mask, make_optimizer, update_ema

# Published names of what does not decay; nor does any array with one axis.
NO_DECAY = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul", "bias", "ema_vocab_hit_SV")


@pytest.mark.parametrize("fixture", ["tiny_var", "tiny_shared_var", "tiny_tokenizer"])
def test_weight_decay_groups_are_the_published_ones(fixture, request):
    module, params = request.getfixturevalue(fixture)
    table = (tokenizer_table if fixture == "tiny_tokenizer" else next_scale_table)(module.config)
    mask, flat = flatten_dict(decay_mask(params), sep="/"), flatten_dict(params, sep="/")
    assert set(mask) <= {entry.path for entry in table}
    for entry in table:
        if entry.path in mask:
            dimensions = flat[entry.path].ndim - entry.stacked
            named = any(word in name for word in NO_DECAY for name in entry.names)
            assert mask[entry.path] == (dimensions > 1 and not named), entry.path


def test_one_step_against_adamw_on_paper():
    cfg = schema.transformer_stage().train
    cfg.update(
        dict(batch=256, base_learning_rate=0.1, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.5)
    )
    cfg.update(dict(weight_decay_end=0.5, grad_clip_norm=1.0, b1=0.9, b2=0.95))
    optimizer = make_optimizer(cfg, steps=10)
    params = {"a": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 100.0), params)  # clipped; Adam divides its size away
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["bias"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * (1 + 0.5 * 3.0), rtol=1e-4)


def test_the_learning_rate_follows_the_batch():
    cfg = schema.transformer_stage().train
    cfg.update(
        dict(batch=768, warmup_fraction=0.0, lr_schedule="constant", weight_decay=0.0, weight_decay_end=0.0)
    )
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = make_optimizer(cfg, 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -3e-4, rtol=1e-4)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    batch = {"x": jax.random.normal(jax.random.key(1), (12, 3))}

    def loss(params, batch, key):
        y = jnp.tanh(batch["x"] @ params["w"])
        return (y**2).mean(), ({"loss": (y**2).mean()}, y)

    gradient = jax.grad(loss, has_aux=True)
    whole, (metrics, y) = accumulated_gradients(gradient, params, batch, jax.random.key(0), 1)
    parts, (metrics4, y4) = accumulated_gradients(gradient, params, batch, jax.random.key(0), 4)
    close(parts["w"], whole["w"], 1e-6)
    close(metrics4["loss"], metrics["loss"], 1e-6)
    close(y4, y, 1e-6)  # in the order of the batch


def test_ema_is_quick_at_first_and_slow_later():
    ema, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    assert float(update_ema(ema, params, 0.999, jnp.array(0))["w"][0]) == pytest.approx(0.9)
    assert float(update_ema(ema, params, 0.999, jnp.array(10**6))["w"][0]) == pytest.approx(0.001, rel=1e-3)
