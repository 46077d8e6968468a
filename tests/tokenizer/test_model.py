import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import all_tokens, close
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.losses import image_terms, weighted_sum
from var_jax.tokenizer.model import Tokenizer, decode


def test_golden_features_and_tokens(golden, golden_tokenizer):
    arrays = golden("vae")
    variables = {"params": golden_tokenizer.params}
    close(golden_tokenizer.module.apply(variables, arrays["image"], method="features"), arrays["features"])
    tokens = golden_tokenizer.encode(np.clip(arrays["image"] / 2 + 0.5, 0, 1))
    np.testing.assert_array_equal(tokens, all_tokens(arrays))


def test_golden_reconstructions_after_every_map(golden, golden_tokenizer):
    arrays = golden("vae")
    tokens, ends = all_tokens(arrays), golden_tokenizer.module.config.schedule.ends
    for k, end in enumerate(ends):
        images = decode(golden_tokenizer.module, golden_tokenizer.params, jnp.asarray(tokens[:, :end]))
        close(images, arrays[f"reconstruction_{k}"])


def test_training_pass_passes_gradients_to_every_parameter(tiny_tokenizer):
    module, params = tiny_tokenizer
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1)

    def loss(params):
        output = module.apply({"params": params}, images, train=True)
        terms = image_terms(images, output.images) | {"codebook": output.quantized.loss}
        return weighted_sum(terms, {"l2": 1.0, "l1": 0.2, "codebook": 1.0}).mean()

    grads = jax.jit(jax.grad(loss))(params)
    zero_gradients = [
        jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()
    ]
    assert zero_gradients == []


def test_keeping_little_for_the_backward_pass_changes_no_number(tiny_tokenizer):
    module, params = tiny_tokenizer
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1)
    loss = lambda params, remat: jnp.mean(
        dataclasses.replace(module, remat=remat).apply({"params": params}, images, train=True).images ** 2
    )
    saved_all, rematerialized = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True)
    )
    assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), saved_all, rematerialized)


def test_a_share_of_the_images_is_decoded_from_fewer_maps(tiny_tokenizer):
    config = dataclasses.replace(tiny_tokenizer[0].config, quantizer_dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}
    keep = Tokenizer(config).apply({}, 3000, rngs=rngs, method="_draw_num_maps")
    shares = np.bincount(keep, minlength=4) / 3000
    np.testing.assert_allclose(shares, [0, 0.25, 0.25, 0.5], atol=0.03)
    single = dataclasses.replace(config, scales=(4,))
    assert set(np.array(Tokenizer(single).apply({}, 30, rngs=rngs, method="_draw_num_maps"))) == {1}


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match=r"unknown terms \['lpips'\].*'codebook'"):
        weighted_sum({"l2": 1.0, "codebook": 2.0}, {"lpips": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ch": 20}, "norm_groups=32 must divide"),
        ({"ch_mult": ()}, "ch_mult must be multipliers"),
        ({"num_codes": 0}, "num_codes must be at least 1"),
        ({"num_phis": -1}, "num_phis must be 0"),
        ({"vq_gradient": "none"}, r"must be one of \('straight_through', 'rotation'\), got 'none'"),
        ({"quantizer_dropout": 1.0}, r"quantizer_dropout must be in \[0, 1\)"),
        ({"scales": (2, 1)}, "1 follows 2"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)


def test_published_sizes():
    config = TokenizerConfig()
    assert (config.image_size, config.downsample, config.schedule.length) == (256, 16, 680)
