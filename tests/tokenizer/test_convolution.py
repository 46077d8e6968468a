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
