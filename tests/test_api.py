import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from var_jax import api
from var_jax.images import denormalize_to_uint8
from var_jax.sampling.auto_batch_size import codec_batch
from var_jax.sampling.cast_params import in_compute_dtype
from var_jax.sampling.editing import mask_from_pixels, mask_from_scale
from var_jax.sampling.sampler import NonFiniteImages
from var_jax.scales import SCALES_256
from var_jax.tokenizer import model as tokenizer_model
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.checkpoint_integrity import write_manifest


@pytest.fixture(scope="module")
def loaded(tiny_run):
    tokenizer = var_jax.load_tokenizer(tiny_run)
    return tokenizer, var_jax.load_var(tiny_run, tokenizer=tokenizer)


def test_the_public_api_on_a_run(loaded):
    tokenizer, model = loaded
    assert (tokenizer.scales, tokenizer.num_codes) == ((1, 2, 4), 16)
    assert (tokenizer.num_tokens, tokenizer.image_size) == (21, 8)
    assert (model.num_classes, model.depth) == (10, 2)
    assert model.class_names == tuple("0123456789")
    assert (model.scales, model.image_size) == ((1, 2, 4), 8)
    images = np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (3, 21) and tokens.dtype == np.int32
    full, coarse = tokenizer.decode(tokens), tokenizer.decode(tokens, upto=1)
    assert full.shape == images.shape and full.dtype == np.float32 and 0 <= full.min() <= full.max() <= 1
    assert (full != coarse).any()
    np.testing.assert_array_equal(tokenizer.decode(tokens, upto=3), full)
    changed = tokens.copy()
    changed[:, 5:] = 0  # `upto` looks at the first maps only
    np.testing.assert_array_equal(tokenizer.decode(changed, upto=2), tokenizer.decode(tokens, upto=2))
    logits = model.logits(tokens, [0, 5, 10])
    assert logits.shape == (3, 21, 16) and logits.dtype == np.float32
    images, tokens = model.generate([0, 1, 10], seed=1, return_tokens=True)
    assert images.shape == (3, 8, 8, 3) and tokens.shape == (3, 21)
    np.testing.assert_allclose(images, tokenizer.decode(tokens), atol=1e-5)
    _, again = model.generate([0, 1, 10], seed=1, batch=2, return_tokens=True)
    np.testing.assert_array_equal(again, tokens)


def test_best_and_numbered_checkpoints_load(tiny_run):
    best, numbered = (var_jax.load_tokenizer(tiny_run, step=step) for step in ("best", 2))
    np.testing.assert_array_equal(
        best.params["quantizer"]["codebook"], numbered.params["quantizer"]["codebook"]
    )


def test_round_trip_through_golden_files(golden_tokenizer, golden):
    image = golden("vae")["image"]
    tokens = golden_tokenizer.encode(np.clip(image / 2 + 0.5, 0, 1))
    np.testing.assert_allclose(
        golden_tokenizer.decode(tokens), golden("vae")["reconstruction_3"] / 2 + 0.5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 9, 8, 3)), r"images must be \[B, 8, 8, 3\], got shape \(1, 9, 8, 3\)"),
        (np.zeros((8, 8, 3)), r"images must be \[B, 8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3)), r"got shape \(0, 8, 8, 3\); B must be at least 1"),
        (np.zeros((1, 8, 8, 3), np.uint8), "got uint8; divide uint8 by 255"),
        (np.full((1, 8, 8, 3), 1.002), r"images must be in \[0, 1\], got 1.002 .. 1.002"),
        (np.full((1, 8, 8, 3), -0.5), r"images must be in \[0, 1\], got -0.5"),
        (np.full((1, 8, 8, 3), np.nan), r"images must be in \[0, 1\]"),
    ],
)
def test_wrong_images(loaded, images, message):
    with pytest.raises(ValueError, match=message):
        loaded[0].encode(images)


def test_images_of_any_float_type_and_slightly_outside_the_range_are_encoded(loaded):
    images = np.round(np.random.default_rng(0).random((5, 8, 8, 3)) * 16).astype(np.float32) / 16
    want = loaded[0].encode(images)
    for dtype in (jnp.bfloat16, np.float16, np.float64):
        np.testing.assert_array_equal(loaded[0].encode(images.astype(dtype)), want)
    outside = np.where(images == 1, np.float32(1.0005), np.where(images == 0, np.float32(-0.0005), images))
    np.testing.assert_array_equal(loaded[0].encode(outside), want)


def test_encoding_and_decoding_go_in_batches_of_one_shape(loaded, monkeypatch):
    """One program serves all batches; the last batch is padded."""
    tokenizer, images = loaded[0], np.random.default_rng(0).random((5, 8, 8, 3), dtype=np.float32)
    tokens = tokenizer.encode(images)
    decoded, steps = tokenizer.decode(tokens), tokenizer.decode_steps(tokens)
    np.testing.assert_allclose(steps[:, -1], decoded, atol=1e-5)
    np.testing.assert_allclose(steps[:, 0], tokenizer.decode(tokens, upto=1), atol=1e-5)
    # As many as take 2 GiB by default: eight images of 256 pixels through the published network.
    published = TokenizerConfig(
        scales=SCALES_256, num_codes=4096, code_dim=32, ch=160, ch_mult=(1, 1, 2, 2, 4)
    )
    assert codec_batch(Tokenizer(published)) == 8
    for module_batch in (None, 2):
        monkeypatch.setattr(api, "codec_batch", lambda module: 2)
        compiled = tokenizer_model.decode._cache_size()
        np.testing.assert_array_equal(tokenizer.encode(images, batch=module_batch), tokens)
        np.testing.assert_allclose(tokenizer.decode(tokens, batch=module_batch), decoded, atol=1e-5)
        np.testing.assert_allclose(tokenizer.decode_steps(tokens, batch=module_batch), steps, atol=1e-5)
        assert tokenizer_model.decode._cache_size() <= compiled + 1
    for method, rows in (("encode", images), ("decode", tokens), ("decode_steps", tokens)):
        with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
            getattr(tokenizer, method)(rows, batch=0)


def test_weights_that_are_not_finite_are_an_error_that_names_the_images(loaded):
    tokenizer, model = loaded
    params = dict(model.params, class_embedding=model.params["class_embedding"].at[3].set(jnp.nan))
    broken = var_jax.LoadedVAR(model.module, params, model.options, tokenizer)
    message = r"2 of 3 images are not finite: 0 \(label 3\), 2 \(label 3\). Either the weights hold NaN"
    for smooth in (False, True):
        with pytest.raises(NonFiniteImages, match=message):
            broken.sample([3, 0, 3], smooth=smooth)
    batches = broken.generate_batches([0, 1, 2, 3], 0, 3, model.options, postprocess=denormalize_to_uint8)
    next(batches)  # images 0 .. 2 are sound
    with pytest.raises(NonFiniteImages, match=r"1 of 1 images are not finite: 3 \(label 3\)"):
        next(batches)
    broken = jax.tree.map(lambda x: x, tokenizer.params)
    broken["decoder"]["conv_out"]["bias"] = broken["decoder"]["conv_out"]["bias"].at[0].set(jnp.inf)
    broken["quantizer"]["codebook"] = broken["quantizer"]["codebook"].at[7].set(jnp.nan)
    tokens = np.zeros((3, 21), int)
    tokens[1, 20] = 7
    with pytest.raises(NonFiniteImages, match="1 of 3 images are not finite: 1"):
        var_jax.LoadedTokenizer(tokenizer.module, broken).decode(tokens)


@pytest.mark.parametrize("seed", [2**32, 2**63, -1, 1.0, True, "1"])
def test_seeds_that_would_repeat_others_are_refused(loaded, seed):
    _, model = loaded
    images, mask, tokens = np.zeros((1, 8, 8, 3)), np.ones((8, 8), bool), np.zeros((1, 21), int)
    for method, *arguments in ((model.generate, [1]), (model.inpaint, images, mask), (model.vary, tokens, 1)):
        with pytest.raises(ValueError, match=f"seed must be a whole number in 0 .. 4294967295, got {seed!r}"):
            method(*arguments, seed=seed)


def test_a_run_draws_with_its_own_options(loaded):
    _, model = loaded
    own = dataclasses.asdict(model.options)
    images, tokens = model.sample([1, 2], seed=3, return_tokens=True)
    np.testing.assert_array_equal(tokens, model.generate([1, 2], seed=3, return_tokens=True, **own)[1])
    np.testing.assert_array_equal(model.sample([1, 2], seed=3), images)
    _, cold = model.sample([1, 1], temperature=1e-4, return_tokens=True)
    np.testing.assert_array_equal(cold[0], cold[1])
    with pytest.raises(TypeError, match="gidance"):
        model.sample([1], gidance=1.0)


def test_inpainting_keeps_the_tokens_and_on_request_the_pixels_outside_the_mask(loaded):
    tokenizer, model = loaded
    images = np.random.default_rng(1).random((3, 8, 8, 3), dtype=np.float32)
    mask = np.zeros((8, 8), bool)
    mask[4:] = True
    edited, tokens = model.inpaint(images, mask, [1, 2, 3], return_tokens=True)
    known = tokenizer.encode(images)
    resample = mask_from_pixels(mask[None], model.module.config.schedule)[0]
    np.testing.assert_array_equal(tokens[:, ~resample], known[:, ~resample])
    assert (tokens[:, resample] != known[:, resample]).mean() > 0.3
    np.testing.assert_allclose(edited, tokenizer.decode(tokens), atol=1e-5)
    pasted = model.inpaint(images, mask, [1, 2, 3], paste_back=True)
    np.testing.assert_array_equal(pasted[:, :4], images[:, :4])
    np.testing.assert_array_equal(pasted[:, 4:], edited[:, 4:])
    # Without labels: as for "no class".  With a mask for each image: as with one for all.
    none = model.inpaint(images, np.stack([mask] * 3), [10, 10, 10], seed=4)
    np.testing.assert_array_equal(model.inpaint(images, mask, seed=4), none)
    for wrong, received in ((mask[:4], r"bool \(4, 8\)"), (mask.astype(int), r"int64 \(8, 8\)")):
        with pytest.raises(ValueError, match=r"must be bool \(3, 8, 8\) like the images, got " + received):
            model.inpaint(images, wrong)
    with pytest.raises(ValueError, match="got 3 images and 2 labels"):
        model.inpaint(images, mask, [1, 2])
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
        model.inpaint(images, mask, batch=0)


def test_a_mask_of_one_pixel_changes_its_cell_and_an_empty_one_is_refused(loaded):
    tokenizer, model = loaded
    images = np.random.default_rng(1).random((30, 8, 8, 3), dtype=np.float32)
    mask = np.zeros((30, 8, 8), bool)
    mask[:, 5, 2] = True
    _, tokens = model.inpaint(images, mask, top_k=0, top_p=0.0, return_tokens=True)
    changed = tokens != tokenizer.encode(images)
    cell = 5 + 4 * 2 + 1
    assert changed[:, cell].mean() > 0.5 and not np.delete(changed, cell, axis=1).any()
    mask[3] = False
    with pytest.raises(ValueError, match="in image 3 it selects none: 0 of its pixels are True"):
        model.inpaint(images, mask)


def test_variation_keeps_the_coarse_maps(loaded):
    _, model = loaded
    _, tokens = model.generate([1, 2, 3], return_tokens=True)
    for first, start in ((0, 0), (1, 1), (2, 5)):
        _, varied = model.vary(tokens, first, [1, 2, 3], seed=7, return_tokens=True)
        np.testing.assert_array_equal(varied[:, :start], tokens[:, :start])
        assert (varied[:, start:] != tokens[:, start:]).mean() > 0.3
    # The seed of the image itself gives the same tokens, also in batches of two.
    _, same = model.vary(tokens, 1, [1, 2, 3], return_tokens=True, batch=2)
    np.testing.assert_array_equal(same, tokens)
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
        model.vary(tokens, 1, batch=0)


def test_eight_devices_share_a_batch(loaded):
    _, model = loaded
    replicated = model.replicate()
    assert len(replicated.params["head"]["kernel"].sharding.device_set) == 8
    labels = [0, 1, 2, 3, 4]
    images, tokens = replicated.generate(labels, return_tokens=True)
    want, want_tokens = model.generate(labels, return_tokens=True)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_allclose(images, want, atol=1e-5)


def test_parameters_are_stored_in_the_dtype_of_their_use(loaded):
    params = in_compute_dtype(loaded[1].params, jnp.bfloat16)
    layers = params["blocks"]["layers_0"]["attention"]
    assert layers["qkv"]["kernel"].dtype == layers["q_bias"].dtype == jnp.bfloat16
    assert params["position_embedding"].dtype == layers["log_temperature"].dtype == jnp.float32
    tokenizer = in_compute_dtype(loaded[0].params, jnp.bfloat16)
    assert tokenizer["encoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert tokenizer["encoder"]["norm_out"]["bias"].dtype == jnp.float32
    assert tokenizer["quantizer"]["codebook"].dtype == tokenizer["quantizer"]["phi_bias"].dtype == jnp.float32
    # A network of that dtype casts the parameters at every use, so the numbers are the same.
    module = dataclasses.replace(loaded[1].module, dtype=jnp.dtype(jnp.bfloat16))
    inputs = (jnp.zeros(1, jnp.int32), jnp.ones((1, 20, 4)))
    want = module.apply({"params": loaded[1].params}, *inputs)
    np.testing.assert_array_equal(module.apply({"params": params}, *inputs), want)


def test_wrong_tokens_and_labels(loaded):
    tokenizer, model = loaded
    tokens = np.zeros((1, 21), int)
    for wrong, message in (
        (tokens[:, :20], r"tokens must be int \[B, 21\], got int64 \(1, 20\)"),
        (tokens[:0], r"got int64 \(0, 21\); B must be at least 1"),
        (tokens + 16, r"tokens must be in 0 .. 15, got 16 .. 16"),
        (tokens * 1.0, "got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(wrong)
    for upto in (4, 0, 2.0):
        with pytest.raises(ValueError, match=f"upto must be a whole number in 1 .. 3, got {upto}"):
            tokenizer.decode(tokens, upto=upto)
    for labels, message in (
        ([11], r"labels must be in 0 .. 10 \(10 means no class\), got 11 .. 11"),
        ([-1], "got -1"),
        ([], "B at least 1"),
        ([[1]], r"labels must be int \[B\]"),
        ([0.5], "got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(labels)
    with pytest.raises(ValueError, match="2 labels"):
        model.logits(tokens, [0, 1])
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
        model.generate([0], batch=0)


def test_a_run_of_other_scales_or_without_checkpoints(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"has scales \(1, 2, 4\), asked for \(1, 4\)"):
        var_jax.load_tokenizer(tiny_run, scales=(1, 4))
    with pytest.raises(FileNotFoundError, match="train this stage first"):
        var_jax.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        var_jax.load_tokenizer(tmp_path / "nothing.pth")


def test_a_transformer_of_another_tokenizer(tiny_run, golden_tokenizer):
    with pytest.raises(ValueError, match=r"has scales \(1, 2, 4\), but the tokenizer has \(1, 2, 3, 4\)"):
        var_jax.load_var(tiny_run, tokenizer=golden_tokenizer)


def test_a_run_on_a_tokenizer_from_elsewhere_leads_to_it(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "next_scale", tmp_path / "next_scale")
    (saved,) = (tmp_path / "next_scale" / "checkpoints").glob("*/config/metadata")
    record = json.loads(saved.read_text())
    record["stage"]["tokenizer"] = str(tiny_run)
    saved.write_text(json.dumps(record))
    write_manifest(saved.parent.parent)
    tokenizer = var_jax.load_tokenizer(tmp_path)
    want = var_jax.load_tokenizer(tiny_run).params["quantizer"]["codebook"]
    np.testing.assert_array_equal(tokenizer.params["quantizer"]["codebook"], want)
    assert var_jax.load_var(tmp_path, tokenizer=tokenizer).depth == 2


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "guidance_until": 2, "top_k": 5, "top_p": 0.9}])
def test_a_stream_ends_with_the_images_of_sample(loaded, options):
    tokenizer, model = loaded
    steps = list(model.stream([0, 1, 10], seed=1, **options))
    images, tokens = model.sample([0, 1, 10], seed=1, return_tokens=True, **options)
    assert [step_tokens.shape for _, step_tokens in steps] == [(3, 1), (3, 5), (3, 21)]
    np.testing.assert_array_equal(steps[-1][1], tokens)
    np.testing.assert_allclose(
        np.stack([step_images for step_images, _ in steps], axis=1), tokenizer.decode_steps(tokens), atol=1e-5
    )
    np.testing.assert_allclose(steps[-1][0], images, atol=1e-5)


def test_a_stream_of_known_tokens_ends_with_the_edit_and_the_variation(loaded):
    tokenizer, model = loaded
    images, mask = np.random.default_rng(3).random((2, 8, 8, 3), np.float32), np.zeros((8, 8), bool)
    mask[4:] = True
    tokens, options = tokenizer.encode(images), dataclasses.asdict(model.options)
    for known, (_, expected) in (
        (
            model.known_outside_mask(tokens, mask),
            model.inpaint(images, mask, [1, 2], 5, return_tokens=True, **options),
        ),
        (
            model.known_before_scale(tokens, 1),
            model.vary(tokens, 1, [1, 2], 5, return_tokens=True, **options),
        ),
    ):
        *_, (_, streamed) = model.stream([1, 2], 5, known)
        np.testing.assert_array_equal(streamed, expected)


def test_a_stream_keeps_known_tokens_and_checks_its_arguments_at_once(loaded):
    tokenizer, model = loaded
    tokens = tokenizer.encode(np.random.default_rng(0).random((1, 8, 8, 3), np.float32))
    known = api.KnownTokens(tokens, mask_from_scale(2, 1, model.module.config.schedule))
    *_, (_, varied) = model.stream([3], known=known)
    np.testing.assert_array_equal(varied[:, :5], tokens[:, :5])
    assert (varied[:, 5:] != tokens[:, 5:]).any()
    with pytest.raises(ValueError, match="labels must be in 0"):
        model.stream([11])


def test_attention_of_a_position_reaches_its_own_and_coarser_maps(loaded):
    _, model = loaded
    tokens = np.random.default_rng(1).integers(0, 16, (2, 21))
    weights = model.attention(tokens, [1, 10], position=3)  # of the second map
    assert weights.shape == (2, 2, 4, 21)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (weights[..., 5:] == 0).all() and (weights[..., :5] > 0).all()
    with pytest.raises(ValueError, match=r"position must be a whole number in 0 \.\. 20, got 21"):
        model.attention(tokens, [1, 10], position=21)


def test_the_tokenizer_of_a_run_comes_along(tiny_run, loaded):
    model = var_jax.load_var(tiny_run)
    np.testing.assert_array_equal(model.sample([1, 2], seed=3), loaded[1].sample([1, 2], seed=3))
