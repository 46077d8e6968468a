"""Tests that `tests/test_shapes.py` runs with the annotations of the networks checked at every call.

Shapes are known when a program is traced, so nothing is compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from var_jax.sampling import sampler
from var_jax.sampling.options import PerScaleOptions
from var_jax.scales import Scales
from var_jax.tokenizer import codebook_updates, dino, discriminator, losses, lpips
from var_jax.tokenizer import model as tokenizer_model
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer import attention
from var_jax.transformer.config import NextTokenConfig
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken
from var_jax.transformer.orders import ORDERS
from var_jax.transformer.positions import ABSOLUTE, MASKS, RELATIVE

B, L, V, C, SIDE = 3, 21, 16, 4, 8
KEY = jax.random.key(0)
IMAGES = jnp.zeros((B, SIDE, SIDE, 3))
TOKENS = jnp.zeros((B, L), jnp.int32)
LABELS = jnp.zeros(B, jnp.int32)
FEATURES = jnp.zeros((B, 4, 4, C))


def trace(function, *args):
    """Call a function with tracers.  (`jax.eval_shape` rebuilds pytrees with leaves that are not arrays.)"""
    outputs = []
    jax.make_jaxpr(lambda args: jax.tree.leaves(outputs.append(function(*args))))(args)
    return outputs[0]


def apply(network, *args, **kwargs):
    """Trace a method of a network."""
    module, params = network
    rngs = {"dropout": KEY}
    return trace(lambda *args: module.apply({"params": params}, *args, rngs=rngs, **kwargs), *args)


def next_token(**fields) -> tuple[NextToken, dict]:
    """A transformer on one map of 4 x 4 tokens, and its abstract parameters."""
    sizes = dict(depth=2, width=32, num_heads=4, num_classes=5, num_codes=V, code_dim=C, scales=(4,))
    module = NextToken(NextTokenConfig(**sizes | fields))
    params = jax.eval_shape(module.init, KEY, LABELS, jnp.zeros((B, 15, C)))["params"]
    return module, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)


def test_the_tokenizer_encodes_decodes_and_trains(tiny_tokenizer):
    module, params = tiny_tokenizer
    assert apply(tiny_tokenizer, IMAGES, method="encode").shape == (B, L)
    assert trace(lambda x: tokenizer_model.encode(module, params, x), IMAGES).shape == (B, L)
    for tokens in (TOKENS, TOKENS[:, :5]):
        assert apply(tiny_tokenizer, tokens, method="decode").shape == IMAGES.shape
        trace(lambda t: tokenizer_model.decode_steps(module, params, t), tokens)
    for changes in (
        {},
        {"remat": True},
        {"dtype": jnp.bfloat16, "encoder_dtype": "float32"},
        {"config": dataclasses.replace(module.config, quantizer_dropout=0.5, dropout=0.5)},
        {"config": dataclasses.replace(module.config, vq_gradient="rotation", l2_normalized=True)},
    ):
        recon = apply((dataclasses.replace(module, **changes), params), IMAGES, train=True)
        assert recon.quantized.targets.shape == (B, L, C)
    terms = trace(losses.image_terms, IMAGES, IMAGES)
    assert {term.shape for term in terms.values()} == {(B,)}
    trace(lambda t, c: losses.entropy_penalty(t, c, 1.0), jnp.zeros((B, L, C)), jnp.zeros((V, C)))


def test_patches_are_features():
    module = Tokenizer(TokenizerConfig(scales=(4, 4), num_codes=V, num_phis=0, patch=2))
    params = {"quantizer": {"codebook": jnp.zeros((V, 12))}}
    assert apply((module, params), IMAGES).images.shape == IMAGES.shape


def test_codebooks_are_updated(tiny_tokenizer):
    module, params = tiny_tokenizer
    quantizer, scales = Quantizer.create(params["quantizer"], module.config), module.config.schedule

    def update(features):
        quantized = quantizer(features)
        counts = codebook_updates.count_codes(quantized.tokens, scales, V, jnp.ones(B))
        dead = codebook_updates.dead_codes(counts, 0.1)
        codebook = codebook_updates.restart(quantizer.codebook, dead, quantized.targets, scales, KEY)
        codebook, _ = codebook_updates.moving_mean(
            codebook, counts.sum(0), quantized.tokens, quantized.targets, 0.9
        )
        fitted = codebook_updates.kmeans(quantizer, features, KEY, jnp.array(True))
        return codebook, fitted, codebook_updates.codebook_use(counts, scales.sides, B)

    trace(update, FEATURES)


def test_discriminators_and_frozen_networks():
    patches, heads = discriminator.PatchDiscriminator(8, 2), discriminator.FeatureHeads(8)
    maps = [jnp.zeros((B, 4, 4, 5)), jnp.zeros((B, 3, 3, 5))]
    logits, _ = trace(patches.init_with_output, KEY, jnp.zeros((B, 16, 16, 3)))
    assert trace(heads.init_with_output, KEY, maps)[0].shape == (B, 25)
    trace(discriminator.hinge, logits, logits)
    trace(discriminator.lecam, logits, logits, jnp.zeros(2))
    trace(discriminator.diff_augment, IMAGES, KEY)
    array = lambda *shape: jnp.zeros(shape)
    channels = (3, *(width for width, layer in zip(lpips.CHANNELS, lpips.LAYERS, strict=True) for _ in layer))
    names = [str(i) for layer in lpips.LAYERS for i in layer]
    conv = {
        name: {"kernel": array(3, 3, before, after), "bias": array(after)}
        for name, before, after in zip(names, channels[:-1], channels[1:], strict=True)
    }
    vgg = {"conv": conv, "linear": {str(i): array(width) for i, width in enumerate(lpips.CHANNELS)}}
    large = array(B, 32, 32, 3)
    assert trace(lpips.perceptual_distance, vgg, large, large).shape == (B,)
    layer = lambda *shape: {"kernel": array(*shape), "bias": array(*shape[:-2], shape[-1])}
    norm = {"scale": array(2, 128), "bias": array(2, 128)}
    blocks = {"norm1": norm, "norm2": norm, "qkv": layer(2, 128, 384), "proj": layer(2, 128, 128)}
    blocks |= {"fc1": layer(2, 128, 512), "fc2": layer(2, 512, 128)}
    vit = {"patch": {"kernel": array(16, 16, 3, 128), "bias": array(128)}, "blocks": blocks}
    vit |= {"class_token": array(1, 128), "positions": array(10, 128)}
    features = lambda vit, x: dino.dino_features(vit, x, (0, 1))
    assert [x.shape for x in trace(features, vit, large)] == [(B, 4, 4, 128)] * 3


@pytest.mark.parametrize("name", ["tiny_var", "tiny_shared_var"])
def test_next_scale_trains_and_generates_step_by_step(name, request):
    network = request.getfixturevalue(name)
    module, params = network
    inputs = jnp.zeros((B, L - 1, C))
    assert apply(network, LABELS, inputs).shape == (B, L, V)
    for changes in ({}, {"remat": "full"}, {"dtype": jnp.bfloat16, "attention": "grouped"}):
        network = (NextScale(module.config, **changes), params)
        assert apply(network, LABELS, inputs, TOKENS, train=True, method="losses")[1].shape == (B, L)

    def generate(labels, inputs):
        condition = module.apply({"params": params}, labels, method="condition")
        cache = module.apply({"params": params}, B, method="empty_cache")
        _, cache = module.apply({"params": params}, 0, None, condition, cache, method="step")
        return module.apply({"params": params}, 1, inputs, condition, cache, method="step")

    logits, cache = trace(generate, LABELS, inputs[:, :4])
    assert logits.shape == (B, 4, V) and cache.k.shape == (2, B, L, 4, 8)


FIELDS = [
    *({"positions": positions} for positions in ("none", *ABSOLUTE, *RELATIVE, "learned_2d+relative_2d")),
    *({"mask": mask, "positions": "rotary_2d"} for mask in MASKS),
    *({"order": order} for order in ORDERS),
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_next_token_trains_and_generates_step_by_step(fields):
    module, params = network = next_token(**fields)
    inputs, tokens = jnp.zeros((B, 15, C)), jnp.zeros((B, 16), jnp.int32)
    assert apply(network, LABELS, inputs, tokens, method="losses")[0].shape == (B, 16)
    trace(lambda t: module.config.to_raster_order(module.config.to_prediction_order(t)), tokens)

    def generate(labels, i, inputs):
        condition = module.apply({"params": params}, labels, method="condition")
        cache = module.apply({"params": params}, B, method="empty_cache")
        return module.apply({"params": params}, i, inputs, condition, cache, method="step")

    assert trace(generate, LABELS, jnp.array(2), inputs[:, :1])[0].shape == (B, 1, V)


@pytest.mark.parametrize("kind", ["caption", "embedding"])
def test_captions_and_embeddings_condition(kind, tiny_var):
    fields = dict(condition=kind, condition_length=3, condition_width=2, vocabulary=("red",))
    module = NextScale(dataclasses.replace(tiny_var[0].config, **fields))
    conditions, inputs = jnp.asarray(module.config.null_conditions(B)), jnp.zeros((B, L - 1, C))
    params = jax.eval_shape(module.init, KEY, conditions, inputs)["params"]
    network = module, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    assert apply(network, conditions, inputs, TOKENS, train=True, method="losses")[0].shape == (B, L)
    assert apply(network, conditions[:, :2], method="condition").cross.k.shape == (2, B, 2, 4, 8)


def test_samplers_draw_images(tiny_tokenizer, tiny_var):
    flat = (Tokenizer(dataclasses.replace(tiny_tokenizer[0].config, scales=(4,))), tiny_tokenizer[1])
    for tokenizer, model in ((tiny_tokenizer, tiny_var), (flat, next_token())):
        networks = sampler.Networks(tokenizer[0], model[0], tokenizer[1], model[1])
        num = len(tokenizer[0].config.scales)
        per_scale = PerScaleOptions(
            *(jnp.ones(num),) * 3, num, (4,) * num, (True,) * num, (num == 1,) * num, num
        )
        keys = sampler.image_keys(0, jnp.arange(B))
        images, _ = trace(sampler.generate, networks, LABELS, keys, per_scale)
        assert images.shape == IMAGES.shape


def test_attention_implementations():
    mask = Scales((1, 3, 5, 7)).mask
    q = jnp.zeros((B, 84, 2, 8))
    bias = jnp.zeros((2, 84, 84))
    for name in ("einsum", "grouped"):
        trace(lambda q, n=name: attention.attend(q, q, q, 1.0, mask, n, bias), q)
    trace(lambda q: attention.splash(q, q, q, 1.0, mask, interpret=True), q)


def test_a_wrong_shape_is_an_error_that_names_the_argument(tiny_tokenizer, tiny_var):
    module, params = tiny_tokenizer
    quantizer = Quantizer.create(params["quantizer"], module.config)
    inputs = jnp.zeros((B, L - 1, C))
    for name, call in (
        ("tokens", lambda: apply(tiny_tokenizer, TOKENS[0], method="decode")),
        ("tokens", lambda: apply(tiny_var, LABELS, inputs, TOKENS[..., None], method="losses")),
        ("tokens", lambda: apply(tiny_var, LABELS, inputs, TOKENS[:-1], method="losses")),
        ("labels", lambda: apply(tiny_var, LABELS[:, None, None], inputs)),
        ("images", lambda: apply(tiny_tokenizer, IMAGES[..., :1], method="encode")),
        ("features", lambda: quantizer(FEATURES[0])),
        ("features", lambda: quantizer(FEATURES[..., :3])),
        ("codes", lambda: quantizer.upsample_and_smooth(2, jnp.zeros((B, 4, 4, C)))),
    ):
        with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
            call()
