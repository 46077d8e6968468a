"""Conditions that are sequences: captions and embeddings, their encoders and cross-attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close, randomized
from var_jax.conditions import encode_caption
from var_jax.transformer.block import CrossAttention, CrossKeys
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.model import drop_conditions
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

WORDS = ("a", "blue", "on", "red", "star")
SIZES = dict(depth=2, width=32, num_heads=4, num_classes=5, num_codes=16, code_dim=4)
CAPTION = dict(condition="caption", condition_length=6, vocabulary=WORDS, text_depth=1)
EMBEDDING = dict(condition="embedding", condition_length=6, condition_width=3)
TEXTS = ("a red star", "a blue star", "star a red", "", "a red star on blue")
CAPTIONS = np.stack([encode_caption(text, WORDS, 6) for text in TEXTS])
INPUTS = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 20, 4)), (5, 20, 4))
MAPS = [slice(0, 1), slice(1, 5), slice(5, 21)]


def network(kind=NextScale, config=NextScaleConfig, scales=(1, 2, 4), **fields):
    """A tiny transformer and its random parameters."""
    module = kind(config(scales=scales, **SIZES | fields))
    config = module.config
    inputs = jnp.zeros((1, config.length - config.num_start_tokens, 4))
    shapes = jax.eval_shape(module.init, jax.random.key(0), config.null_conditions(1), inputs)["params"]
    return module, randomized(shapes)


@pytest.fixture(scope="module")
def captioned():
    """A network on captions, its parameters, and a jitted function from captions to logits."""
    module, params = network(**CAPTION)
    return module, params, jax.jit(lambda ids: module.apply({"params": params}, ids, INPUTS[: len(ids)]))


def test_words_their_order_and_no_words_change_the_logits(captioned):
    logits = np.asarray(captioned[2](CAPTIONS))
    scale = np.abs(logits).max()
    differences = np.abs(logits[:, None] - logits).max((2, 3)) + 10 * scale * np.eye(5)
    assert differences.min() > 0.01 * scale  # "a red star" and "star a red", too


def test_padding_changes_nothing(captioned):
    logits = captioned[2](CAPTIONS)
    close(captioned[2](CAPTIONS[:4, :3]), logits[:4], 1e-6)


def test_embeddings_condition_likewise():
    module, params = network(**EMBEDDING)
    apply = jax.jit(lambda x: module.apply({"params": params}, x, INPUTS[: len(x)]))
    vectors = np.random.default_rng(0).standard_normal((3, 6, 3)).astype(np.float32)
    vectors[0, 2:] = 0
    vectors[1] = vectors[0, ::-1]
    vectors[2] = 0
    logits = np.asarray(apply(vectors))
    close(apply(vectors[:, :2])[0], logits[0], 1e-6)
    assert np.abs(logits[0] - logits[2]).max() > 0.01 * np.abs(logits).max()


def test_a_dropped_condition_is_no_condition():
    is_dropped = jnp.array([True, False, True, False, True])
    for fields, conditions in (
        (CAPTION, CAPTIONS),
        (EMBEDDING, np.ones((5, 6, 3), np.float32)),
        ({}, np.arange(5, dtype=np.int32)),
    ):
        config = NextScaleConfig(scales=(1, 2, 4), **SIZES, **fields)
        dropped, null = (
            drop_conditions(config, jnp.asarray(conditions), is_dropped),
            config.null_conditions(5),
        )
        assert dropped.dtype == conditions.dtype == null.dtype and dropped.shape == null.shape
        np.testing.assert_array_equal(dropped[::2], null[::2])
        np.testing.assert_array_equal(dropped[1::2], conditions[1::2])


def test_training_drops_captions_to_the_null_that_guidance_uses(captioned):
    """With a dropout of nearly one, all captions of a batch have the losses of no caption."""
    module, params, _ = captioned
    module = module.clone(config=dataclasses.replace(module.config, class_dropout_prob=1 - 1e-9))
    tokens = jnp.zeros((5, 21), jnp.int32)

    @jax.jit
    def losses(ids):
        apply = lambda **kw: module.apply({"params": params}, ids, INPUTS, tokens, method="losses", **kw)[0]
        return apply(train=True, rngs={"dropout": jax.random.key(0)}), apply()

    trained, plain = losses(CAPTIONS)
    close(trained, jnp.broadcast_to(plain[3], trained.shape), 1e-5)


def test_cached_steps_of_unrolled_layers_equal_all_maps_at_once_with_scanned_ones(captioned):
    scanned, params, _ = captioned
    unrolled = scanned.clone(scan_layers=False)

    @jax.jit
    def both(params):
        apply = lambda *args, **kw: unrolled.apply({"params": unrolled.own_layout(params)}, *args, **kw)
        condition, cache, parts = apply(CAPTIONS, method="condition"), apply(5, method="empty_cache"), []
        for k, own in enumerate(MAPS):
            inputs = INPUTS[:, own.start - 1 : own.stop - 1] if k else None
            logits, cache = apply(k, inputs, condition, cache, method="step")
            parts.append(logits)
        return jnp.concatenate(parts, axis=1), scanned.apply({"params": params}, CAPTIONS, INPUTS)

    close(*both(params), 1e-5)
    back = unrolled.checkpoint_layout(unrolled.own_layout(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_blocks_begin_without_cross_attention(captioned):
    params = jax.eval_shape(captioned[0].init, jax.random.key(0), CAPTIONS[:1], INPUTS[:1])["params"]
    assert "cross_attention" in params["blocks"]["layers"] and "class_embedding" not in params
    keys = CrossKeys(*(jnp.ones((1, 2, 4, 8)),) * 2, jnp.ones((1, 2), bool))
    module = CrossAttention(captioned[0].config, jnp.dtype(jnp.float32))
    output, _ = jax.jit(module.init_with_output)(jax.random.key(0), jnp.ones((1, 3, 32)), keys)
    np.testing.assert_array_equal(output, np.zeros((1, 3, 32)))


def test_next_token_transformers_take_captions():
    module, params = network(NextToken, NextTokenConfig, scales=(2,), **CAPTION)
    inputs = INPUTS[:2, :3]

    @jax.jit
    def both(ids):
        apply = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
        condition, cache = apply(ids, method="condition"), apply(2, method="empty_cache")

        def step(cache, i):
            previous = jax.lax.dynamic_slice_in_dim(inputs, jnp.maximum(i, 1) - 1, 1, axis=1)
            logits, cache = apply(i, previous, condition, cache, method="step")
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(4))[1].swapaxes(0, 1), apply(ids, inputs)

    close(*both(CAPTIONS[:2]), 1e-5)


def test_flops_count_encoder_and_cross_attention():
    labels = NextScaleConfig(scales=(1, 2, 4), **SIZES)
    captions, embeddings = (
        NextScaleConfig(scales=(1, 2, 4), **SIZES, **kind) for kind in (CAPTION, EMBEDDING)
    )
    d, rows, depth = 32, 6, 2
    once = 2 * d * d + depth * 4 * rows * d * d  # the vector; keys and values
    text = 24 * rows * d * d + 4 * rows * rows * d
    cross = depth * 21 * (4 * d * d + 4 * rows * d)
    assert training_flops(captions) - training_flops(labels) == 3 * (once + text + cross)
    assert training_flops(embeddings) - training_flops(labels) == 3 * (once + 2 * rows * 3 * d + cross)
    assert generation_flops(captions, 0) - generation_flops(labels, 0) == once + text + cross


def test_conditions_of_another_kind_or_size_are_refused(captioned):
    for ids in (
        np.arange(5),
        np.zeros((5, 6, 3), np.float32),
        np.zeros((5, 6), np.float32),
        np.zeros((5, 7), int),
    ):
        with pytest.raises(ValueError, match=r"conditioned on captions, int32 \[B, up to 6\]; got"):
            captioned[2](ids)
    for fields, message in (
        ({"condition": "prompt"}, "condition must be one of label, caption, embedding; got 'prompt'"),
        ({"condition": "caption"}, "condition_length must be at least 1 with condition=caption, got 0"),
        (EMBEDDING | {"condition_width": 0}, "condition_width must be at least 1 with condition=embedding"),
        (CAPTION | {"text_depth": 0}, "text_depth must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NextScaleConfig(**fields)
