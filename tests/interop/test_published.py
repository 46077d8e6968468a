import re
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

import var_jax
from tests.helpers import pickles
from tests.helpers.arrays import GOLDEN_SCALES, TRANSFORMERS
from var_jax.interop.load import published_next_scale, read_network
from var_jax.interop.published import (
    next_scale_config,
    next_scale_constants,
    next_scale_table,
    to_published,
    tokenizer_table,
)
from var_jax.interop.tensor_files import read_networks, read_tensors
from var_jax.transformer.config import NextScaleConfig


def assert_identical(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


def test_tokenizer_round_trip_is_the_identity(goldens, golden_tokenizer):
    tensors = read_tensors(goldens / "vae.pth", "tokenizer")
    params = {**golden_tokenizer.params, "code_hits": tensors["quantize.ema_vocab_hit_SV"]}
    assert_identical(to_published(params, tokenizer_table(golden_tokenizer.module.config)), tensors)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_round_trip_is_the_identity(name, goldens, golden_tokenizer):
    model = var_jax.load_var(goldens / f"{name}.pth", tokenizer=golden_tokenizer)
    config = model.module.config
    assert (config.depth, config.num_heads, config.num_classes) == (3, 3, 10)
    tensors = to_published(model.checkpoint_params, next_scale_table(config), next_scale_constants(config))
    assert_identical(tensors, read_tensors(goldens / f"{name}.pth", "next_scale"))


@pytest.fixture
def changed(goldens, tmp_path):
    """Return a function that writes a changed copy of a golden file as .safetensors and returns its path."""

    def write(name: str, change) -> str:
        (tensors,) = read_networks(goldens / f"{name}.pth").values()
        tensors = {key: np.array(tensor) for key, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


def test_safetensors_load_as_pth_do(changed, golden_tokenizer):
    tokenizer = var_jax.load_tokenizer(changed("vae", lambda t: None), scales=GOLDEN_SCALES)
    np.testing.assert_array_equal(
        tokenizer.params["quantizer"]["codebook"], golden_tokenizer.params["quantizer"]["codebook"]
    )


def test_missing_unknown_and_misshapen_tensors_are_all_named(changed, golden_tokenizer):
    def change(tensors):
        del tensors["blocks.1.attn.q_bias"]
        tensors["blocks.0.extra"] = np.zeros(3, np.float32)
        tensors["blocks.2.ffn.fc1.weight"] = np.zeros((5, 192), np.float32)

    with pytest.raises(ValueError) as error:
        var_jax.load_var(changed("var", change), tokenizer=golden_tokenizer)
    for words in (
        "missing: blocks.1.attn.q_bias",
        "unknown: blocks.0.extra (3,)",
        "blocks.2.ffn.fc1.weight has shape (5, 192), expected (768, 192)",
    ):
        assert words in str(error.value)


def test_constants_of_another_architecture_are_rejected(changed, golden_tokenizer):
    path = changed("var", lambda t: t.update(lvl_1L=np.zeros((1, 30), np.int64)))
    with pytest.raises(ValueError, match=r"lvl_1L .* holds other values"):
        var_jax.load_var(path, tokenizer=golden_tokenizer)


def test_scales_must_be_given_if_the_published_ones_do_not_fit(goldens):
    with pytest.raises(ValueError, match=r"quantize.ema_vocab_hit_SV has shape \(4, 128\).*--scales=1,2"):
        var_jax.load_tokenizer(goldens / "vae.pth")
    with pytest.raises(ValueError, match=r"has shape \(4, 128\), but scales \(1, 2, 4\) .* need \(3, 128\)"):
        var_jax.load_tokenizer(goldens / "vae.pth", scales=(1, 2, 4))


def test_scales_of_a_transformer_are_those_of_its_levels(goldens):
    tensors = dict(read_tensors(goldens / "var.pth", "next_scale"))
    assert next_scale_config(tensors).scales == GOLDEN_SCALES
    del tensors["lvl_1L"]
    with pytest.raises(ValueError, match="not the 680 or 2240 positions"):
        next_scale_config(tensors)


def test_a_transformer_of_other_scales_names_tensor_and_both_shapes(goldens):
    tokenizer = var_jax.load_tokenizer(goldens / "vae.pth", scales=(1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"pos_1LC has shape \(1, 30, 192\).*expected \(1, 25, 192\)"):
        var_jax.load_var(goldens / "var.pth", tokenizer=tokenizer)


def test_a_file_of_another_network_is_rejected(goldens, golden_tokenizer):
    with pytest.raises(ValueError, match="this is the file of a VAR transformer, give it as --checkpoint"):
        var_jax.load_tokenizer(goldens / "var.pth", scales=GOLDEN_SCALES)
    with pytest.raises(ValueError, match="this is the file of a tokenizer, give it as --tokenizer"):
        var_jax.load_var(goldens / "vae.pth", tokenizer=golden_tokenizer)


# --- malicious files


def rejection(load, *args, max_bytes: int = 1 << 25) -> str:
    """Return the message of the ValueError that a call raises; the call must take little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            load(*args)
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()
    return str(error.value)


def small_transformer(**changes) -> dict[str, np.ndarray]:
    """Return the tensors that determine the architecture of a transformer of scales (1, 2)."""
    zeros = lambda *shape: np.zeros(shape, np.float32)
    tensors = {
        "pos_1LC": zeros(1, 5, 64),
        "lvl_1L": np.array([[0, 1, 1, 1, 1]]),
        "word_embed.weight": zeros(64, 4),
        "class_emb.weight": zeros(11, 64),
        "head.weight": zeros(16, 64),
        "blocks.0.attn.q_bias": zeros(64),
    }
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.99999999.attn.x": np.zeros(1)}, "unknown: blocks.99999999.attn.x"),
        ({"blocks.9999.attn.x": np.zeros(1)}, "blocks.9999.attn.x is in the file, but nothing of number 1"),
        ({f"blocks.{i}.x": np.zeros(1) for i in range(300)}, "blocks.299.x is in the file; at most 256"),
        ({"lvl_1L": np.array([[0, 1, 1, 1, 1 << 50]])}, "has 3 levels that are not"),
        ({"lvl_1L": np.array([[0, 1, 1, 1, -1]])}, "has 3 levels that are not"),
        ({"lvl_1L": np.zeros((), np.int64)}, r"lvl_1L is int64 \(\), expected ints \(1, 5\)"),
        ({"lvl_1L": np.zeros((1, 5), np.float32)}, "lvl_1L is float32"),
        (
            {"pos_1LC": np.zeros((1, 10**6, 1), np.float16)},
            "1000000 positions; without scales, at most 10000",
        ),
        ({"pos_1LC": np.zeros(5)}, r"pos_1LC has shape \(5,\), expected 3 dimensions"),
        ({"head.weight": np.zeros(())}, r"head.weight has shape \(\), expected 2 dimensions"),
        ({"class_emb.weight": np.zeros((1, 1, 1))}, "class_emb.weight has shape"),
        ({"class_emb.weight": np.zeros((1, 64))}, "num_classes must be at least 1"),
        ({"class_emb.weight": np.zeros((11, 0))}, "expected|missing|must be"),
        (
            {"blocks.0.attn.scale_mul_1H11": np.zeros(3)},
            r"scale_mul_1H11 has shape \(3,\), expected 4",
        ),
        ({"blocks.0.attn.q_bias": None}, "transformer depth must be at least 1"),
        ({"word_embed.weight": None}, "no tensor word_embed.weight"),
    ],
)
def test_names_and_shapes_of_a_transformer_cannot_cost_memory(tmp_path, changes, message):
    path = pickles.save(tmp_path / "evil.pth", small_transformer(**changes))
    error = rejection(lambda: published_next_scale(path, read_tensors(path, "next_scale")))
    assert "evil.pth" in error and re.search(message, error), error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "missing: decoder"),
        ({"encoder.down.99999999.block.0.x": np.zeros(1)}, "unknown: encoder.down.99999999"),
        (
            {"encoder.down.999.block.0.x": np.zeros(1)},
            "down.999.block.0.x is in the file, but nothing",
        ),
        ({f"encoder.down.{i}.block.0.conv1.weight": np.zeros((32, 1, 1, 1)) for i in range(9)}, "at most 7"),
        ({f"encoder.down.0.block.{i}.x": np.zeros(1) for i in range(100)}, "at most 8 such layers"),
        ({f"quantize.quant_resi.qresi_ls.{i}.weight": np.zeros(1) for i in range(100)}, "at most 64"),
        ({"encoder.down.0.block.0.conv1.weight": None}, "no tensor encoder.down.0.block.0.conv1.weight"),
        ({"encoder.down.0.block.0.conv1.weight": np.zeros((33, 1, 1, 1))}, "no multiples of the first 32"),
        ({"encoder.conv_in.weight": np.zeros((0, 1, 1, 1))}, "no multiples of the first 0"),
        ({"encoder.conv_in.weight": np.zeros((1, 1, 1, 1))}, r"norm_groups=32 must divide .* ch \* 1 = 1"),
        ({"encoder.conv_in.weight": np.zeros(3)}, "expected 4 dimensions"),
        ({"quantize.ema_vocab_hit_SV": np.zeros(3)}, "expected .K, V., K at most 64"),
        ({"quantize.ema_vocab_hit_SV": np.zeros((10**6, 1), np.float16)}, "expected .K, V., K at most 64"),
        ({"quantize.ema_vocab_hit_SV": np.zeros((0, 8))}, "scales"),
    ],
)
def test_names_and_shapes_of_a_tokenizer_cannot_cost_memory(tmp_path, changes, message):
    zeros = lambda *shape: np.zeros(shape, np.float32)
    tensors = {
        "encoder.conv_in.weight": zeros(32, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": zeros(32, 32, 3, 3),
        "quant_conv.weight": zeros(4, 4, 3, 3),
        "quantize.embedding.weight": zeros(8, 4),
    }
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    path = pickles.save(tmp_path / "evil.pth", {n: np.asarray(t, np.float32) for n, t in tensors.items()})
    for load in (lambda: var_jax.load_tokenizer(path), lambda: read_network(path, "tokenizer")):
        error = rejection(load)
        assert "evil.pth" in error and re.search(message, error), error


def test_a_mask_is_not_computed_unless_the_file_holds_one():
    """Constants are computed one at a time, and only to compare them with those in the file."""
    tracemalloc.start()
    config = NextScaleConfig(depth=3, width=64, scales=(1, 64, 64))
    constants = next_scale_constants(config)
    assert constants["attn_bias_for_masking"].shape == (1, 1, 8193, 8193)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
