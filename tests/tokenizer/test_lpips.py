import zlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.arrays import close
from tests.helpers.pickles import save_legacy
from tests.helpers.tiny import tiny_config
from var_jax.errors import ConfigError
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.stages import load_perceptual_networks
from var_jax.tokenizer.lpips import CHANNELS, LAYERS, perceptual_by_layer, perceptual_distance, vgg_features
from var_jax.training.tokenizer_task import TokenizerTask


def tensors() -> dict[str, np.ndarray]:
    """Create the weights of the golden distances, by name."""
    result, channels = {}, 3
    draw = lambda name, shape: (
        np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    )
    for layer, convolutions in enumerate(LAYERS):
        out = CHANNELS[layer]
        for i in convolutions:
            name = f"features.{i}.weight"
            result[name] = draw(name, (out, channels, 3, 3)) * np.float32(np.sqrt(2 / (9 * channels)))
            name = f"features.{i}.bias"
            result[name] = np.float32(0.05) * draw(name, (out,))
            channels = out
        name = f"lin{layer}.model.1.weight"
        result[name] = np.float32(0.1) * np.abs(draw(name, (1, out, 1, 1)))
    return result


def in_lpips_layout(name: str) -> str:
    if not name.startswith("features."):
        return name.replace("lin", "lins.")
    i = int(name.split(".")[1])
    layer = next(n for n, convolutions in enumerate(LAYERS) if i in convolutions)
    return name.replace("features.", f"net.slice{layer + 1}.")


@pytest.fixture(scope="module", params=["torchvision", "lpips"])
def params(request, tmp_path_factory) -> dict:
    """Parameters loaded from two files as torchvision and LPIPS ship them, or from one in LPIPS's layout."""
    folder, weights = tmp_path_factory.mktemp("lpips"), tensors()
    if request.param == "lpips":
        all_weights = {in_lpips_layout(name): tensor for name, tensor in weights.items()}
        save_file(all_weights, folder / "lpips.safetensors")
        return load_perceptual([folder / "lpips.safetensors"])
    linear = {name: weights.pop(name) for name in list(weights) if name.startswith("lin")}
    weights["classifier.0.weight"] = np.zeros((3, 3), np.float32)
    vgg, lpips = save_legacy(folder / "vgg16.pth", weights), save_legacy(folder / "vgg.pth", linear)
    return load_perceptual([vgg, lpips])


def test_golden_distances_and_features(params, golden):
    arrays = golden("lpips")
    x, y = arrays["x"], arrays["y"]
    close(perceptual_by_layer(params, x, y), arrays["by_layer"])
    close(perceptual_distance(params, x, y), arrays["distance"])
    for layer, features in enumerate(vgg_features(params, x)):
        close(features[..., :8], arrays[f"features_{layer}"])


def test_an_image_is_at_no_distance_from_itself_and_the_gradient_there_is_finite(params):
    x = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    assert float(perceptual_distance(params, x, x)[0]) == 0
    gradient = jax.grad(lambda y: perceptual_distance(params, x, y).sum())(np.zeros_like(x))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_it_is_a_term_of_the_loss_where_weights_are_given(params):
    config = tiny_config("none").tokenizer
    config.model.update(scales=(1, 2, 4, 8), num_codes=16)
    config.loss.update(l2=1.0, perceptual=0.5, codebook=0.0)
    config.adversarial.weight = 0.0
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)}
    key = jax.random.key(0)
    with_vgg, without = TokenizerTask(config, 5, {"vgg": params}), TokenizerTask(config, 5)
    variables = nn.meta.unbox(with_vgg.init(key)[0])
    measure = lambda task: jax.jit(task._gradient)(variables, {}, task.frozen, batch, 0, key)[1][0]
    metrics, plain = measure(with_vgg), measure(without)
    assert "perceptual" not in plain and float(metrics["perceptual"]) > 0
    np.testing.assert_allclose(metrics["loss"], plain["loss"] + 0.5 * metrics["perceptual"], rtol=1e-5)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels"):
        config.model.scales = (1, 2, 4)
        TokenizerTask(config, 5, {"vgg": params})


def test_without_a_file_it_is_off_with_a_notice(capsys):
    config = tiny_config("none").tokenizer
    assert load_perceptual_networks(config) == {} and capsys.readouterr().out == ""
    config.loss.perceptual = 1.0
    assert load_perceptual_networks(config) == {}
    assert "no perceptual loss, since config.perceptual_weights names no file" in capsys.readouterr().out
    config.perceptual_weights = "nowhere.pth"
    with pytest.raises(ConfigError, match="config.perceptual_weights: no such file: .*nowhere.pth"):
        load_perceptual_networks(config)


def test_what_is_missing_or_misshapen_is_named(tmp_path):
    weights = tensors()
    del weights["features.5.bias"], weights["lin2.model.1.weight"]
    weights["features.0.weight"] = weights["features.0.weight"][:, :1]
    save_file({name: np.ascontiguousarray(t) for name, t in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        load_perceptual([tmp_path / "x.safetensors"])
    for words in (
        "missing: features.5.bias or net.slice2.5.bias",
        "missing: lin2.model.1.weight or lins.2.model.1.weight",
        "features.0.weight has shape (64, 1, 3, 3), expected (64, 3, 3, 3)",
    ):
        assert words in str(error.value)
