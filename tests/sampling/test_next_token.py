"""Sampling token by token, with the sampler of the token maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close, randomized
from var_jax.sampling.options import SamplingOptions, guide
from var_jax.sampling.sampler import KnownTokens, Networks, generate_in_chunks, teacher_forced_logits
from var_jax.sampling.teacher_forcing import teacher_forcing
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.config import NextTokenConfig
from var_jax.transformer.next_token import NextToken
from var_jax.transformer.orders import ORDERS, prediction_order


@pytest.fixture(scope="module")
def flat_tokenizer(tiny_tokenizer):
    """The tiny tokenizer with one map of 4x4 tokens, and no phi."""
    module = Tokenizer(dataclasses.replace(tiny_tokenizer[0].config, scales=(4,), num_phis=0))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return module, randomized(shapes)


def next_token(order):
    """A network of two blocks along an order, and its parameters."""
    module = NextToken(
        NextTokenConfig(
            depth=2,
            width=32,
            num_heads=4,
            num_classes=5,
            num_codes=16,
            code_dim=4,
            scales=(4,),
            positions="rotary_2d",
            order=order,
        )
    )
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 15, 4)))
    return module, randomized(jax.eval_shape(module.init, jax.random.key(0), *blank)["params"], 1)


@pytest.fixture(scope="module")
def spiral():
    return next_token("spiral_in")


def draw(tokenizer, model, labels, seed=0, known=None, **options):
    networks = Networks(tokenizer[0], model[0], tokenizer[1], model[1])
    parts = generate_in_chunks(networks, np.array(labels), seed, SamplingOptions(**options), 4, known=known)
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_every_token_is_the_likeliest_of_its_teacher_forced_logits(flat_tokenizer, spiral, guidance):
    labels = np.array([0, 3, 4], np.int32)
    images, tokens = draw(flat_tokenizer, spiral, labels, guidance=guidance, top_k=1, top_p=0.0)
    networks = Networks(flat_tokenizer[0], spiral[0], flat_tokenizer[1], spiral[1])
    both = [teacher_forced_logits(networks, x, tokens) for x in (labels, np.full_like(labels, 5))]
    logits = guide(np.stack(both, 1).reshape(-1, 16, 16), guidance)  # a single scale gets all the guidance
    np.testing.assert_array_equal(np.argmax(logits, -1), tokens)
    decoded = flat_tokenizer[0].apply({"params": flat_tokenizer[1]}, tokens, method="decode")
    close(images, decoded / 2 + 0.5, 1e-5)


def test_tokens_are_drawn_with_their_probabilities(flat_tokenizer, spiral):
    """Check the second token of the spiral, after its most frequent first token."""
    _, tokens = draw(flat_tokenizer, spiral, [2] * 3000, guidance=0.0, top_k=0, top_p=0.0)
    first = np.bincount(tokens[:, 0]).argmax()
    partners = tokens[tokens[:, 0] == first, 1]
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, 0] = first
    networks = Networks(flat_tokenizer[0], spiral[0], flat_tokenizer[1], spiral[1])
    want = np.asarray(jax.nn.softmax(teacher_forced_logits(networks, np.array([2]), tokens)[0, 1]))
    shares = np.bincount(partners, minlength=16) / len(partners)
    np.testing.assert_allclose(shares, want, atol=4 * np.sqrt(want.max() / len(partners)))


def test_known_tokens_stay_and_the_tokens_before_them_do_not_see_them(flat_tokenizer, spiral):
    cells, labels = spiral[0].config.cells, [0, 1, 2]
    before, after = cells[:8], cells[8:]
    _, tokens = draw(flat_tokenizer, spiral, labels, seed=3)
    other = (tokens + 1) % 16

    def resampled(known_tokens, resampled_cells):
        resample = np.zeros(tokens.shape, bool)
        resample[:, resampled_cells] = True
        known = KnownTokens(known_tokens, resample)
        return draw(flat_tokenizer, spiral, labels, seed=7, known=known)[1]

    one, two = resampled(tokens, before), resampled(other, before)
    np.testing.assert_array_equal(one[:, after], tokens[:, after])
    np.testing.assert_array_equal(two[:, after], other[:, after])
    np.testing.assert_array_equal(one[:, before], two[:, before])  # no later token is visible
    one, two = resampled(tokens, after), resampled(other, after)  # earlier tokens are visible
    assert (one[:, after] != two[:, after]).mean() > 0.1


@pytest.mark.parametrize("name", ORDERS)
def test_a_token_moves_no_logit_before_it_in_the_order(flat_tokenizer, name):
    """Check each order from tokens to logits, both row by row."""
    model, cells = next_token(name), prediction_order(name, 4)
    networks = Networks(flat_tokenizer[0], model[0], flat_tokenizer[1], model[1])
    tokens = np.random.default_rng(0).integers(0, 16, (1, 16)).astype(np.int32)
    logits = teacher_forced_logits(networks, np.array([2]), tokens)
    for j in (0, 6, 14):
        other = tokens.copy()
        other[:, cells[j]] = (other[:, cells[j]] + 1) % 16
        changed = np.abs(teacher_forced_logits(networks, np.array([2]), other) - logits).max((0, 2))
        assert changed[cells[: j + 1]].max() == 0 and changed[cells[j + 1]] > 1e-3


def test_teacher_forcing_follows_the_order(flat_tokenizer, spiral):
    config = spiral[0].config
    tokens = np.random.default_rng(0).integers(0, 16, (2, 16)).astype(np.int32)
    quantizer = Quantizer.create(flat_tokenizer[1]["quantizer"], flat_tokenizer[0].config)
    targets, inputs = teacher_forcing(config, quantizer, jnp.asarray(tokens))
    np.testing.assert_array_equal(targets, tokens[:, config.cells])
    np.testing.assert_array_equal(inputs, quantizer.codes[targets[:, :-1]])
    np.testing.assert_array_equal(config.to_raster_order(targets), tokens)
