"""Next-scale transformers whose maps see themselves alone: `mask="block_diagonal"`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from tests.helpers.arrays import close, randomized
from tests.helpers.tiny import tiny_config
from var_jax import cli
from var_jax.errors import ConfigError
from var_jax.sampling.auto_batch_size import bytes_per_image
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, generate, image_keys, teacher_forced_logits
from var_jax.stages import run
from var_jax.tools.convert import to_file
from var_jax.training.param_init import match_params
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.next_scale import NextScale

LABELS, INPUTS = jnp.array([0, 5, 3]), jax.random.normal(jax.random.key(0), (3, 20, 4))
MAPS = [slice(0, 1), slice(1, 5), slice(5, 21)]


def network(tiny_var, **fields) -> tuple[NextScale, dict]:
    """The tiny transformer with a block-diagonal mask, and random parameters."""
    module = NextScale(dataclasses.replace(tiny_var[0].config, mask="block_diagonal", **fields))
    shapes = jax.eval_shape(module.init, jax.random.key(0), LABELS, INPUTS)["params"]
    return module, randomized(shapes, 1)


@pytest.fixture(scope="module")
def markov(tiny_var):
    return network(tiny_var)


@pytest.mark.parametrize("attention", ["einsum", "grouped"])
def test_a_map_sees_itself_alone(markov, attention):
    module, params = markov
    apply = jax.jit(lambda x: module.clone(attention=attention).apply({"params": params}, LABELS, x))
    before = apply(INPUTS)
    for own in MAPS[1:]:
        changed = np.abs(apply(INPUTS.at[:, own.start - 1].add(1.0)) - before).max((0, 2))
        assert (changed[own] > 1e-4).all()  # all positions of the map
        assert not np.delete(changed, np.arange(21)[own]).any()  # and no other, to the bit


def test_earlier_tokens_act_through_f_hat_alone(tiny_tokenizer, markov):
    """A token changes the inputs of all later maps, and so their logits; with its code unchanged, nothing."""
    networks = Networks(tiny_tokenizer[0], markov[0], tiny_tokenizer[1], markov[1])
    tokens = jax.random.randint(jax.random.key(1), (3, 21), 0, 15)
    codebook = networks.tokenizer_params["quantizer"]["codebook"]
    twin = {
        "quantizer": {**networks.tokenizer_params["quantizer"], "codebook": codebook.at[15].set(codebook[3])}
    }
    networks = networks.replace(tokenizer_params=networks.tokenizer_params | twin)
    logits = lambda token: teacher_forced_logits(networks, LABELS, tokens.at[:, 2].set(token))
    before, same_code, other_code = logits(3), logits(15), logits(4)
    np.testing.assert_array_equal(same_code, before)
    changed = np.abs(other_code - before).max((0, 2))
    assert not changed[:5].any() and (changed[5:] > 1e-4).all()


@pytest.mark.parametrize(
    ("positions", "scan_layers"), [("learned_1d", False), ("relative_2d", True), ("rotary_2d", True)]
)
def test_steps_without_a_cache_equal_all_maps_at_once(tiny_var, positions, scan_layers):
    module, params = network(tiny_var, positions=positions)
    module = module.clone(scan_layers=scan_layers)

    @jax.jit
    def both(params):
        apply = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
        condition, cache, parts = apply(LABELS, method="condition"), apply(3, method="empty_cache"), []
        for k, own in enumerate(MAPS):
            inputs = INPUTS[:, own.start - 1 : own.stop - 1] if k else None
            assert cache is None
            logits, cache = apply(k, inputs, condition, cache, method="step")
            parts.append(logits)
        return jnp.concatenate(parts, axis=1), apply(LABELS, INPUTS)

    close(*both(module.own_layout(params)), 1e-5)


def test_greedy_samples_are_the_likeliest_tokens_of_teacher_forcing(tiny_tokenizer, markov):
    """The second of three maps is guided; the unconditional half of the batch ends there."""
    networks = Networks(tiny_tokenizer[0], markov[0], tiny_tokenizer[1], markov[1])
    schedule = markov[0].config.schedule
    strength = np.array([0.0, 2.0, 0.0])
    per_scale = SamplingOptions(guidance=strength, top_k=1).per_scale(schedule, 16)
    labels = jnp.arange(4)
    _, tokens = generate(networks, labels, image_keys(0, labels), per_scale)
    conditional, unconditional = (
        teacher_forced_logits(networks, x, tokens) for x in (labels, labels * 0 + 5)
    )
    t = strength[schedule.levels][:, None]
    np.testing.assert_array_equal(((1 + t) * conditional - t * unconditional).argmax(-1), tokens)
    assert (conditional.argmax(-1) != tokens)[:, 1:5].any()


def test_flops_count_the_products_within_maps():
    fields = dict(depth=1, width=32, num_heads=1, num_classes=5, num_codes=16, code_dim=4, scales=(1, 2, 4))
    causal, diagonal = NextScaleConfig(**fields), NextScaleConfig(**fields, mask="block_diagonal")
    attention = 4 * 32  # FLOPs of a query and a key
    assert training_flops(causal) - training_flops(diagonal) == 3 * attention * (21**2 - (1 + 4**2 + 16**2))
    pairs = 1 + 4 * 5 + 16 * 21 - (1 + 4 * 4 + 16 * 16)
    assert generation_flops(causal, 0) - generation_flops(diagonal, 0) == attention * pairs
    assert generation_flops(diagonal, 0, cached=False) == generation_flops(diagonal, 0)


def test_more_images_fit_without_a_cache(tiny_tokenizer, tiny_var, markov):
    per_scale = SamplingOptions().per_scale(markov[0].config.schedule, 16)
    size = lambda model: bytes_per_image(tiny_tokenizer[0], model.clone(dtype=jnp.float32), per_scale)
    assert size(markov[0]) < size(tiny_var[0])


def test_a_block_causal_network_starts_a_block_diagonal_one(tiny_var):
    module, params = tiny_var
    target = dataclasses.replace(module.config, mask="block_diagonal")
    shapes = nn.meta.unbox(jax.eval_shape(NextScale(target).init, jax.random.key(0), LABELS, INPUTS))[
        "params"
    ]
    values, notes = match_params(params, module.config, shapes, target)
    assert len(values) == len(jax.tree.leaves(params)) and all(leaf.rows is None for leaf in values.values())
    assert notes == ["config.model.mask is block_diagonal, in init_from block_causal"]


def test_fine_tuning_from_a_run_and_what_comes_of_it(tiny_run, digits_dir, tmp_path, capsys):
    stage = tiny_config(digits_dir, steps=1, every=1).next_scale
    stage.tokenizer = stage.init_from = str(tiny_run)
    stage.model.mask = "block_diagonal"
    run(stage, tmp_path)
    assert "config.model.mask is block_diagonal, in init_from block_causal" in capsys.readouterr().out
    model = var_jax.load_var(tmp_path)
    assert model.module.config.mask == "block_diagonal"
    assert model.sample([0, 1]).shape == (2, 8, 8, 3)
    stage.model.mask = "block_causal"
    with pytest.raises(ConfigError, match="config.model.mask: 'block_diagonal' there, 'block_causal' now"):
        run(stage, tmp_path)
    with pytest.raises(ConfigError, match="mask is block_diagonal, must be block_causal"):
        to_file(tmp_path, "next_scale", tmp_path / "x.safetensors")


def test_unknown_masks_are_refused_and_samples_of_another_mask_are_not_resumed():
    with pytest.raises(ValueError, match="mask must be one of block_causal, block_diagonal; got 'causal'"):
        NextScaleConfig(mask="causal")
    masks = [NextScaleConfig(mask=mask) for mask in ("block_causal", "block_diagonal")]
    assert cli.config_checksum(masks[0]) == 0xB9EE80EF != cli.config_checksum(masks[1])
