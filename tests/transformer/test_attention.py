from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import close
from var_jax.scales import SCALES_256, SCALES_512, Scales
from var_jax.transformer import attention
from var_jax.transformer.attention import attend, choose_attention, einsum, groups, key_ends
from var_jax.transformer.splash import splash

ODD = (1, 3, 5, 7)  # 84 positions
MASKS = {name: Scales(sides).mask for name, sides in (("odd", ODD), ("256", SCALES_256), ("512", SCALES_512))}


def inputs(length: int, keys: int = 0, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    draw = lambda n: jnp.asarray(rng.standard_normal((2, n, 2, 8)), dtype)  # noqa: E731
    return draw(length), draw(keys or length), draw(keys or length)


def same(function, reference, *arrays):
    """Asserts equal outputs and gradients, by a loss that looks at every number differently."""

    def both(f):
        weights = jnp.sin(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
        loss = lambda *x: (lambda y: (jnp.sum(y * weights), y))(f(*x))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    for found, right in zip(*map(jax.tree.leaves, (both(function), both(reference))), strict=True):
        close(found, right, 2e-6)


@pytest.mark.parametrize("size", MASKS)
def test_grouped_equals_einsum(size):
    mask = MASKS[size]
    same(
        *(lambda q, k, v, n=n: attend(q, k, v, 0.3, mask, n) for n in ("grouped", "einsum")),
        *inputs(len(mask)),
    )


@pytest.mark.parametrize("size", MASKS)
def test_splash_equals_einsum(size):
    mask = MASKS[size]
    same(
        *(partial(f, scale=0.3, mask=mask) for f in (partial(splash, interpret=True), einsum)),
        *inputs(len(mask)),
    )


def test_splash_of_new_positions_to_a_cache_equals_einsum():
    q, k, v = inputs(100, keys=255)
    close(splash(q, k, v, 0.3, None, interpret=True), einsum(q, k, v, 0.3, None), 2e-6)


@pytest.mark.parametrize("kernel", ["xla", "xla_chunked"])
def test_tokamax_by_key_ends_equals_einsum(kernel):
    pytest.importorskip("tokamax", reason="the extra tokamax is not installed")
    mask = MASKS["odd"]
    same(
        partial(attention.tokamax, scale=0.3, mask=mask, kernel=kernel),
        partial(einsum, scale=0.3, mask=mask),
        *inputs(len(mask)),
    )


def test_groups_cover_all_queries_and_large_maps_need_no_mask():
    ends = key_ends(MASKS["256"])
    found = groups(ends)
    assert found == [(0, 91), (91, 155), (155, 255), (255, 424), (424, 680)]
    assert all(len(set(ends[start:stop])) == 1 for start, stop in found[1:])
    assert groups(key_ends(MASKS["odd"])) == [(0, 84)]


def test_grouped_products_are_fewer_than_all():
    mask = MASKS["256"]
    count = lambda name: (  # noqa: E731
        jax.jit(partial(attend, scale=1.0, mask=mask, name=name)).lower(*inputs(680)).cost_analysis()["flops"]
    )
    assert count("grouped") < 0.75 * count("einsum")


def test_cudnn_sees_groups_without_a_mask_and_the_rest_is_einsum(monkeypatch):
    """The kernel needs a GPU; what it is asked for is seen here."""
    asked = []

    def kernel(q, k, v, *, scale, implementation):
        asked.append((q.shape[1], k.shape[1], implementation))
        return einsum(q, k, v, scale, None)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = inputs(680)
    close(attend(q, k, v, 0.3, MASKS["256"], "cudnn"), einsum(q, k, v, 0.3, MASKS["256"]), 2e-6)
    assert asked == [(n, end, "cudnn") for n, end in ((64, 155), (100, 255), (169, 424), (256, 680))]


def test_auto_goes_by_platform():
    bf16, f32 = jnp.bfloat16, jnp.float32
    found = [
        choose_attention("auto", *on) for on in (("cpu", f32), ("tpu", bf16), ("gpu", bf16), ("gpu", f32))
    ]
    assert found == ["einsum", "splash", "cudnn", "grouped"]


@pytest.mark.parametrize(
    ("name", "platform", "says"),
    [
        ("flash", "tpu", "one of auto, einsum, grouped, cudnn, splash, tokamax; found 'flash'"),
        ("splash", "gpu", "splash runs on TPU, found gpu"),
        ("cudnn", "tpu", "cudnn runs on an NVIDIA GPU in bfloat16, found bfloat16 on tpu"),
    ],
)
def test_what_cannot_run_is_refused(name, platform, says):
    with pytest.raises(ValueError, match=says):
        choose_attention(name, platform, jnp.bfloat16)


def test_a_mask_that_is_no_key_end_is_refused():
    with pytest.raises(ValueError, match="use einsum or splash"):
        attend(*inputs(4), 1.0, np.eye(4, dtype=bool), "grouped")
