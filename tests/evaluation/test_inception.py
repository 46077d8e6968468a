"""Test Inception-v3 and its weight files against the published code (goldens/README.md)."""

import importlib.util
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import pickles
from tests.helpers.arrays import close
from var_jax.evaluation.inception import Inception, resize_tf1
from var_jax.interop.inception_weights import load_inception, openai_unit


@pytest.fixture(scope="module")
def arrays(goldens):
    with np.load(goldens / "inception.npz") as file:
        return {key: file[key] for key in file}


@pytest.fixture(scope="module")
def inception_rule(goldens):
    """Module that generates the weights and features of the goldens."""
    spec = importlib.util.spec_from_file_location("inception_weights", goldens / "inception_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(inception_rule) -> dict[str, np.ndarray]:
    """State dict in place of the released weights."""
    return inception_rule.weights()


@pytest.fixture(scope="module")
def variables(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    safetensors.numpy.save_file(weights, path)
    return load_inception(path)


def test_images_are_resized_as_by_tensorflow(arrays):
    lines = arrays["resized_lines"]
    for i in range(8):
        resized = np.asarray(jax.jit(resize_tf1)(arrays[f"image_{i}"][None])[0])
        part = resized[np.ix_(lines, lines)]
        assert np.abs(part - arrays["resized_part"][i]).max() < 0.003
        if zlib.crc32(resized.tobytes()) != arrays["resized_crc32"][i]:  # a device may fuse products and sums
            assert np.abs(part - arrays["resized_part"][i]).max() < 1e-4


def test_features_are_the_published_ones(arrays, variables):
    images = np.concatenate([resize_tf1(arrays[f"image_{i}"][None]) for i in range(8)])
    features = jax.jit(Inception().apply)(variables, images)
    close(features.pool, arrays["pool"], 1e-5)
    close(features.spatial, arrays["spatial"], 1e-5)
    logits = arrays["logits_unbiased"]
    close(features.log_probs, logits - np.log(np.exp(logits).sum(1, keepdims=True)), 1e-5)


def test_every_file_format_has_the_same_weights(arrays, weights, variables, tmp_path):
    """PyTorch's old format with counts of batches; OpenAI's names, which lack the scales, in the new one."""
    with_counts = weights | {
        f"{unit}.bn.num_batches_tracked": np.zeros((), np.int64) for unit in arrays["units"]
    }
    loaded = load_inception(pickles.save_legacy(tmp_path / "pytorch.pth", with_counts))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    names = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    openai = {
        f"{theirs}.{names[name]}": weights[f"{unit}.{name}"]
        for unit, theirs in zip(arrays["units"], arrays["units_openai"], strict=True)
        for name in names
    }
    openai |= {f"output.{name}": weights[f"fc.{name}"] for name in ("weight", "bias")}
    loaded = load_inception(pickles.save(tmp_path / "openai.pt", openai))
    scales = {f"{unit}.bn.weight": np.ones_like(weights[f"{unit}.bn.weight"]) for unit in arrays["units"]}
    safetensors.numpy.save_file(weights | scales, tmp_path / "unscaled.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, load_inception(tmp_path / "unscaled.safetensors"))


def test_units_have_openais_names(arrays):
    ours = [openai_unit(*unit.split(".")) for unit in arrays["units"]]
    assert ours == arrays["units_openai"].tolist()


def test_a_file_of_another_network_is_refused(weights, tmp_path):
    """torchvision's Inception-v3 has 1000 classes and other names in part."""
    other = weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    del other["Mixed_6d.branch1x1.bn.bias"]
    safetensors.numpy.save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"other.safetensors: no weights of Inception-v3 as of 2015-12-05"
    ) as e:
        load_inception(tmp_path / "other.safetensors")
    assert "Mixed_6d.branch1x1.bn.bias is missing, expected (192,)" in str(e.value)
    assert "fc.weight has shape (1000, 2048), expected (1008, 2048)" in str(e.value)
