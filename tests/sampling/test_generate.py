import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import all_tokens, close
from var_jax.sampling.generate import (
    SamplingOptions,
    generate,
    generate_in_chunks,
    image_keys,
    smooth_codes,
)
from var_jax.sampling.guidance import guide, ramp
from var_jax.scales import Scales


def draw(tiny_tokenizer, tiny_var, labels, seed=0, chunk=4, **options):
    networks = (tiny_tokenizer[0], tiny_var[0], tiny_tokenizer[1], tiny_var[1])
    parts = list(generate_in_chunks(*networks, np.array(labels), seed, SamplingOptions(**options), chunk))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_golden_greedy_generation(golden_var, guidance):
    model, arrays = golden_var
    options = dict(guidance=guidance, top_k=1, top_p=0.0, return_tokens=True)
    images, tokens = model.generate(arrays["label"], **options)
    np.testing.assert_array_equal(tokens, all_tokens(arrays, f"cfg{guidance}_tokens"))
    close(images, arrays[f"cfg{guidance}_image"].transpose(0, 2, 3, 1))


def test_golden_logits_after_guidance(golden_var, golden_tokenizer):
    model, arrays = golden_var
    tokens, scales = all_tokens(arrays, "cfg4.0_tokens"), model.module.config.schedule
    labels = arrays["label"]
    conditional = model.logits(tokens, labels)
    unconditional = model.logits(tokens, np.full_like(labels, model.num_classes))
    for k, (start, end) in enumerate(zip(scales.starts, scales.ends, strict=True)):
        both = np.concatenate([conditional, unconditional])[:, start:end]
        close(guide(both, ramp(4.0, scales)[k]), arrays[f"cfg4.0_logits_{k}"])


def test_same_seed_same_images(tiny_tokenizer, tiny_var):
    images, tokens = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=3)
    again, _ = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=3)
    _, other = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=4)
    np.testing.assert_array_equal(images, again)
    assert (tokens != other).mean() > 0.3
    assert images.min() >= 0 and images.max() <= 1 and images.shape == (4, 8, 8, 3)


def test_an_image_does_not_depend_on_its_chunk_and_the_last_chunk_compiles_nothing(tiny_tokenizer, tiny_var):
    labels = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    _, whole = draw(tiny_tokenizer, tiny_var, labels, chunk=10)
    draw(tiny_tokenizer, tiny_var, labels[:4], chunk=4)
    compiled = generate._cache_size()
    images, tokens = draw(tiny_tokenizer, tiny_var, labels, chunk=4)  # 4, 4 and 2
    assert generate._cache_size() == compiled
    assert len(images) == 10
    np.testing.assert_array_equal(tokens, whole)


def test_strength_and_top_p_change_without_compiling(tiny_tokenizer, tiny_var):
    draw(tiny_tokenizer, tiny_var, [0], guidance=1.0, top_p=0.9)
    compiled = generate._cache_size()
    draw(tiny_tokenizer, tiny_var, [0], guidance=2.0, top_p=0.5)
    assert generate._cache_size() == compiled


def test_samples_follow_the_probabilities(tiny_tokenizer, tiny_var):
    """The first token of many images has the distribution that the logits give it."""
    n = 4000
    _, tokens = draw(tiny_tokenizer, tiny_var, [2] * n, chunk=1000, guidance=0.0, top_k=0, top_p=0.0)
    logits = tiny_var[0].apply({"params": tiny_var[1]}, jnp.array([2]), jnp.zeros((1, 20, 4)))[0, 0]
    shares = np.bincount(tokens[:, 0], minlength=16) / n
    want = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(shares, want, atol=4 * np.sqrt(want.max() / n))
    assert (shares > 0).sum() > 5


def test_guidance_ramp():
    np.testing.assert_allclose(ramp(3.0, Scales((1, 2, 3, 4))), [0, 1, 2, 3], rtol=1e-6)
    np.testing.assert_array_equal(ramp(3.0, Scales((4,))), [3])


def test_smooth_codes_go_from_mixtures_to_single_codes():
    logits = jnp.array([[[2.0, 1.0, 0.0]]])
    codes, noise = jnp.eye(3), jnp.zeros((1, 1, 3))
    early = smooth_codes(logits, noise, codes, 0.0)[0, 0]
    np.testing.assert_allclose(early, jax.nn.softmax(logits[0, 0] / 0.27), rtol=1e-5)
    late = smooth_codes(logits, noise, codes, 1.0)[0, 0]
    np.testing.assert_allclose(late, jax.nn.softmax(2 * logits[0, 0] / 0.0135), atol=1e-6)
    assert early.max() < 0.98 < late.max()


def test_smooth_generation_is_seeded_too(tiny_tokenizer, tiny_var):
    images, tokens = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1, smooth=True)
    again, _ = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1, smooth=True)
    sharp, _ = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1)
    np.testing.assert_array_equal(images, again)
    assert np.abs(images - sharp).max() > 1e-3 and tokens.shape == (2, 21)


def test_keys_depend_on_seed_and_index_alone():
    data = lambda seed, *indices: jax.random.key_data(image_keys(seed, np.array(indices)))  # noqa: E731
    np.testing.assert_array_equal(data(0, 3, 7)[1], data(0, 7)[0])
    assert (data(0, 7) != data(1, 7)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
