import json
import math
import shutil
import signal

import jax.numpy as jnp
import pytest

from tests.helpers.commands import command
from var_jax.training.hardware import peak_flops
from var_jax.training.metrics import Log, duration, plot_curves, read_metrics


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
    log = Log(tmp_path, "tokenizer", 0, 100, 8, 1e6).open()
    for step in (10, 20):
        log.training(step, {"loss": jnp.array(2.0 / step), "loss_3": jnp.array(1.0)})
        log.flush()
    log.evaluation(20, "eval", {"loss": 0.3, "perplexity": 5.0})
    log.close()
    out = capsys.readouterr().out
    assert "tokenizer train  10/100  loss 0.2" in out and "images/s" in out and "left" in out
    assert "loss_3" not in out  # single scales are in the files only
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 20] and lines[0]["loss_3"] == 1.0
    plot_curves(tmp_path, tmp_path / "curves.png", "tokenizer")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    Log(tmp_path, "tokenizer", 10, 100, 8, 1e6).open().close()  # goes on from step 10
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def test_a_last_line_cut_short_is_left_out_and_a_broken_file_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('oops\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 1 is not JSON: 'oops'"):
        read_metrics(path)


# A mount of an object store that stages writes: others see a file once it was closed or synced.
STAGED = """
import builtins, io, os, shutil, signal, sys, tempfile, time

root, plain_open, plain_sync, staged = sys.argv[1], builtins.open, os.fsync, {}

def publish(path, copy, file):
    file.flush()
    with plain_open(copy, "rb") as source, plain_open(path, "wb") as target:
        target.write(source.read())

def staging_open(path, mode="r", *args, **kwargs):
    if isinstance(path, int) or not os.fspath(path).startswith(root) or mode[0] == "r":
        return plain_open(path, mode, *args, **kwargs)
    copy = tempfile.mktemp()
    if mode[0] == "a" and os.path.exists(path):
        shutil.copyfile(path, copy)  # opens for reading, and outside the root
    file = plain_open(copy, mode, *args, **kwargs)
    close = file.close
    file.close = lambda: file.closed or (publish(path, copy, file), close())
    staged[file.fileno()] = (path, copy, file)
    return file

builtins.open = io.open = staging_open
os.fsync = lambda number: publish(*staged[number]) if number in staged else plain_sync(number)

from var_jax.training.metrics import Log
log = Log(__import__("pathlib").Path(root) / "run", "toy", 0, 100, 8, 1e6).open()
for step in (1, 2, 3):
    log.write(step, "train", {"loss": 1.0 / step}, "")
    time.sleep(0.5)
log.event(4, "skipped", {"loss": float("nan")}, "", [17, 5])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_logs_on_a_staged_mount_survive_a_hard_kill(tmp_path):
    done = command("-c", STAGED, str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") >= 3


def test_a_full_disk_neither_ends_nor_blocks_the_log_and_loses_no_line(small_disk, caplog):
    log = Log(small_disk, "toy", 0, 100, 8, 1e6).open()
    log.write(1, "train", {"loss": 1.0}, "")
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for step in range(2, 200):
        log.write(step, "train", {"loss": 1.0, "accuracy": 0.5}, "")
    assert caplog.text.count("cannot be written: [Errno 28] No space left") == 1
    assert len(read_metrics(small_disk / "metrics.jsonl")) < 100  # every line there is whole
    (small_disk / "filler").unlink()
    log.close()
    assert [line["step"] for line in read_metrics(small_disk / "metrics.jsonl")] == list(range(1, 200))
    (events,) = (small_disk / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 199


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path):
    log = Log(tmp_path, "toy", 0, 100, 8, 1e6).open()
    log.write(1, "train", {"loss": math.nan, "norm": math.inf}, "")
    log.close()
    path = tmp_path / "metrics.jsonl"
    strict = lambda name: pytest.fail(f"{name} is not JSON")
    line = json.loads(path.read_text(), parse_constant=strict)
    assert line == {"step": 1, "kind": "train", "loss": None, "norm": None}
    path.write_text(path.read_text() + '{"step": 2, "kind": "train", "loss": NaN}\n')  # of an older run
    assert all(math.isnan(line["loss"]) for line in read_metrics(path))
    plot_curves(tmp_path, tmp_path / "curves.png", "toy")
    Log(tmp_path, "toy", 2, 100, 8, 1e6).open().close()
    assert "NaN" not in path.read_text() and len(read_metrics(path)) == 2


def test_nothing_that_draws_changes_the_backend_of_a_notebook():
    names = (
        "codebook",
        "complexity",
        "inpainting",
        "locality",
        "next_token",
        "scaling_law",
        "self_correction",
    )
    reports = ("benchmarks.scaling_report", *(f"experiments.{name}.report" for name in names))
    imports = "".join(f"import {report}\n" for report in reports)
    checks = "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    done = command("-c", f"import sys, matplotlib\nmatplotlib.use('svg')\n{imports}{checks}")
    assert done.returncode == 0, done.stderr[-2000:]
