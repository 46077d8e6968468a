import io
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import input_rate, throughput


def line(monkeypatch, capsys, *arguments) -> dict:
    monkeypatch.setattr(sys, "argv", ["throughput", "input", "--batch=2", "--threads=2", *arguments])
    throughput.main()
    (printed,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(printed)


def test_one_line_has_rates_of_the_host_and_needs_of_machines(monkeypatch, capsys):
    monkeypatch.setattr(input_rate, "encoder_flops", lambda tokenizer: 2e11)
    result = line(monkeypatch, capsys, "--images=6", "--repeats=2")
    assert result["data"] == "photographs/train" and result["size"] == 256 and result["cores"] >= 1
    assert result["images_per_s"] == pytest.approx(result["images_per_s_per_core"] * result["cores"], abs=1)
    assert 5 < result["images_per_s_per_core"] < 5000
    stages = result["ms_per_image"]
    assert list(stages) == ["read", "decode", "resize", "crop"]
    assert min(stages["decode"], stages["resize"]) > 0.1 and sum(stages.values()) < 200
    assert result["images_per_s_at_best"] == pytest.approx(1e3 / sum(stages.values()), abs=0.1)
    flops = result["gflops_per_image"]
    assert flops["encoder"] == 200 and 900 < flops["transformer"] < 1000  # d16 on 680 tokens
    needed = result["needed"]["8 x TPU v5e"]
    assert needed["images_per_s"] == pytest.approx(8 * 197e3 * 0.45 / sum(flops.values()), abs=1)
    for cores, rate in (("cores", "images_per_s_per_core"), ("cores_at_best", "images_per_s_at_best")):
        assert needed[cores] == pytest.approx(needed["images_per_s"] / result[rate], rel=0.02, abs=0.1)
    assert result["needed"]["8 x H200"]["images_per_s"] == pytest.approx(
        needed["images_per_s"] * 989 / 197, 2e-3
    )


def test_a_prepared_data_set_is_measured(monkeypatch, capsys, digits_dir):
    monkeypatch.setattr(input_rate, "encoder_flops", lambda tokenizer: 2e11)
    result = line(monkeypatch, capsys, "--data=digits", f"--data_dir={digits_dir}", "--split=test")
    assert result["data"] == "digits/test" and result["kb_per_image"] < 1
    with pytest.raises(SystemExit, match="throughput: data set 'flowers' is not prepared"):
        line(monkeypatch, capsys, "--data=flowers", f"--data_dir={digits_dir}")
    with pytest.raises(SystemExit, match="has 355 images, fewer than one batch of 400"):
        line(monkeypatch, capsys, "--data=digits", f"--data_dir={digits_dir}", "--split=test", "--batch=400")


def test_a_token_cache_is_read_while_steps_run(monkeypatch, capsys):
    monkeypatch.setattr(input_rate, "CACHED_IMAGES", 40)
    result = line(monkeypatch, capsys, "--tokens", "--step_ms=5", "--batch=8")
    assert (result["data"], result["batch"], result["images_per_s_wanted"]) == ("tokens", 8, 1600)
    assert 0 < result["wait_ms"] <= result["longest_wait_ms"]


def test_the_encoder_counts_as_many_operations_as_its_kernels_make(tiny_tokenizer):
    tokenizer, params = tiny_tokenizer
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]) if leaf.ndim > 1)
    flops = input_rate.encoder_flops(tokenizer)
    assert 2 * 4 * 4 * weights < flops < 2 * 8 * 8 * weights  # between all of them on 4x4 and on 8x8 pixels


def test_generated_photographs_are_as_large_as_those_of_imagenet():
    data = input_rate.make_photograph(np.random.default_rng(0))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375)) and 90e3 < len(data) < 140e3
    gray = np.asarray(image.convert("L")).astype(float)
    power = np.abs(np.fft.fft2(gray - gray.mean())) ** 2
    low, high = power[1:9, 1:9].mean(), power[17:65, 17:65].mean()
    assert 20 < low / high < 400  # about 1 / frequency squared
