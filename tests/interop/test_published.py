import numpy as np
import pytest
from safetensors.numpy import save_file

import var_jax
from tests.conftest import GOLDEN_SCALES, TRANSFORMERS
from var_jax.interop.published import (
    next_scale_constants,
    next_scale_config,
    next_scale_table,
    to_published,
    tokenizer_table,
)
from var_jax.interop.tensor_files import read_networks, read_tensors


def assert_identical(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_tokenizer_round_trip_is_the_identity(goldens, golden_tokenizer):
    tensors = read_tensors(goldens / "vae.pth", "tokenizer")
    params = {**golden_tokenizer.params, "code_hits": tensors["quantize.ema_vocab_hit_SV"]}
    assert_identical(to_published(params, tokenizer_table(golden_tokenizer.module.config)), tensors)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_round_trip_is_the_identity(name, goldens, golden_tokenizer):
    model = var_jax.load_var(goldens / f"{name}.pth", tokenizer=golden_tokenizer)
    config = model.module.config
    assert (config.depth, config.num_heads, config.num_classes) == (3, 3, 10)
    got = to_published(model.params, next_scale_table(config), next_scale_constants(config))
    assert_identical(got, read_tensors(goldens / f"{name}.pth", "next_scale"))


@pytest.fixture
def changed(goldens, tmp_path):
    """Writes a golden file as .safetensors with changes; returns its path."""

    def write(name: str, change) -> str:
        (tensors,) = read_networks(goldens / f"{name}.pth").values()
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


def test_constants_of_another_architecture_are_noticed(changed, golden_tokenizer):
    path = changed("var", lambda t: t.update(lvl_1L=np.zeros((1, 30), np.int64)))
    with pytest.raises(ValueError, match=r"lvl_1L .* holds other values"):
        var_jax.load_var(path, tokenizer=golden_tokenizer)


def test_scales_must_be_given_where_the_published_ones_do_not_fit(goldens):
    with pytest.raises(ValueError, match=r"quantize.ema_vocab_hit_SV has shape \(4, 128\).*pass scales="):
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


def test_the_wrong_kind_of_file_is_noticed(goldens, golden_tokenizer):
    with pytest.raises(ValueError, match="no published tokenizer: it has no tensor encoder.conv_in.weight"):
        var_jax.load_tokenizer(goldens / "var.pth", scales=GOLDEN_SCALES)
    with pytest.raises(ValueError, match="no published VAR transformer: it has no tensor pos_1LC"):
        var_jax.load_var(goldens / "vae.pth", tokenizer=golden_tokenizer)
