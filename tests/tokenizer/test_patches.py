"""Patches of pixels as tokens: the same class, quantizer, loop and API without any network."""

import dataclasses
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from sklearn.datasets import load_digits

import var_jax
from configs import tokenizer as tokenizer_configs
from tests.helpers.commands import REPOSITORY
from tests.training.test_resume import logged
from var_jax.evaluation.reconstruction import evaluate_reconstruction
from var_jax.interop.load import read_network, tokenizer_shapes
from var_jax.stages import run
from var_jax.tokenizer.autoencoder import from_patches, to_patches
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer, decode, encode
from var_jax.tools.convert import to_file
from var_jax.training.param_init import match_params

STEPS = 12


def real_digits(count: int) -> np.ndarray:
    """float32 [count, 8, 8, 3] in [0, 1]."""
    grey = load_digits().images[:count, ..., None] / 16
    return np.repeat(grey, 3, axis=-1).astype(np.float32)


def parsed(*overrides: str) -> ConfigDict:
    """configs/digits.py as train.py reads it, with fields set on the command line."""
    values, line = flags.FlagValues(), ["train.py", f"--config={REPOSITORY}/configs/digits.py", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
    values(line)
    return values.config


@pytest.fixture(scope="module")
def config(digits_dir) -> ConfigDict:
    """Two maps of 4x4 patches, 64 codes that follow means."""
    model = ("patch=2", "scales=(4,4)", "num_codes=64", "num_phis=0")
    stage = parsed(*(f"--config.tokenizer.model.{field}" for field in model)).tokenizer
    stage.codebook.update(dict(kmeans_steps=2, ema_decay=0.9, restart_every=2))
    stage.data.update(dict(dir=str(digits_dir), shift=0))
    stage.train.update(dict(steps=STEPS, batch=32, log_every=1, eval_every=1, preview_every=STEPS))
    stage.train.update(dict(checkpoint_every=STEPS // 2, max_to_keep=2))
    return stage


@pytest.fixture(scope="module")
def patch_run(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    run(config, folder)
    return folder


def test_cut_into_patches_and_put_together_again_is_the_image():
    images = jax.random.uniform(jax.random.key(0), (2, 6, 9, 3), minval=-1)
    patches = to_patches(images, 3)
    assert patches.shape == (2, 2, 3, 27)
    np.testing.assert_array_equal(patches[:, 1, 2], images[:, 3:6, 6:9].reshape(2, 27))
    np.testing.assert_array_equal(from_patches(patches, 3), images)
    with pytest.raises(ValueError, match="patches of 4 pixels do not fill images of 6 x 9"):
        to_patches(images, 4)


@pytest.mark.parametrize("scales", [(4,), (4, 4)])
def test_with_as_many_codes_as_distinct_patches_the_image_comes_back_exactly(scales):
    images = jnp.asarray(real_digits(32)) * 2 - 1
    codes = np.unique(to_patches(images, 2).reshape(-1, 12), axis=0)
    if len(scales) == 2:  # the second map adds nothing
        codes = np.concatenate([codes, np.zeros((1, 12), np.float32)])
    tokenizer = Tokenizer(TokenizerConfig(scales=scales, num_codes=len(codes), num_phis=0, patch=2))
    params = {"quantizer": {"codebook": jnp.asarray(codes)}}
    tokens = encode(tokenizer, params, images)
    np.testing.assert_array_equal(decode(tokenizer, params, tokens), images)


def test_the_codebook_is_all_there_is_to_train():
    config = TokenizerConfig(scales=(4,), num_codes=64, num_phis=0, patch=2)
    shapes = tokenizer_shapes(config)
    assert shapes.pop("code_hits").shape == (1, 64)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {"quantizer": {"codebook": (64, 12)}}
    assert (config.image_size, config.downsample, config.code_dim) == (8, 2, 12)
    # What the networks would have is nothing that two of them could differ in.
    other = dict(code_dim=16, ch=32, ch_mult=(1, 2), num_blocks=1, norm_groups=8, quantizer_dropout=0.2)
    assert (
        TokenizerConfig(scales=(4,), num_codes=64, num_phis=0, patch=2, vq_gradient="rotation", **other)
        == config
    )
    assert TokenizerConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": -1}, r"patch must be 0 \(networks\) or a side in pixels, got -1"),
        ({"patch": 2}, "num_phis must be 0 with patch=2, got 4"),
        ({"patch": 2, "num_phis": 0, "l2_normalized": True}, "l2_normalized must be False with patch=2"),
    ],
)
def test_what_patches_cannot_have_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)


def test_an_adversary_of_no_network_is_refused(config, tmp_path):
    stage = config.copy_and_resolve_references()
    stage.adversarial.weight = 0.4
    with pytest.raises(ValueError, match="adversarial.weight must be 0 with config.model.patch"):
        run(stage, tmp_path)


def test_training_improves_held_out_images_and_leaves_logs_and_pictures(config, patch_run):
    assert config.model.scales == (4, 4)  # a tuple from the command line
    lines = logged(patch_run, "tokenizer")
    l2 = [line["l2"] for line in lines if line["kind"] == "eval"]
    assert len(l2) == STEPS and l2[-1] < 0.9 * l2[0] < 0.05
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["gradient_norm"] == 0 and last["distinct"] > 32
    for name in ("reconstructions", "reconstruction_scales", "curves_tokenizer"):
        assert (patch_run / f"{name}.png").stat().st_size > 500


def test_one_map_and_codes_that_follow_their_gradient(config, tmp_path):
    stage = config.copy_and_resolve_references()
    stage.model.update(dict(scales=(4,), quantizer_dropout=0.2))
    stage.codebook.update(dict(kmeans_steps=0, ema_decay=0.0))
    stage.train.update(dict(steps=3, ema_decay=0.0, eval_every=3, preview_every=3))
    run(stage, tmp_path)
    trained, evaluated = logged(tmp_path, "tokenizer")[-2:]
    assert trained["gradient_norm"] > 0 and evaluated["l2"] < 0.1
    assert evaluated["perplexity_0"] == evaluated["perplexity"] and "perplexity_1" not in evaluated
    assert (tmp_path / "reconstruction_scales.png").stat().st_size > 500


def test_killed_and_resumed_equals_unbroken(config, patch_run, tmp_path):
    shutil.copytree(patch_run, tmp_path / "killed")
    runs = (patch_run, tmp_path / "killed")
    last = [folder / "tokenizer" / "checkpoints" / str(STEPS) for folder in runs]
    shutil.rmtree(last[1])
    run(config, tmp_path / "killed")
    for item in ("params", "state"):
        want, got = (ocp.StandardCheckpointer().restore(checkpoint / item) for checkpoint in last)
        chex.assert_trees_all_equal(got, want)
    assert logged(tmp_path / "killed", "tokenizer") == logged(patch_run, "tokenizer")


def test_the_api_encodes_decodes_and_evaluates(patch_run):
    tokenizer = var_jax.load_tokenizer(patch_run)
    assert (tokenizer.scales, tokenizer.num_codes) == ((4, 4), 64)
    images = real_digits(16)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (16, 32) and tokens.dtype == np.int32
    again, coarse = tokenizer.decode(tokens), tokenizer.decode(tokens, upto=1)
    codes = np.asarray(tokenizer.params["quantizer"]["codebook"])
    pixels = from_patches(codes[tokens[:, :16]].reshape(16, 4, 4, 12), 2)
    np.testing.assert_allclose(coarse, np.clip(pixels / 2 + 0.5, 0, 1), atol=1e-6)
    errors = [np.mean((image - images) ** 2) for image in (coarse, again)]
    assert errors[1] < errors[0] < 0.02
    np.testing.assert_array_equal(tokenizer.decode_steps(tokens)[:, -1], again)
    batches = [{"image": np.uint8(images * 255), "valid": np.ones(16, np.float32)}]
    metrics, *_ = evaluate_reconstruction(tokenizer.module, tokenizer.params, batches, 16)
    assert metrics["psnr"] > 20 and metrics["bits_per_pixel"] == pytest.approx(32 * 6 / 64)


def test_what_can_start_from_patches_and_what_cannot(patch_run, tmp_path):
    config, params = read_network(patch_run, "tokenizer")

    def start(**changes):
        wanted = dataclasses.replace(config, **changes)
        return match_params(params, config, {"quantizer": tokenizer_shapes(wanted)["quantizer"]}, wanted)

    given, notes = start(scales=(4,))
    assert list(given) == ["quantizer/codebook"] and not notes
    assert start(num_codes=32)[1] == [
        "quantizer/codebook is [64, 12] in init_from, [32, 12] in this run: initialized"
    ]
    with pytest.raises(ValueError, match="config.model.patch must be 2, as in init_from; got 4"):
        start(patch=4)
    with pytest.raises(ValueError, match="cannot express this network: patch is 2, must be 0"):
        to_file(patch_run, "tokenizer", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "scales", "dropout"),
    [("single", (16,), 0.0), ("residual", (16,) * 4, 0.1), ("patches", (16,), 0.0)],
)
def test_baselines_take_images_of_256_pixels_as_the_published_one_does(name, scales, dropout):
    stage, published = tokenizer_configs.get_config(name), tokenizer_configs.get_config()
    config = TokenizerConfig(**stage.model.to_dict())
    assert (config.image_size, config.scales, config.quantizer_dropout) == (256, scales, dropout)
    assert config.num_phis == 0 and config.num_codes == 4096
    if name == "patches":
        assert config.patch == config.downsample == 16 and not stage.adversarial.weight
    else:
        fields = ("scales", "num_phis", "quantizer_dropout")
        stage.model.update({field: published.model[field] for field in fields})
        assert stage == published
