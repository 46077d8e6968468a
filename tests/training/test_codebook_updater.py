"""Updates of the codebook, checked by hand on a few codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.quantizer import Quantized
from var_jax.training.codebook_updater import CodebookUpdater, with_codebook
from var_jax.training.state import TrainState

MODEL = TokenizerConfig(scales=(1, 2), num_codes=4, code_dim=2, ch=8, ch_mult=(1,), norm_groups=4, num_phis=0)
KEY = jax.random.key(0)


def make(loaded=False, **fields) -> tuple[CodebookUpdater, TrainState]:
    cfg = tiny_config("none").tokenizer.codebook
    cfg.update(
        {"kmeans_steps": 0, "ema_decay": 0.0, "restart_every": 0, "hits_decay": 0.5, "window": 12, **fields}
    )
    codebook_updater = CodebookUpdater(cfg, MODEL, steps=20, batch=2)
    params = {"quantizer": {"codebook": jnp.arange(8.0).reshape(4, 2)}, "other": jnp.ones(3)}
    return codebook_updater, TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), (), codebook_updater.init(loaded)
    )


def quantized(tokens) -> Quantized:
    """Return two images with the same 1 + 4 tokens; all targets are (10, 10)."""
    tokens = jnp.tile(jnp.array(tokens, jnp.int32), (2, 1))
    return Quantized(tokens, jnp.zeros((2, 2, 2, 2)), jnp.zeros(2), jnp.full((2, 5, 2), 10.0))


def after(codebook_updater, state, tokens, step):
    return codebook_updater.after_step(
        state.replace(step=jnp.asarray(step, jnp.int32)), quantized(tokens), KEY
    )


def codebooks(state):
    return [np.asarray(tree["quantizer"]["codebook"]) for tree in (state.params, state.ema)]


def test_use_is_counted_over_a_window_that_slides_by_halves():
    codebook_updater, state = make()  # 12 images: halves of 3 steps
    most = []
    for step in range(1, 10):
        state, metrics = after(codebook_updater, state, [0, step % 4, 3, 3, 3], step)
        most.append(float(metrics["most_0"]))
        images = float(state.extra["window"]["images"].sum())
        assert images == 2 * {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 4, 8: 5, 9: 6}[step]
    # Of steps 4 to 9, the last two halves: code 0 at the first map, 3 mostly at the second.
    counts = np.asarray(state.extra["window"]["counts"].sum(0))
    np.testing.assert_array_equal(counts[0], [12, 0, 0, 0])
    np.testing.assert_array_equal(counts[1], 2 * np.array([2, 2, 1, 1 + 18]))
    assert most[:3] == [2, 4, 4] and float(metrics["perplexity_0"]) == pytest.approx(1)
    assert float(metrics["code_norm"]) == pytest.approx(np.linalg.norm(codebooks(state)[0], axis=1).mean())


def test_dead_codes_move_onto_targets_in_both_codebooks_when_due_and_start_afresh():
    codebook_updater, state = make(
        restart_every=5, ema_decay=0.9, dead_threshold=0.1, restart_until_fraction=0.5
    )
    state, metrics = after(codebook_updater, state, [0, 1, 1, 0, 0], 4)
    assert float(metrics["dead_codes"]) == 2
    np.testing.assert_array_equal(codebooks(state)[0], np.arange(8).reshape(4, 2))  # not due
    state = state.replace(extra={**state.extra, "code_uses": jnp.full(4, 7.0)})
    moved, _ = after(codebook_updater, state, [0, 1, 1, 0, 0], 5)
    for codebook in codebooks(moved):
        np.testing.assert_array_equal(codebook, [[0, 1], [2, 3], [10, 10], [10, 10]])
    np.testing.assert_array_equal(moved.extra["code_uses"], [7, 7, 0, 0])
    hits = np.asarray(moved.extra["code_hits"])
    np.testing.assert_allclose(hits[:, 2], hits[:, 3])
    share = 0.5 * (0.5 * 2) + 0.5 * 2  # hits a step at the first map
    np.testing.assert_allclose(hits[0], [share, 0, share / 4, share / 4])
    late, _ = after(codebook_updater, state, [0, 1, 1, 0, 0], 15)  # after half of the 20 steps
    np.testing.assert_array_equal(codebooks(late)[0], np.arange(8).reshape(4, 2))


def test_codes_follow_their_targets_and_not_the_optimizer():
    codebook_updater, state = make(ema_decay=0.5)
    assert (
        float(
            jax.grad(lambda p: codebook_updater.stop_codebook_gradient(p)["quantizer"]["codebook"].sum())(
                state.params
            )["other"].sum()
        )
        == 0
    )
    grads = jax.grad(
        lambda p: (codebook_updater.stop_codebook_gradient(p)["quantizer"]["codebook"] ** 2).sum()
    )(state.params)
    assert not grads["quantizer"]["codebook"].any()
    state, codebook = codebook_updater.ema_update(state, quantized([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(codebook, [[10, 10], [10, 10], [4, 5], [6, 7]])
    updated = with_codebook(jax.tree.map(lambda x: 0.5 * x, state.params), codebook)
    np.testing.assert_array_equal(updated["quantizer"]["codebook"], codebook)
    np.testing.assert_array_equal(updated["other"], 0.5)
    np.testing.assert_array_equal(state.extra["code_uses"], [6, 4, 0, 0])


def test_kmeans_in_the_first_steps_unless_the_codebook_was_loaded():
    features = lambda params: jax.random.normal(KEY, (8, 2, 2, 2))
    codebook_updater, state = make(kmeans_steps=3)
    fitted = codebook_updater.before_step(state, features, KEY)
    assert not np.array_equal(codebooks(fitted)[0], codebooks(state)[0])
    np.testing.assert_array_equal(*codebooks(fitted))
    late = codebook_updater.before_step(fitted.replace(step=jnp.asarray(3, jnp.int32)), features, KEY)
    np.testing.assert_array_equal(codebooks(late)[0], codebooks(fitted)[0])
    codebook_updater, state = make(kmeans_steps=3, ema_decay=0.9, loaded=True)
    np.testing.assert_array_equal(
        codebooks(codebook_updater.before_step(state, features, KEY))[0], codebooks(state)[0]
    )
    np.testing.assert_allclose(state.extra["code_uses"], 2 * 5 / 4 / 0.1)  # 10 tokens a step, 4 codes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema_decay": 1.0}, r"codebook.ema_decay must be in \[0, 1\), got 1.0"),
        ({"kmeans_steps": -1}, "codebook.kmeans_steps must be 0 or more, got -1"),
        ({"window": 0}, "codebook.window must be 1 or more, got 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
