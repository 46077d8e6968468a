from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close
from var_jax.scales import SCALES_256, SCALES_512, Scales
from var_jax.sharding import make_mesh, on_mesh
from var_jax.transformer.attention import (
    attend,
    choose_attention,
    einsum,
    groups,
    key_ends,
    key_ranges,
    splash,
)
from var_jax.transformer.prefix_attention import prefix_attention

# 84 positions, and 129, just more than a block of splash.
ODD = {"odd": (1, 3, 5, 7), "odder": (2, 5, 10)}
SIDES = {**ODD, "256": SCALES_256, "512": SCALES_512}
MASKS = {name: Scales(sides).mask for name, sides in SIDES.items()}
OWN_MAP_MASKS = {f"own_{name}": Scales(sides).own_map_mask for name, sides in SIDES.items()}


def inputs(length: int, keys: int = 0, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    draw = lambda n: jnp.asarray(rng.standard_normal((2, n, 2, 8)), dtype)
    return draw(length), draw(keys or length), draw(keys or length)


def same(function, reference, *arrays):
    """Assert equal outputs and gradients of a loss that weights every output differently."""

    def both(f):
        weights = jnp.sin(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
        loss = lambda *x: (lambda y: (jnp.sum(y * weights), y))(f(*x))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    for result, expected in zip(*map(jax.tree.leaves, (both(function), both(reference))), strict=True):
        close(result, expected, 2e-6)


@pytest.mark.parametrize("size", [*MASKS, "own_odd", "own_odder", "own_256"])
def test_grouped_equals_einsum(size):
    mask = (MASKS | OWN_MAP_MASKS)[size]
    same(
        *(lambda q, k, v, n=n: attend(q, k, v, 0.3, mask, n) for n in ("grouped", "einsum")),
        *inputs(len(mask)),
    )


@pytest.mark.parametrize("size", [*MASKS, "own_odder", "own_256"])
def test_splash_equals_einsum(size):
    mask = (MASKS | OWN_MAP_MASKS)[size]
    same(
        *(partial(f, scale=0.3, mask=mask) for f in (partial(splash, interpret=True), einsum)),
        *inputs(len(mask)),
    )


@pytest.mark.parametrize(
    "mask", [*(MASKS[size] for size in ("odd", "odder", "256")), np.tri(130, dtype=bool)]
)
def test_triton_equals_einsum(mask):
    """The fourth mask is that of raster-scan prediction."""
    kernel = partial(prefix_attention, ends=key_ends(mask), name="", interpret=True)
    same(*(partial(f, scale=0.3) for f in (kernel, partial(einsum, mask=mask))), *inputs(len(mask)))


def test_triton_rounds_to_bfloat16_as_einsum_does():
    """The errors to float32 are those of einsum in bfloat16, and less than twice as large."""
    mask, arrays = MASKS["odd"], inputs(84)
    kernel = partial(prefix_attention, scale=0.3, ends=key_ends(mask), name="", interpret=True)
    exact, half = (
        einsum(*(x.astype(dtype) for x in arrays), 0.3, mask) for dtype in (jnp.float32, jnp.bfloat16)
    )
    error = lambda y: float(jnp.linalg.norm((y - exact).ravel()))
    assert error(kernel(*(x.astype(jnp.bfloat16) for x in arrays))) < 2 * error(half)


def test_splash_of_new_positions_to_a_cache_equals_einsum():
    q, k, v = inputs(100, keys=255)
    close(splash(q, k, v, 0.3, None, interpret=True), einsum(q, k, v, 0.3, None), 2e-6)


def test_groups_cover_all_queries_and_large_maps_need_no_mask():
    ends = key_ends(MASKS["256"])
    result = groups(ends)
    assert result == [(0, 91), (91, 155), (155, 255), (255, 424), (424, 680)]
    assert all(len(set(ends[start:stop])) == 1 for start, stop in result[1:])
    assert groups(key_ends(MASKS["odd"])) == [(0, 84)]


@pytest.mark.parametrize(("mask", "share"), [(MASKS["256"], 0.75), (OWN_MAP_MASKS["own_256"], 0.3)])
def test_grouped_products_are_fewer_than_all(mask, share):
    count = lambda name: (
        jax.jit(partial(attend, scale=1.0, mask=mask, name=name)).lower(*inputs(680)).cost_analysis()["flops"]
    )
    assert count("grouped") < share * count("einsum")


@pytest.fixture
def cudnn_calls(monkeypatch) -> list[tuple]:
    """Record the shapes of queries and keys of cuDNN calls, and compute them with XLA.

    The kernel itself is compiled by `benchmarks.check_gpu`.
    """
    calls, attention = [], jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, **options):
        assert (
            implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        )  # otherwise there is no gradient
        calls.append((q.shape, k.shape))
        return attention(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return calls


@pytest.mark.parametrize(
    ("mask", "num_keys"),
    [(MASKS["256"], [92, 156, 256, 424, 680]), (OWN_MAP_MASKS["own_256"], [92, 64, 100, 170, 256])],
)
def test_cudnn_sees_groups_of_even_lengths_and_equals_einsum(cudnn_calls, mask, num_keys):
    same(*(lambda q, k, v, n=n: attend(q, k, v, 0.3, mask, n) for n in ("cudnn", "einsum")), *inputs(680))
    lengths = [(q[1], k[1]) for q, k in cudnn_calls]
    assert lengths == list(zip([92, 64, 100, 170, 256], num_keys, strict=True))


@pytest.mark.parametrize("size", ["256", "512"])
@pytest.mark.parametrize("sizes", [{"devices": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_cudnn_is_asked_for_the_part_of_each_device(cudnn_calls, size, sizes):
    mask, devices = MASKS[size], jax.devices()[: sizes.get("devices")]
    mesh = make_mesh(**{name: n for name, n in sizes.items() if name != "devices"}, devices=devices)
    loss = on_mesh(lambda q, k, v: attend(q, k, v, 0.3, mask, "cudnn").astype(jnp.float32).sum(), mesh)
    half = (jax.ShapeDtypeStruct((8, len(mask), 2, 64), jnp.bfloat16),) * 3
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*half)
    images, heads = (8, 2) if mesh.size == 1 else (2, 1)  # sharded over data and fsdp; over tensor
    assert all((q[0], q[2:]) == (images, (heads, 64)) for q, _ in cudnn_calls)
    sizes = [stop - start for start, stop in groups(key_ends(mask))]
    assert [q[1] for q, _ in cudnn_calls] == [n + n % 2 for n in sizes]


@pytest.mark.parametrize("mask", [MASKS["odd"], None])
def test_splash_on_a_mesh_equals_einsum(mask):
    """Images are sharded over data and fsdp, heads over tensor."""
    q, k, v = (jnp.tile(x, (4, 1, 1, 1)) for x in inputs(84))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        same(*(partial(f, scale=0.3, mask=mask) for f in (partial(splash, interpret=True), einsum)), q, k, v)


def test_auto_goes_by_platform():
    bf16, f32 = jnp.bfloat16, jnp.float32
    platforms = (("cpu", f32), ("tpu", bf16), ("gpu", bf16), ("tpu", f32), ("gpu", f32))
    names = [choose_attention("auto", *platform, 64) for platform in platforms]
    assert names == ["grouped", "splash", "triton", "grouped", "grouped"]
    with pytest.raises(ValueError, match=r"splash runs on TPU in bfloat16 \(.*got float32 on tpu"):
        choose_attention("splash", "tpu", f32, 64)


@pytest.mark.parametrize("head_dim", [12, 20, 136, 256])
def test_auto_on_a_gpu_leaves_heads_that_cudnn_refuses_to_grouped(head_dim):
    """JAX demands a multiple of 8, and at most 128 before Hopper."""
    assert choose_attention("auto", "gpu", jnp.bfloat16, head_dim) == "grouped"
    with pytest.raises(ValueError, match=f"multiple of 8 channels, at most 128, got {head_dim}"):
        choose_attention("cudnn", "gpu", jnp.bfloat16, head_dim)
    with pytest.raises(ValueError, match="triton needs heads of 16, 32, 64, 128 channels, got 24"):
        choose_attention("triton", "gpu", jnp.bfloat16, 24)
    assert choose_attention("auto", "gpu", jnp.bfloat16, 24) == "cudnn"


@pytest.mark.parametrize(
    ("name", "platform", "says"),
    [
        ("flash", "tpu", "one of auto, einsum, grouped, cudnn, triton, splash; got 'flash'"),
        ("splash", "gpu", "splash runs on TPU in bfloat16 .*, got bfloat16 on gpu"),
        ("cudnn", "tpu", "cudnn runs on an NVIDIA GPU in bfloat16, got bfloat16 on tpu"),
        ("triton", "cpu", "triton runs on an NVIDIA GPU in bfloat16, got bfloat16 on cpu"),
    ],
)
def test_what_cannot_run_is_refused(name, platform, says):
    with pytest.raises(ValueError, match=says):
        choose_attention(name, platform, jnp.bfloat16, 64)


def test_a_mask_that_is_no_range_of_keys_is_refused():
    hole = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    with pytest.raises(ValueError, match="a range of the keys; use einsum or splash"):
        attend(*inputs(3), 1.0, hole, "grouped")
    with pytest.raises(ValueError, match="a prefix of the keys; use einsum or splash"):
        key_ends(np.eye(4, dtype=bool))


def test_maps_that_see_themselves_alone_need_no_mask_if_they_are_large():
    mask = OWN_MAP_MASKS["own_256"]
    assert groups(key_ranges(mask)) == [(0, 91), (91, 155), (155, 255), (255, 424), (424, 680)]
    platforms = (("cpu", jnp.float32), ("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16))
    choose = lambda name, *platform: choose_attention(name, *platform, 64, (mask,))
    assert [choose("auto", *platform) for platform in platforms] == ["grouped", "splash", "cudnn"]
    with pytest.raises(
        ValueError, match="triton does not support the mask .*use einsum or grouped or splash"
    ):
        choose("triton", "gpu", jnp.bfloat16)
    bias = choose_attention("auto", "gpu", jnp.bfloat16, 64, (mask,), bias=True)
    assert bias == "grouped"
