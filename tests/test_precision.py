"""Equal numbers on every platform: TF32 and bfloat16 operands are emulated, and jaxprs are inspected."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from tests.helpers.arrays import GOLDEN_SCALES, all_tokens, close
from tests.helpers.emulate import PLATFORMS, emulated, precision_of, products
from tests.helpers.tiny import tiny_config
from tests.helpers.token_cache import altered, describe
from var_jax.data.token_cache import open_token_cache
from var_jax.data.token_writer import BatchEncoder
from var_jax.evaluation import reconstruction
from var_jax.interop.load import load_tokenizer
from var_jax.sampling.cast_params import tokenizer_in_compute_dtype
from var_jax.sampling.sampler import smooth_codes
from var_jax.stages import build_task
from var_jax.tokenizer.discriminator import PatchDiscriminator
from var_jax.tokenizer.lpips import CHANNELS, LAYERS, perceptual_distance
from var_jax.training.transformer_task import NextScaleTask
from var_jax.transformer.head import Head

HALF, FULL = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.fixture
def accelerator(monkeypatch):
    """Make networks load with the dtypes of an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    monkeypatch.undo()


def images_like(tokenizer, count: int = 8) -> jax.Array:
    side = tokenizer.config.image_size
    return jax.random.uniform(jax.random.key(0), (count, side, side, 3), minval=-1)


def assert_all_highest(function, *args) -> None:
    eqns = products(function, *args)
    assert eqns and {precision_of(eqn) for eqn in eqns} == {"highest"}, eqns


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("platform", PLATFORMS)
def test_golden_tokens_do_not_move_on_an_accelerator(platform, goldens, golden, accelerator):
    tokenizer = var_jax.load_tokenizer(goldens / "vae.pth", scales=GOLDEN_SCALES)
    assert tokenizer.module.dtype == HALF and tokenizer.module.dtype_of_encoder == FULL
    arrays = golden("vae")
    both = lambda module, images: (module.encode(images), module.features(images))
    encode = lambda images: tokenizer.module.apply({"params": tokenizer.params}, images, method=both)
    tokens, features = emulated(encode, platform)(arrays["image"])
    np.testing.assert_array_equal(tokens, all_tokens(arrays))
    close(features, arrays["features"])


def test_three_bfloat16_passes_are_nearer_to_float32_than_tf32_and_this_than_one(tiny_tokenizer):
    module, params = tiny_tokenizer
    images, error = images_like(module), {}
    for precision, platform in (("high", "tpu"), ("high", "gpu"), ("default", "tpu"), ("highest", "tpu")):
        features = lambda x, p=precision: dataclasses.replace(module, encoder_precision=p).apply(
            {"params": params}, x, method="features"
        )
        rough = emulated(features, platform)(images)
        error[precision, platform] = float(jnp.abs(rough - jax.jit(features)(images)).max())
    assert error["highest", "tpu"] < error["high", "tpu"] < error["high", "gpu"] / 4
    assert error["high", "gpu"] < error["default", "tpu"] / 2


def test_phi_and_sums_of_maps_are_float32_on_every_platform(tiny_tokenizer):
    module, params = tiny_tokenizer
    tokens = jax.random.randint(jax.random.key(0), (2, 21), 0, 16)
    assert_all_highest(
        lambda t: module.apply({"params": params}, t, method=lambda m, t: m.quantizer().partial_sums(t)),
        tokens,
    )
    mixtures = lambda logits: smooth_codes(logits, 0.0, params["quantizer"]["codebook"], 0.5)
    assert_all_highest(mixtures, jnp.zeros((2, 4, 16)))


def test_every_product_of_encoding_is_float32_at_highest_whatever_pixels_are_made_in(tiny_run, accelerator):
    for dtype in ("auto", "float32"):
        tokenizer, params = load_tokenizer(tiny_run, dtype=dtype)
        assert tokenizer.dtype == (HALF if dtype == "auto" else FULL)
        params = tokenizer_in_compute_dtype(params, tokenizer)
        assert params["encoder"]["conv_in"]["kernel"].dtype == params["quant_conv"]["bias"].dtype == FULL
        assert params["decoder"]["conv_in"]["kernel"].dtype == tokenizer.dtype
        encode = lambda x: tokenizer.apply({"params": params}, x, method="encode")  # noqa: B023
        assert_all_highest(encode, images_like(tokenizer))
        decode = lambda t: tokenizer.apply({"params": params}, t, method="decode")  # noqa: B023
        decoding = [
            eqn for eqn in products(decode, jnp.zeros((1, 21), jnp.int32)) if eqn.invars[0].aval.ndim == 4
        ]
        assert {str(eqn.invars[0].aval.dtype) for eqn in decoding} == {"float32", tokenizer.dtype.name}
    tokenizer, params = load_tokenizer(tiny_run, dtype="bfloat16")
    assert tokenizer.dtype == tokenizer.dtype_of_encoder == HALF
    assert tokenizer_in_compute_dtype(params, tokenizer)["encoder"]["conv_in"]["kernel"].dtype == HALF


def test_a_token_cache_and_an_evaluation_encode_at_highest_and_judge_in_float32(tiny_tokenizer, monkeypatch):
    module, params = tiny_tokenizer
    module = dataclasses.replace(module, dtype=HALF, encoder_dtype=FULL)
    pixels = np.zeros((8, 8, 8, 3), np.uint8)
    encoder = BatchEncoder(module, params, 8)
    assert_all_highest(encoder._encode, encoder._params, pixels)
    real_jit, eqns = jax.jit, []

    def jit(function):
        def run(*args):
            eqns.extend(products(function, *args))
            return real_jit(function)(*args)

        return run

    monkeypatch.setattr(reconstruction.jax, "jit", jit)
    reconstruction.evaluate_reconstruction(module, params, [{"image": pixels, "valid": np.ones(8)}], 8)
    in_float32 = [eqn for eqn in eqns if eqn.invars[0].aval.dtype == FULL]
    assert {precision_of(eqn) for eqn in in_float32} == {"highest"}
    encoding = len(
        products(lambda x: module.apply({"params": params}, x, method="encode"), jnp.zeros((8, 8, 8, 3)))
    )
    assert encoding < len(in_float32) < len(eqns)  # the decoder is bfloat16


def test_networks_that_judge_images_are_float32_unless_less_is_asked_for():
    array = lambda *shape: jax.ShapeDtypeStruct(shape, FULL)
    channels = (3, *(width for width, layer in zip(CHANNELS, LAYERS, strict=True) for _ in layer))
    names = [str(i) for layer in LAYERS for i in layer]
    conv = {
        name: {"kernel": array(3, 3, before, after), "bias": array(after)}
        for name, before, after in zip(names, channels[:-1], channels[1:], strict=True)
    }
    vgg = {"conv": conv, "linear": {str(i): array(width) for i, width in enumerate(CHANNELS)}}
    images = array(2, 16, 16, 3)
    assert_all_highest(perceptual_distance, vgg, images, images)
    eqns = products(lambda *args: perceptual_distance(*args, precision="default"), vgg, images, images)
    assert {precision_of(eqn) for eqn in eqns} == {"default"}
    assert_all_highest(PatchDiscriminator(8, 1).init_with_output, jax.random.key(0), images)


def test_the_dtype_asked_for_is_the_networks(tiny_run):
    tokenizer = var_jax.load_tokenizer(tiny_run, dtype="bfloat16")
    model = var_jax.load_var(tiny_run, tokenizer=tokenizer, dtype="bfloat16")
    assert tokenizer.module.dtype_of_encoder == tokenizer.module.dtype == model.module.dtype == HALF
    assert model.params["code_embedding"]["kernel"].dtype == model.params["head"]["bias"].dtype == FULL
    assert model.params["head"]["kernel"].dtype == HALF
    for load in (var_jax.load_tokenizer, lambda path, dtype: var_jax.load_var(path, tokenizer, dtype=dtype)):
        with pytest.raises(ValueError, match="must be auto, float32 or bfloat16, got 'fp16'"):
            load(tiny_run, dtype="fp16")


# ------------------------------------------------------------------------------------------------ training


def test_training_encodes_in_float32_at_the_precision_asked_for_and_evaluates_at_highest(tiny_run, tmp_path):
    stage = tiny_config(tmp_path).next_scale
    stage.train.dtype = "bfloat16"
    inputs = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8)}
    tokenizer = load_tokenizer(tiny_run, dtype="bfloat16")
    for requested, expected in ((None, "high"), ("default", "default"), ("highest", "highest")):
        if requested is None:
            del stage.transformer.encoder_precision  # a config from before the field
        else:
            stage.transformer.encoder_precision = requested
        task = NextScaleTask(stage, 6, *tokenizer, classes=10)
        features = lambda x: task.tokenizer.apply({"params": task.frozen["tokenizer"]}, x, method="features")  # noqa: B023
        encoder = len(products(features, jnp.zeros((2, 8, 8, 3))))
        for module, precision in ((task.training_tokenizer, expected), (task.tokenizer, "highest")):
            eqns = products(lambda b: task._tokens(module, task.frozen, b), inputs)  # noqa: B023
            assert {str(v.aval.dtype) for eqn in eqns for v in eqn.invars} == {"float32"}
            assert {precision_of(eqn) for eqn in eqns[:encoder]} == {precision}
            assert {precision_of(eqn) for eqn in eqns[encoder:]} == {"highest"}
    stage.transformer.encoder_precision = "float32"
    with pytest.raises(
        ValueError, match="encoder_precision must be one of default, high, highest; got 'float32'"
    ):
        NextScaleTask(stage, 6, *tokenizer, classes=10)


def test_a_cache_of_another_dtype_is_noticed_and_one_of_float32_is_not(
    tiny_run, token_cache, tmp_path, capsys, accelerator
):
    encoder = load_tokenizer(tiny_run)[0]
    assert describe(tiny_run).dtype == encoder.dtype_of_encoder.name == "float32" != encoder.dtype.name
    stage = tiny_config(tmp_path).next_scale
    stage.tokenizer, stage.data.tokens = str(tiny_run), str(token_cache)
    stage.data.update(resize=1.125, flip=True, shift=1)
    stage.transformer.update(attention="einsum", remat="none")
    build_task(stage, tmp_path, open_token_cache(stage.data.tokens)[0])
    assert "encoded in" not in capsys.readouterr().out
    stage.data.tokens = str(altered(token_cache, tmp_path / "half", dtype="bfloat16"))
    build_task(stage, tmp_path, open_token_cache(stage.data.tokens)[0])
    assert "of digits was encoded in bfloat16: some of its tokens are not those" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ transformer


@pytest.mark.parametrize("positions", ["learned_1d", "learned_2d+rotary_2d"])
def test_a_float32_transformer_is_float32_on_every_platform(tiny_var, positions):
    module = dataclasses.replace(tiny_var[0], attention="grouped")
    module = dataclasses.replace(module, config=dataclasses.replace(module.config, positions=positions))
    inputs = (jnp.array([1, 5]), jax.random.normal(jax.random.key(0), (2, 20, 4)))
    params = jax.eval_shape(module.init, jax.random.key(1), *inputs)["params"]
    tokens = jnp.zeros((2, 21), jnp.int32)
    loss = lambda p: module.apply({"params": p}, *inputs, tokens, method="losses")[0].sum()
    assert_all_highest(jax.grad(loss), params)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_golden_logits_do_not_move_on_an_accelerator(platform, golden_var, golden):
    model, arrays = golden_var
    inputs = (jnp.asarray(arrays["label"]), jnp.asarray(golden("vae")["var_input"]))
    logits = lambda *inputs: model.module.apply({"params": model.params}, *inputs)
    close(emulated(logits, platform)(*inputs), jax.jit(logits)(*inputs), 1e-6)


def test_logits_leave_the_head_in_float32_and_their_gradients_run_in_bfloat16(tiny_var):
    module, params = dataclasses.replace(tiny_var[0], dtype=HALF), tiny_var[1]
    inputs = (jnp.array([1, 5]), jax.random.normal(jax.random.key(0), (2, 20, 4)))
    logits = jax.jit(module.apply)({"params": params}, *inputs)
    assert logits.dtype == FULL
    assert (logits.astype(HALF).astype(FULL) != logits).mean() > 0.9  # rounding would make them equal
    tokens = jnp.zeros((2, 21), jnp.int32)
    loss = lambda p: module.apply({"params": p}, *inputs, tokens, method="losses")[0].sum()
    codes = module.config.num_codes
    of_head = [
        eqn
        for eqn in products(jax.grad(loss), params)
        if codes in (*eqn.outvars[0].aval.shape, *eqn.invars[0].aval.shape)
    ]
    assert len(of_head) >= 3  # logits, their gradient to the activations and to the kernel
    assert {str(v.aval.dtype) for eqn in of_head for v in eqn.invars} == {"bfloat16"}
    forward = [
        eqn for eqn in of_head if eqn.outvars[0].aval.shape[-1] == codes and eqn.outvars[0].aval.ndim == 3
    ]
    assert forward and {str(eqn.outvars[0].aval.dtype) for eqn in forward} == {"float32"}


def test_the_gradients_of_the_head_are_those_of_a_plain_product():
    x, kernel, weights = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3), ((2, 5, 8), (8, 16), (2, 5, 16)), strict=True
        )
    )
    for dtype, tolerance in ((FULL, 1e-6), (HALF, 1e-2)):
        head = Head(16, nn.initializers.zeros_init(), dtype)
        params = {"kernel": kernel, "bias": jnp.ones(16)}
        loss = lambda params, x: jnp.sum(head.apply({"params": params}, x) * weights)  # noqa: B023
        grads, x_grad = jax.jit(jax.grad(loss, (0, 1)))(params, x)
        close(grads["kernel"], np.einsum("bnd,bnv->dv", x, weights), tolerance)
        close(grads["bias"], np.sum(weights, (0, 1)), 1e-6)
        close(x_grad, np.einsum("bnv,dv->bnd", weights, kernel), tolerance)
