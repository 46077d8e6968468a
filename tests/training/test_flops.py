"""FLOPs counted from a jaxpr: equal to XLA's count where that is right, and equal on every platform."""

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.tiny import tiny_config
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.task import program_flops
from var_jax.training.tokenizer_task import TokenizerTask

IMAGES = jax.ShapeDtypeStruct((2, 13, 16, 6), jnp.float32)


def xla_flops(function, *inputs) -> float:
    """Return the FLOPs by the cost analysis of XLA's CPU backend."""
    return jax.jit(function).lower(*inputs).cost_analysis()["flops"]


def convolution(**options):
    kernel = jax.ShapeDtypeStruct((3, 5, 6 // options.get("feature_group_count", 1), 12), jnp.float32)
    order = ("NHWC", "HWIO", "NHWC")
    return lambda x, k: jax.lax.conv_general_dilated(x, k, **options, dimension_numbers=order), kernel


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="SAME"),
        dict(window_strides=(2, 3), padding=((0, 1), (2, 0))),
        dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 1)),
        dict(window_strides=(1, 1), padding=((2, 2), (4, 4)), lhs_dilation=(2, 2)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=3),
    ],
)
def test_convolutions_count_as_in_xla(options):
    apply, kernel = convolution(**options)
    assert program_flops(apply, IMAGES, kernel) == xla_flops(apply, IMAGES, kernel) > 1e5


def test_gradients_of_a_convolution_count_as_in_xla():
    apply, kernel = convolution(window_strides=(2, 2), padding="SAME")

    def gradients(x, k, g):
        y, backward = jax.vjp(apply, x, k)
        return y, backward(g)

    inputs = (IMAGES, kernel, jax.eval_shape(apply, IMAGES, kernel))
    assert program_flops(gradients, *inputs) == xla_flops(gradients, *inputs)


def test_products_count_in_scans_branches_and_rematerialised_functions():
    w = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = 2 * 8**3
    product = lambda w: w @ w
    scanned = lambda w: jax.lax.scan(lambda carry, _: (carry @ w, None), w, length=5)[0]
    assert program_flops(scanned, w) == 5 * one
    branches = lambda w: jax.lax.cond(w[0, 0] > 0, scanned, product, w)
    assert program_flops(branches, w) == 5 * one
    assert program_flops(jax.jit(jax.checkpoint(product)), w) == one
    assert program_flops(jax.vmap(lambda w, v: v @ w, (None, 0)), w, w) == one
    own = jax.custom_vjp(product)
    own.defvjp(lambda w: (product(w), w), lambda w, g: (g @ w + w @ g,))
    assert program_flops(own, w) == one
    assert program_flops(jax.grad(lambda w: own(w).sum()), w) == 3 * one


def test_a_loop_of_unknown_length_is_refused():
    loop = lambda w: jax.lax.while_loop(lambda w: w[0, 0] < 1, lambda w: w @ w, w)
    with pytest.raises(ValueError, match="cannot count the FLOPs of while"):
        program_flops(loop, jnp.zeros((8, 8)))


@pytest.mark.parametrize("method", ["encode", "__call__"])
def test_a_tokenizer_counts_as_in_xla_but_for_what_is_no_product(method):
    """XLA also counts norms and activations, few FLOPs compared with convolutions of 64 channels."""
    model = Tokenizer(
        TokenizerConfig(scales=(1, 2, 4), num_codes=64, code_dim=16, ch=64, ch_mult=(1, 2, 2), num_blocks=1)
    )
    images = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    apply = lambda params, images: model.apply({"params": params}, images, method=method)
    counted = program_flops(apply, params, images)
    assert 5e7 < counted == pytest.approx(xla_flops(apply, params, images), rel=0.03)


def test_training_needs_no_cost_analysis(monkeypatch):
    """Lowered programs have no cost analysis on GPU, and `train.py` counts FLOPs before its first step."""
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    stage = tiny_config("none").tokenizer
    with_adversary = TokenizerTask(stage, 10).flops_per_image()
    stage.adversarial.weight = 0.0
    assert with_adversary > 1.1 * TokenizerTask(stage, 10).flops_per_image() > 1e5
