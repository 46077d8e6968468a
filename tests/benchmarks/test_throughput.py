import json
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import input_rate, throughput
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.hardware import Chip

YARDSTICK = """
import json, os, sys
print("some noise")
tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE")
print(json.dumps({"seconds": 1.0, "images_per_s": 2.0, "arguments": sys.argv[1:], "tf32": tf32}))
"""


def line(monkeypatch, capsys, *arguments) -> dict:
    small = ("--tiny", "--depth=1", "--batch=2", "--repeats=1")
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, *small])
    throughput.main()
    (printed,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(printed)


@pytest.fixture
def no_counts(monkeypatch):
    """Simulate a platform without FLOP counts of lowered programs, such as a GPU, or memory stats."""

    def unimplemented(device):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: MemoryStats")

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda lowered: None)
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", unimplemented)


@pytest.mark.parametrize("what", ["sample", "train", "tokenizer", "encode", "decode"])
def test_one_json_line(no_counts, monkeypatch, capsys, what):
    result = line(monkeypatch, capsys, what)
    assert result["what"] == what and result["dtype"] == "float32" and result["parameters"] > 1000
    assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=0.02)
    assert result["compile_s"] > 0 and result["tflops"] >= 0 and "ratio" not in result
    assert result["peak_gib"] >= 0


def test_the_input_is_measured_on_a_platform_that_counts_no_flops(no_counts, monkeypatch, capsys, digits_dir):
    result = line(monkeypatch, capsys, "input", "--data=digits", f"--data_dir={digits_dir}", "--threads=2")
    assert result["images_per_s"] > 0
    assert input_rate.encoder_flops(Tokenizer(TokenizerConfig(**throughput.TINY_TOKENIZER))) > 1e4


def test_peak_memory_is_the_devices_own_count_if_it_has_one(monkeypatch):
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    assert throughput.peak_bytes(compiled) >= 2 * 64 * 64 * 4  # operand and result
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda device: {"peak_bytes_in_use": 7})
    assert throughput.peak_bytes(compiled) == 7


def test_training_from_images_is_compared_with_training_from_tokens(monkeypatch, capsys):
    result = line(monkeypatch, capsys, "train", "--with_encoder")
    with_encoder = result["with_encoder"]
    assert with_encoder["ratio"] == pytest.approx(with_encoder["seconds"] / result["seconds"], abs=1e-3)
    assert with_encoder["images_per_s"] == pytest.approx(2 / with_encoder["seconds"], rel=0.02)
    assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=0.02)
    with pytest.raises(SystemExit, match="--with_encoder: goes with train, not with sample"):
        line(monkeypatch, capsys, "sample", "--with_encoder")


def test_the_ratio_leaves_out_the_decoder_which_the_yardstick_lacks(monkeypatch, capsys, tmp_path):
    (tmp_path / "peer.py").write_text(YARDSTICK)
    result = line(monkeypatch, capsys, "sample", f"--against={tmp_path}/peer.py")
    assert result["against"]["arguments"][:3] == ["sample", "--depth=1", "--batch=2"]
    assert "--dtype=float32" in result["against"]["arguments"] and result["against"]["tf32"] == "0"
    assert result["ratio"] == pytest.approx(result["without_decoder"]["images_per_s"] / 2, rel=1e-2)


def test_latency_is_of_one_image_beside_the_bound_of_reading_its_weights(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "chip", lambda device: Chip(1e12, 1e9, 1e9, 1e9))
    result = line(monkeypatch, capsys, "sample", "--latency")
    latency = result["latency"]
    assert result["batch"] == 1 and latency["ms"] == pytest.approx(
        1e3 * result["without_decoder"]["seconds"], abs=0.01
    )
    # One block of width 64 (12 D^2 weights and 13 D biases and temperatures) and the head of 16 codes, read
    # for each of three maps.
    num_weights = 12 * 64**2 + 2 * 64 + 64 + 4 * 64 + 64 + 1 + 64 * 16 + 16
    assert latency["read_gb"] == pytest.approx(3 * 4 * num_weights / 1e9, abs=6e-4)
    assert latency["bound_ms"] == pytest.approx(3 * 4 * num_weights / 1e6, abs=0.01)
    assert latency["share_of_bound"] == pytest.approx(latency["bound_ms"] / latency["ms"], rel=0.1)
    with pytest.raises(SystemExit, match="--latency: goes with sample, not with train"):
        line(monkeypatch, capsys, "train", "--latency")


def test_a_yardstick_that_fails_is_shown(monkeypatch, capsys, tmp_path):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(SystemExit, match=r"(?s)the yardstick failed.*no torch here"):
        line(monkeypatch, capsys, "train", f"--against={tmp_path}/peer.py")
