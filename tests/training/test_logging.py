import json

import jax.numpy as jnp
import pytest

from var_jax.training.chips import peak_flops
from var_jax.training.logging import Log, draw_curves, duration, read_metrics


class FakeDevice:
    def __init__(self, kind):
        self.device_kind = kind


def test_known_and_unknown_chips():
    assert peak_flops(FakeDevice("TPU v5 lite")) == 197e12
    assert peak_flops(FakeDevice("TPU v5p")) == 459e12
    assert peak_flops(FakeDevice("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(FakeDevice("cpu")) is None


def test_durations():
    assert [duration(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]


def test_lines_curves_and_going_on(tmp_path, capsys):
    log = Log(tmp_path, "tokenizer", 0, 100, 8, 1e6)
    for step in (10, 20):
        log.training(step, {"loss": jnp.array(2.0 / step), "loss_3": jnp.array(1.0)})
        log.flush()
    log.evaluation(20, {"loss": 0.3, "perplexity": 5.0})
    log.close()
    out = capsys.readouterr().out
    assert "tokenizer train  10/100  loss 0.2" in out and "images/s" in out and "left" in out
    assert "loss_3" not in out  # single scales are in the files only
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 20] and lines[0]["loss_3"] == 1.0
    draw_curves(tmp_path, tmp_path / "curves.png", "tokenizer")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    Log(tmp_path, "tokenizer", 10, 100, 8, 1e6).close()  # goes on from step 10
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def test_a_last_line_cut_short_is_left_out_and_a_broken_file_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('oops\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 1 is not JSON: 'oops'"):
        read_metrics(path)
