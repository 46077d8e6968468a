import json
import sys

import pytest

from var_jax.benchmarks import throughput

YARDSTICK = """
import json, sys
print("some noise")
print(json.dumps({"images_per_s": 2.0, "arguments": sys.argv[1:]}))
"""


@pytest.fixture
def small(monkeypatch):
    """A tokenizer of 8x8 images in place of the published one."""
    tiny = dict(scales=(1, 2, 4), ch=8, ch_mult=(1, 1), num_blocks=1, norm_groups=4, num_codes=16, code_dim=4)
    config = throughput.TokenizerConfig
    monkeypatch.setattr(throughput, "TokenizerConfig", lambda scales: config(**tiny))
    make = throughput.var.get_config

    def tiny_var(name):
        stage = make(name)
        stage.scales = (1, 2, 4)
        return stage

    monkeypatch.setattr(throughput.var, "get_config", tiny_var)
    make_tokenizer = throughput.tokenizer_config.get_config

    def tiny_tokenizer():  # 16 pixels, the least that three layers of a discriminator take
        stage = make_tokenizer()
        stage.loss.perceptual = 0.0  # VGG takes long to compile
        stage.model.update({**tiny, "ch_mult": (1, 1, 1)})
        stage.adversarial.channels = 8
        return stage

    monkeypatch.setattr(throughput.tokenizer_config, "get_config", tiny_tokenizer)


def line(monkeypatch, capsys, *arguments) -> dict:
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments, "--depth=1", "--batch=2", "--repeats=1"])
    throughput.main()
    (printed,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(printed)


@pytest.mark.parametrize("what", ["sample", "train", "tokenizer", "encode", "decode"])
def test_one_json_line(small, monkeypatch, capsys, what):
    found = line(monkeypatch, capsys, what)
    assert found["what"] == what and found["dtype"] == "float32" and found["parameters"] > 1000
    assert found["images_per_s"] == pytest.approx(2 / found["seconds"], rel=0.02)
    assert found["compile_s"] > 0 and found["tflops"] >= 0 and "ratio" not in found


def test_training_from_images_stands_beside_training_from_tokens(small, monkeypatch, capsys):
    found = line(monkeypatch, capsys, "train", "--with_encoder")
    whole = found["with_encoder"]
    assert whole["ratio"] == pytest.approx(whole["seconds"] / found["seconds"], abs=1e-3)
    assert whole["images_per_s"] == pytest.approx(2 / whole["seconds"], rel=0.02)
    assert found["images_per_s"] == pytest.approx(2 / found["seconds"], rel=0.02)
    with pytest.raises(SystemExit, match="--with_encoder: goes with train, not with sample"):
        line(monkeypatch, capsys, "sample", "--with_encoder")


def test_the_ratio_leaves_out_what_the_yardstick_cannot_do(small, monkeypatch, capsys, tmp_path):
    (tmp_path / "peer.py").write_text(YARDSTICK)
    found = line(monkeypatch, capsys, "sample", f"--against={tmp_path}/peer.py")
    assert found["against"]["arguments"][:3] == ["sample", "--depth=1", "--batch=2"]
    assert "--dtype=float32" in found["against"]["arguments"]
    assert found["ratio"] == pytest.approx(found["without_decoder"]["images_per_s"] / 2, rel=1e-2)


def test_a_yardstick_that_fails_is_shown(small, monkeypatch, capsys, tmp_path):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    with pytest.raises(SystemExit, match=r"(?s)the yardstick failed.*no torch here"):
        line(monkeypatch, capsys, "train", f"--against={tmp_path}/peer.py")
