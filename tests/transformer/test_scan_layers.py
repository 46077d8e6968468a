"""Layers scanned and unrolled: one checkpoint layout, the same numbers."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close, randomized
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, generate, image_keys
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig
from var_jax.transformer.layer_params import stack_layers, unstack_layers
from var_jax.transformer.model import Blocks, choose_scan
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

SIZES = dict(depth=3, width=32, num_heads=4, num_classes=5, num_codes=16, code_dim=4)


@pytest.fixture(scope="module", params=["adaLN per block", "shared adaLN", "next-token"])
def networks(request):
    """A scanned and an unrolled network, and their common parameters in the layout of checkpoints."""
    if request.param == "next-token":
        scanned = NextToken(NextTokenConfig(scales=(4,), mask="axial", drop_path=0.3, **SIZES))
    else:
        shared = request.param == "shared adaLN"
        scanned = NextScale(
            NextScaleConfig(scales=(1, 2, 4), shared_adaln=shared, dropout=0.1, drop_path=0.3, **SIZES)
        )
    config = scanned.config
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, config.length - config.num_start_tokens, 4)))
    params = randomized(jax.eval_shape(scanned.init, jax.random.key(0), *blank)["params"])
    unrolled = scanned.clone(scan_layers=False)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(unrolled.init(jax.random.key(0), *blank))["params"])
    assert jax.tree.map(jnp.shape, unstack_layers(params)) == jax.tree.map(jnp.shape, shapes)
    return scanned, unrolled, params


def test_layouts_are_inverse(networks):
    _, _, params = networks
    back = stack_layers(unstack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    on_host = unstack_layers(jax.tree.map(np.asarray, params))
    assert {type(leaf) for leaf in jax.tree.leaves(on_host)} == {np.ndarray}
    jax.tree.map(np.testing.assert_array_equal, on_host, unstack_layers(params))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_losses_and_gradients_are_equal(networks, remat):
    config, params = networks[0].config, networks[2]
    labels, tokens = jnp.array([0, 5]), jnp.arange(2 * config.length).reshape(2, -1) % 16
    inputs = jax.random.normal(jax.random.key(0), (2, config.length - config.num_start_tokens, 4))

    def loss(params, module):
        variables = {"params": module.own_layout(params)}
        rngs = {"dropout": jax.random.key(3)}
        return module.apply(variables, labels, inputs, tokens, train=True, rngs=rngs, method="losses")[
            0
        ].mean()

    results = [
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, module.clone(remat=remat))
        for module in networks[:2]
    ]
    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-6)
    jax.tree.map(lambda got, want: close(got, want, 1e-6), results[1][1], results[0][1])


def test_generation_is_equal(networks, tiny_tokenizer):
    tokenizer, tokenizer_params = tiny_tokenizer
    config = networks[0].config
    if not config.predicts_maps:
        tokenizer = tokenizer.clone(config=dataclasses.replace(tokenizer.config, scales=(4,)))
    per_scale = SamplingOptions(guidance_until=2 if config.predicts_maps else None).per_scale(
        config.schedule, 16
    )
    labels, keys = jnp.array([0, 3]), image_keys(0, jnp.arange(2))
    images, tokens = zip(
        *(
            generate(
                Networks(tokenizer, module, tokenizer_params, module.own_layout(networks[2])),
                labels,
                keys,
                per_scale,
            )
            for module in networks[:2]
        ),
        strict=True,
    )
    np.testing.assert_array_equal(*tokens)
    close(*images, 1e-5)


def test_unrolled_layers_recompute_behind_a_barrier(networks):
    """Without it XLA finds the recomputed activations equal to those of the forward pass, and saves them."""
    scanned, unrolled, params = networks
    config = scanned.config
    x = jnp.zeros((1, config.length, config.width))
    modulations = jnp.zeros((config.depth, 1, 6, config.width))
    for module in (scanned, unrolled):
        own = module.own_layout(params)["blocks"]
        blocks = Blocks(config, jnp.dtype(jnp.float32), "einsum", "full", module.scan_layers)
        run = lambda own, blocks=blocks: blocks.apply(
            {"params": own}, x, modulations, train=True, rngs={"dropout": jax.random.key(0)}
        )[0]
        text = str(jax.make_jaxpr(run)(own))
        assert set(re.findall(r"prevent_cse=(\w+)", text)) == {str(not module.scan_layers)}


def test_a_step_reads_the_weights_of_unrolled_layers_in_place(tiny_tokenizer):
    """No copy, slice or transpose of a weight in the program that generates one image."""
    config = NextScaleConfig(scales=(1, 2, 4), **SIZES | dict(width=48, num_heads=3))
    sizes = {48 * n * 48 for n in (1, 3, 4)}  # kernels of projection, qkv, and MLP

    def copies(scan_layers):
        module = NextScale(config, scan_layers=scan_layers)
        blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 20, 4)))
        init = lambda: nn.meta.unbox(module.init(jax.random.key(0), *blank))["params"]
        params = jax.eval_shape(init)
        tokenizer, tokenizer_params = tiny_tokenizer
        networks = Networks(tokenizer, module, tokenizer_params, params)
        per_scale = SamplingOptions().per_scale(config.schedule, 16)
        args = (networks, jnp.array([0]), image_keys(0, jnp.arange(1)), per_scale)
        text = generate.lower(*args).compile().as_text()
        moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|dynamic-slice|slice|transpose)\(", text)
        return [shape for shape in moved if np.prod([int(n) for n in shape.split(",")]) in sizes]

    assert not copies(scan_layers=False)
    assert copies(scan_layers=True)


def test_layers_are_unrolled_on_a_gpu_and_to_sample_on_a_cpu():
    platforms = ("cpu", "gpu", "tpu")
    assert [choose_scan("auto", platform) for platform in platforms] == [True, False, True]
    assert [choose_scan("auto", platform, sampling=True) for platform in platforms] == [False, False, True]
    assert [choose_scan(choice, "gpu") for choice in ("true", "false")] == [True, False]
    with pytest.raises(ValueError, match="scan_layers must be auto, true or false; got 'yes'"):
        choose_scan("yes", "cpu")
