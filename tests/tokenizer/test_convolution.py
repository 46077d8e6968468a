import jax
import jax.numpy as jnp
import pytest

from tests.helpers.arrays import close
from var_jax.tokenizer import convolution
from var_jax.tokenizer.autoencoder import Conv3x3


def gradients(x):
    """Return gradients with respect to input, kernel and bias, and the number of products."""
    module = Conv3x3(5, precision="highest")
    params = module.init(jax.random.key(0), x)["params"]
    loss = lambda x, params: jnp.sum(jnp.sin(module.apply({"params": params}, x)))
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, params)
    return lowered.compile()(x, params), lowered.as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize("shape", [(2, 7, 4, 6), (1, 1, 3, 5)])
def test_gradients_by_matrix_products_are_those_of_the_convolution(shape, monkeypatch):
    x = jax.random.normal(jax.random.key(1), shape)
    plain, count = gradients(x)
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 5)
    monkeypatch.setattr(convolution, "MIN_POSITIONS", 2)
    by_products, product_count = gradients(x)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), by_products, plain)
    assert (count, product_count) == (0, 9)


def test_the_choice_is_by_size_and_only_for_cpus():
    def lowered(channels, side, platform):
        x, kernel = (
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((8, side, side, channels), (3, 3, channels, channels))
        )
        numbers = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
        conv = lambda x, kernel: convolution.conv_general_dilated(x, kernel, (1, 1), "SAME", **numbers).sum()
        return jax.jit(jax.grad(conv, 1)).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    products = lambda *size: lowered(*size).count("stablehlo.dot_general")
    assert products(160, 64, "cpu") == 9
    assert [products(160, 64, "tpu"), products(64, 64, "cpu"), products(160, 32, "cpu")] == [0, 0, 0]


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 4, 3)])
def test_the_transposed_convolution_is_that_of_the_upsampled_map(shape):
    """Outputs and gradients are equal."""
    x, kernel = (
        jax.random.normal(jax.random.key(1), shape),
        jax.random.normal(jax.random.key(2), (3, 3, shape[-1], 5)),
    )
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    plain = lambda x, kernel: convolution.upsampled_conv(x, kernel, (1, 1), "SAME", **options)
    transposed = lambda x, kernel: convolution.transposed_conv(x, kernel, "highest")

    def both(f):
        loss = lambda *args: (lambda y: (jnp.sum(jnp.sin(y)), y))(f(*args))
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    jax.tree.map(lambda a, b: close(a, b, 1e-5), both(transposed), both(plain))


def test_only_16_bits_on_a_gpu_are_upsampled_by_a_transposed_convolution():
    def is_transposed(dtype, platform):
        x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 4, 4, 8), (3, 3, 8, 8)))
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None)
        conv = lambda x, kernel: convolution.upsampled_conv(x, kernel, (1, 1), "SAME", **options)
        return (
            "lhs_dilate = [2, 2]"
            in jax.jit(conv).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        )

    cases = [(jnp.bfloat16, "cuda"), (jnp.float32, "cuda"), (jnp.bfloat16, "tpu"), (jnp.bfloat16, "cpu")]
    assert [is_transposed(*case) for case in cases] == [True, False, False, False]
