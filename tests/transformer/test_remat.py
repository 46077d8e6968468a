import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from configs import var
from var_jax.sharding import make_mesh
from var_jax.training import hardware
from var_jax.transformer.block import CrossKeys
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.model import Blocks
from var_jax.transformer.remat import SAVED_NAMES, choose_remat, saved_activation_bytes

CONFIG = NextScaleConfig(depth=4, width=128, num_heads=4, scales=(1, 2, 3, 4))
HALF = jnp.dtype(jnp.bfloat16)


CAPTIONED = dataclasses.replace(CONFIG, condition="caption", condition_length=7)


def residual_bytes(policy: str, config: NextScaleConfig = CONFIG) -> int:
    """Measure the bytes that all blocks save for one image, without parameters and adaLN vectors."""
    blocks = Blocks(config, HALF, "einsum", policy)
    cross = None
    if config.condition == "caption":
        rows = jnp.zeros((config.depth, 1, 7, config.num_heads, config.head_dim), HALF)
        cross = CrossKeys(rows, rows, jnp.ones((config.depth, 1, 7), bool))
    x = jnp.zeros((1, CONFIG.schedule.length, CONFIG.width))
    modulations = jnp.zeros((CONFIG.depth, 1, 6, CONFIG.width))
    params = jax.eval_shape(lambda: blocks.init(jax.random.key(0), x, modulations, cross))

    def saved(*inputs):
        run = lambda *inputs: blocks.apply(*inputs, cross, train=True)[0]
        return jax.tree.leaves(jax.vjp(run, *inputs)[1])

    leaves = jax.eval_shape(saved, params, x, modulations)
    by_position = [
        leaf for leaf in leaves if CONFIG.schedule.length in leaf.shape and leaf.ndim > 2
    ]  # no mask
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in by_position)


@pytest.mark.parametrize("policy", [name for name in SAVED_NAMES if name != "none"])
def test_policies_keep_what_the_table_says(policy):
    heads = 4 * CONFIG.num_heads * CONFIG.schedule.length * CONFIG.depth  # log-sum-exp, of a kernel only
    for config in (CONFIG, CAPTIONED):
        assert residual_bytes(policy, config) == saved_activation_bytes(config, policy, 2, True) - heads


def test_without_a_policy_nearly_everything_is_kept():
    for config in (CONFIG, CAPTIONED):
        assert 0.6 < residual_bytes("none", config) / saved_activation_bytes(config, "none", 2, True) < 1


def test_auto_takes_the_fastest_that_fits():
    sizes = {policy: saved_activation_bytes(CONFIG, policy, 2, False) for policy in SAVED_NAMES}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for policy, size in sizes.items():
        assert choose_remat(CONFIG, "auto", 3, 3 * size, 2, False, "tpu", True) == policy
    assert choose_remat(CONFIG, "auto", 3, 0, 2, False, "tpu", True) == "full"
    assert choose_remat(CONFIG, "mlp", 3, 0, 2, False, "tpu", True) == "mlp"
    with pytest.raises(ValueError, match="one of auto, none, mlp, flat_qkv, full; got 'some'"):
        choose_remat(CONFIG, "some", 3, 0, 2, False, "tpu", True)


def test_auto_on_a_gpu_keeps_what_was_measured_to_be_fastest():
    """On an H200 `none` was slower than every policy that keeps less."""
    size = lambda policy: 3 * saved_activation_bytes(CONFIG, policy, 2, False)
    resolve = lambda room: choose_remat(CONFIG, "auto", 3, room, 2, False, "gpu", True)
    assert resolve(2 * size("none")) == "mlp"
    assert resolve(size("mlp") - 1) == "flat_qkv"
    assert resolve(size("flat_qkv") - 1) == "full"
    assert choose_remat(CONFIG, "none", 3, 0, 2, False, "gpu", True) == "none"


@pytest.mark.parametrize("policy", ["none", "mlp", "flat_qkv", "full"])
def test_splash_runs_again_only_where_its_output_is_not_kept(policy):
    """Count kernels in the traced program; `benchmarks.check_gpu` does the same for cuDNN's kernel."""
    cfg = NextScaleConfig(depth=2, width=128, num_heads=2, scales=(1, 5, 9))
    x, modulations = jnp.zeros((1, cfg.schedule.length, cfg.width)), jnp.zeros((2, 1, 6, cfg.width))
    params = jax.eval_shape(
        lambda: Blocks(cfg, HALF, "einsum", policy).init(jax.random.key(0), x, modulations)
    )
    blocks = Blocks(cfg, HALF, "splash", policy)
    loss = lambda params, x: blocks.apply(params, x, modulations, train=True)[0].sum()
    traced = jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr
    text = str(dce_jaxpr(traced, [True] * len(traced.outvars))[0])  # without dead code
    assert len(re.findall(r"\bname=splash_mha_fwd\w*", text)) == (2 if policy == "full" else 1)


@pytest.mark.parametrize(
    ("gib", "sizes", "train", "policy"),
    [
        (80, {}, {}, "none"),
        (16, {}, {}, "flat_qkv"),
        (16, {"data": 8, "fsdp": 1}, {}, "full"),  # the state is replicated on every chip
        (16, {}, {"grad_accum_steps": 8}, "none"),
        (32, {}, {}, "mlp"),
        (8, {}, {}, "full"),
    ],
)
def test_auto_goes_by_the_chips_memory(monkeypatch, gib, sizes, train, policy):
    monkeypatch.setattr(hardware, "memory_bytes", lambda _: gib * 2**30)
    stage = var.get_config("d16")
    stage.train.batch = 48 * 8
    stage.train.update(train)
    cfg = NextScaleConfig(depth=16)
    assert hardware.remat_that_fits(stage, cfg, make_mesh(**sizes), "splash", HALF, True) == policy
    stage.transformer.remat = "mlp"
    assert hardware.remat_that_fits(stage, cfg, make_mesh(**sizes), "splash", HALF, True) == "mlp"
