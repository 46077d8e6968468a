"""Test the scaling benchmark: its arithmetic, and the command on fake devices and on two processes."""

import json
import socket

import pytest
from PIL import Image

from benchmarks.scaling import Point, default_counts, plan_points
from benchmarks.scaling_report import add_efficiency, add_rates, format_table, merge_runs, plot_scaling
from tests.helpers.commands import Command, command
from tests.helpers.xla_flags import fake_devices

CONFIG = """
from tests.helpers.tiny import tiny_config
def get_config():
    config = tiny_config("nowhere")
    config.next_scale.model.update(dict(depth=1, width=16, num_heads=1))
    return config
"""


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path}/config.py"


def rows(mode: str, times: dict) -> list[dict]:
    """Make rows of 8 images per device (weak) or 64 in all (strong), from seconds by number of devices."""
    batch = lambda n: 8 * n if mode == "weak" else 64
    return [{"mode": mode, "devices": n, "batch": batch(n), "seconds": s} for n, s in times.items()]


def run(rows: list[dict], **fields) -> dict:
    same = {"config": "c", "device": "TPU v5e", "dtype": "bfloat16", "parameters": 7, "note": ""}
    return {**same, **fields, "rows": add_efficiency(add_rates(rows, 2e12, 200e12))}


def test_rates_and_efficiencies_of_given_times():
    weak = run(rows("weak", {1: 0.5, 2: 0.5, 4: 0.625}))["rows"]
    assert [row["images_per_s"] for row in weak] == pytest.approx([16, 32, 51.2])
    assert [row["efficiency"] for row in weak] == pytest.approx([1, 1, 0.8])
    assert [row["mfu"] for row in weak] == pytest.approx([0.16, 0.16, 0.128])
    strong = run(rows("strong", {1: 4.0, 2: 2.0, 4: 1.6}))["rows"]
    assert [row["efficiency"] for row in strong] == pytest.approx([1, 1, 0.625])
    assert strong[2]["tflops_per_device"] == pytest.approx(40 * 2 / 4)
    assert add_rates(rows("weak", {1: 1.0}), 2e12, None)[0]["mfu"] is None


def test_efficiency_is_relative_to_the_fewest_devices_that_fit():
    result = run(rows("strong", {1: None, 2: 2.0, 4: 2.0}))
    assert [row["efficiency"] for row in result["rows"]] == [None, 1, 0.5]
    assert "out of memory" in format_table(result).splitlines()[1]


def test_the_points_to_measure():
    assert default_counts(8, 1) == [1, 2, 4, 8] and default_counts(12, 2) == [2, 4, 8, 12]
    assert plan_points([4, 1], ["weak", "strong"], 64, None) == [
        Point("weak", 1, 16),
        Point("weak", 4, 64),
        Point("strong", 1, 64),
        Point("strong", 4, 64),
    ]
    assert plan_points([2], ["weak"], 64, 5) == [Point("weak", 2, 10)]


def test_runs_are_merged_or_refused(tmp_path):
    one, four = run(rows("weak", {1: 0.5})), run(rows("weak", {4: 0.625}) + rows("strong", {4: 1.0}))
    assert four["rows"][0]["efficiency"] == 1  # alone
    merged = merge_runs([four, one])
    assert [(r["mode"], r["devices"]) for r in merged["rows"]] == [("weak", 1), ("weak", 4), ("strong", 4)]
    assert merged["rows"][1]["efficiency"] == pytest.approx(0.8)
    plot_scaling(merged, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (990, 462)
    with pytest.raises(ValueError, match="differ in device: H100, TPU v5e"):
        merge_runs([one, run(rows("weak", {4: 1.0}), device="H100")])
    with pytest.raises(ValueError, match="two runs have weak scaling on the same number of devices"):
        merge_runs([one, one])
    other = [row | {"batch": 4} for row in rows("weak", {2: 1.0})]
    with pytest.raises(ValueError, match=r"same images per device \(give .*\), got \[2.0, 8.0"):
        merge_runs([one, run(other)])


def test_one_process_over_one_and_two_devices(config, tmp_path):
    flags = (config, "--devices=1,2", "--modes=weak", "--steps=3", f"--out={tmp_path}/out")
    flags = ("-m", "benchmarks.scaling", *flags)
    process = command(*flags, xla_flags=fake_devices(2))
    assert process.returncode == 0, process.stderr[-2000:]
    *printed, line = process.stdout.splitlines()
    result = json.loads(line)
    assert [(row["devices"], row["batch"]) for row in result["rows"]] == [(1, 8), (2, 16)]
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["seconds"]) and row["mfu"] is None
    assert "efficiencies mean nothing" in printed[-1] and "efficiencies mean nothing" in result["note"]
    assert json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000


def test_two_processes_share_every_mesh(config, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (config, "--devices=2", "--modes=strong", "--steps=2", "--num_processes=2")
    flags = ("-m", "benchmarks.scaling", *flags, f"--coordinator=localhost:{port}")
    hosts = [
        Command(*flags, f"--process_id={i}", f"--out={tmp_path}/{i}", xla_flags=fake_devices(2))
        for i in (0, 1)
    ]
    outputs = [host.communicate(timeout=600) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    (row,) = json.loads(outputs[0][0].splitlines()[-1])["rows"]
    assert (row["devices"], row["batch"], row["processes"]) == (2, 16, 2) and row["seconds"] > 0
    assert "{" not in outputs[1][0] and not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--devices=9",), "--devices=9: must be at most the 1 available devices"),
        (("--merge=nowhere",), "give either --config to measure, or --merge"),
    ],
)
def test_wrong_flags_are_named(config, tmp_path, flags, message):
    process = command("-m", "benchmarks.scaling", config, *flags, f"--out={tmp_path}/out")
    assert process.returncode != 0 and message in process.stderr + process.stdout
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
