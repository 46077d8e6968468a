"""Next-token transformers: cached equals uncached, nothing leaks, for every order, encoding and mask."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close, randomized
from var_jax.sharding import global_batch, make_mesh, on_mesh, tree_shardings
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken
from var_jax.transformer.orders import ORDERS
from var_jax.transformer.positions import ABSOLUTE, MASKS, RELATIVE

SIDE, LENGTH = 4, 16
POSITIONS = ("none", *ABSOLUTE, *RELATIVE, "learned_1d+relative_2d")
# Every order, every encoding, every mask, and each encoding with a mask that changes from block to block.
CASES = [
    *((order, "rotary_2d", "causal") for order in ORDERS),
    *(("z_curve", positions, "causal") for positions in POSITIONS),
    *(("snake", positions, "axial") for positions in POSITIONS),
    *(("raster", "rotary_2d", mask) for mask in MASKS),
]


def make(order="raster", positions="learned_1d", mask="causal", **fields):
    config = NextTokenConfig(
        depth=2,
        width=32,
        num_heads=4,
        num_classes=5,
        num_codes=16,
        code_dim=4,
        scales=(SIDE,),
        positions=positions,
        order=order,
        mask=mask,
        **fields,
    )
    module = NextToken(config)
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, LENGTH - 1, 4)))
    return module, randomized(jax.eval_shape(module.init, jax.random.key(0), *blank)["params"])


@pytest.mark.parametrize(("order", "positions", "mask"), sorted(set(CASES)))
def test_cached_equals_uncached_and_nothing_leaks(order, positions, mask):
    module, params = make(order, positions, mask)
    labels, inputs = jnp.array([0, 5]), jax.random.normal(jax.random.key(0), (2, LENGTH - 1, 4))
    uncached = jax.jit(lambda inputs: module.apply({"params": params}, labels, inputs))
    logits = uncached(inputs)

    @jax.jit
    def one_by_one(inputs):
        condition = module.apply({"params": params}, labels, method="condition")

        def step(cache, i):
            before = jax.lax.dynamic_slice_in_dim(inputs, jnp.maximum(i - 1, 0), 1, axis=1)
            result, cache = module.apply({"params": params}, i, before, condition, cache, method="step")
            return cache, result[:, 0]

        cache = module.apply({"params": params}, 2, method="empty_cache")
        return jax.lax.scan(step, cache, jnp.arange(LENGTH))[1].swapaxes(0, 1)

    close(one_by_one(inputs), logits, 1e-5)
    for j in (0, 6, LENGTH - 2):  # token j is the input of position j + 1
        changed = np.abs(uncached(inputs.at[:, j].add(1.0)) - logits).max((0, 2))
        assert changed[: j + 1].max() == 0 and changed[j + 1] > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
def test_next_scale_cached_equals_uncached_and_leaks_nothing_by_scale(positions):
    config = NextScaleConfig(
        depth=2,
        width=32,
        num_heads=4,
        num_classes=5,
        num_codes=16,
        code_dim=4,
        scales=(1, 2, 4),
        positions=positions,
    )
    module, scales = NextScale(config), config.schedule
    labels, inputs = jnp.array([0, 5]), jax.random.normal(jax.random.key(0), (2, 20, 4))
    params = randomized(jax.eval_shape(module.init, jax.random.key(0), labels, inputs)["params"])
    apply = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
    uncached = jax.jit(lambda inputs: apply(labels, inputs))
    logits = uncached(inputs)
    condition, cache, parts = apply(labels, method="condition"), apply(2, method="empty_cache"), []
    for k in range(len(scales)):
        own = None if k == 0 else inputs[:, scales.starts[k] - 1 : scales.ends[k] - 1]
        result, cache = apply(k, own, condition, cache, method="step")
        parts.append(result)
    close(jnp.concatenate(parts, axis=1), logits, 1e-5)
    for j in (1, 8):  # an input of scale 1, and one of scale 2
        changed = np.abs(uncached(inputs.at[:, j].add(1.0)) - logits).max((0, 2))
        own = scales.levels >= scales.levels[j + 1]
        assert changed[~own].max() == 0 and changed[own].min() > 1e-4


def receptive_field(config: NextTokenConfig, blocks: int) -> np.ndarray:
    """Compute the inputs that reach each position through a number of blocks, bool [L, L]."""
    result = np.eye(config.length, dtype=bool)
    for block in range(blocks):
        result = config.masks[block % len(config.masks)] @ result
    return result


@pytest.mark.parametrize("order", ["raster", "column", "snake"])
@pytest.mark.parametrize("side", [4, 7, 8, 16])
def test_two_axial_blocks_reach_all_that_comes_before(order, side):
    config = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(side,), order=order, mask="axial")
    causal = np.tri(side**2, dtype=bool)
    np.testing.assert_array_equal(receptive_field(config, 2), causal)
    assert (receptive_field(config, 1) != causal).any()
    strict = dataclasses.replace(config, mask_radius=0)  # one row, one column
    assert (receptive_field(strict, 2) != causal).any()


@pytest.mark.parametrize("order", ["spiral_in", "spiral_out", "z_curve", "hilbert", "random"])
def test_along_other_orders_two_axial_blocks_leave_gaps_that_more_blocks_fill(order):
    """Two blocks connect two cells only if the corner between them lies between them in the order."""
    config = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(16,), order=order, mask="axial")
    two, four = (receptive_field(config, blocks).sum() / np.tri(256).sum() for blocks in (2, 4))
    assert 0.72 < two < 0.87 and four > 0.95


def test_axial_attention_carries_what_its_masks_reach():
    """An input changes exactly the logits that two blocks of axial attention reach."""
    module, params = make(mask="axial")
    labels, inputs = jnp.array([0]), jax.random.normal(jax.random.key(0), (1, LENGTH - 1, 4))
    logits = jax.jit(lambda inputs: module.apply({"params": params}, labels, inputs))
    changed = np.abs(logits(inputs.at[:, 2].add(1.0)) - logits(inputs)).max((0, 2))
    np.testing.assert_array_equal(changed > 0, receptive_field(module.config, 2)[:, 3])
    assert (changed > 0).sum() == LENGTH - 3


@pytest.mark.parametrize("mask", MASKS)
def test_masks_look_back_only_and_at_the_right_cells(mask):
    config = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(4,), order="raster", mask=mask)
    for block_mask in config.masks:
        assert not np.triu(block_mask, 1).any() and block_mask.diagonal().all() and block_mask[:, 0].all()
    # The token at row 2, column 2 (number 10): the cells 0 .. 9 are its keys 1 .. 10.
    cells = [np.flatnonzero(block_mask[10, 1:]).tolist() for block_mask in config.masks]
    rows, columns = [4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 6, 7, 9]
    local = sorted(set(rows) & set(columns))
    want = {"causal": [list(range(10))], "row": [rows], "column": [columns], "axial": [rows, columns]}
    assert cells == want.get(mask, [local])


def test_parameters_and_blocks_are_those_of_next_scale():
    """Only the prediction scheme differs: the trees are equal except for levels and position rows."""
    token = make()[1]
    module = NextScale(
        NextScaleConfig(
            depth=2, width=32, num_heads=4, num_classes=5, num_codes=16, code_dim=4, scales=(1, 2, 4)
        )
    )
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 20, 4)))
    scale = randomized(jax.eval_shape(module.init, jax.random.key(0), *blank)["params"])
    assert set(scale) - set(token) == {"level_embedding"}

    def shapes(tree):
        return jax.tree.map(jnp.shape, {k: v for k, v in tree.items() if k != "position_embedding"})

    assert shapes(token) == {k: v for k, v in shapes(scale).items() if k != "level_embedding"}


def test_flops_by_hand():
    config = NextTokenConfig(
        depth=1, width=8, num_heads=1, num_classes=2, num_codes=3, code_dim=4, scales=(2,)
    )
    block = lambda q, k: 24 * q * 64 + 4 * q * k * 8 + 2 * q * 8 * (3 + 4)
    adaln = 16 * 64
    assert training_flops(config) == 3 * (block(4, 4) + adaln)
    assert generation_flops(config, 0) == adaln + sum(block(1, i) for i in (1, 2, 3, 4))
    assert generation_flops(config, 4) == 2 * generation_flops(config, 0)
    assert generation_flops(config, 0, cached=False) == adaln + sum(block(i, i) for i in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": (1, 2, 4)}, r"one map, scales=\(n,\), got scales=\(1, 2, 4\)"),
        ({"order": "zigzag"}, "order must be one of .*zigzag"),
        ({"mask": "diagonal"}, "mask must be one of .*diagonal"),
        ({"mask": "row", "mask_radius": -1}, "mask_radius must be a whole number from 0 up, got -1"),
        ({"mask": "row", "mask_radius": 1.5}, "mask_radius must be a whole number from 0 up, got 1.5"),
        ({"order": "random", "order_seed": -1}, "seed of an order must be a whole number .* got -1"),
        ({"order": "random", "order_seed": 0.5}, "seed of an order must be a whole number .* got 0.5"),
        ({"positions": "rotary_2d", "width": 24}, "multiple of 4, got 6"),
        ({"positions": "rotary_1d+rotary_2d"}, "one of each joined by"),
        ({"positions": "learned"}, "got 'learned'"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NextTokenConfig(**{"depth": 2, "width": 32, "num_heads": 4, "scales": (4,), **fields})


def test_every_pair_of_absolute_and_relative_positions_is_known():
    for absolute, relative in itertools.product(ABSOLUTE, RELATIVE):
        config = NextTokenConfig(
            depth=2, width=32, num_heads=4, scales=(4,), positions=f"{absolute}+{relative}"
        )
        assert (config.absolute, config.relative) == (absolute, relative)


def test_random_orders_follow_their_seed():
    cells = [
        NextTokenConfig(depth=2, width=32, num_heads=4, scales=(4,), order="random", order_seed=s).cells
        for s in (0, 0, 1)
    ]
    np.testing.assert_array_equal(cells[0], cells[1])
    assert (cells[0] != cells[2]).any()


@pytest.mark.parametrize("positions", ["relative_2d", "learned_2d+rotary_2d"])
def test_a_mesh_of_eight_devices_gives_losses_and_gradients_of_one(positions):
    module, params = make("hilbert", positions, "axial")
    labels = jnp.arange(8) % 5
    inputs = jax.random.normal(jax.random.key(0), (8, LENGTH - 1, 4))
    tokens = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, 16)

    def loss(params, batch):
        return module.apply({"params": params}, **batch, method="losses")[0].mean()

    batch = {"labels": labels, "inputs": inputs, "tokens": tokens}
    single = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(2, 2, 2)
    boxed = jax.eval_shape(module.init, jax.random.key(0), labels[:1], inputs[:1])["params"]
    params = jax.device_put(params, tree_shardings(boxed, mesh))
    sharded = jax.jit(jax.value_and_grad(on_mesh(loss, mesh)))(params, global_batch(batch, mesh))
    for result, right in zip(*map(jax.tree.leaves, (sharded, single)), strict=True):
        close(result, right, 1e-4)
