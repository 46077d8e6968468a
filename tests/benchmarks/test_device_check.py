"""Test the device check: the whole command at tiny size, and the handling of stages that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import device_check, device_numerics, device_runs
from benchmarks.device_parts import CommandFailed, Options, Part, relative_error, run_parts
from tests.helpers.commands import command
from var_jax.transformer.attention import IMPLEMENTATIONS

YARDSTICK = "import json; print(json.dumps({'images_per_s': 2.0, 'seconds': 1.0}))"


def options(tmp_path, seconds: float = 600) -> Options:
    return Options(
        out=tmp_path,
        tiny=False,
        platform="cpu",
        goldens=tmp_path,
        against=None,
        deadline=time.time() + seconds,
    )


def test_every_stage_runs_here_and_all_checks_hold(goldens, tmp_path):
    (tmp_path / "peer.py").write_text(YARDSTICK)
    flags = (
        f"--out={tmp_path}/out",
        f"--goldens={goldens}",
        f"--against={tmp_path}/peer.py",
        "--minutes=9.5",
    )
    process = command("-m", "benchmarks.device_check", *flags)
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
    records = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert [record["stage"] for record in records] == list(device_check.STAGE_PARTS)
    assert {record["status"] for record in records} == {"ok"}
    parts = {(r["stage"], part["part"]): part for r in records for part in r["parts"]}
    assert parts["versions", "device"]["platform"] == "cpu"
    assert len(parts["goldens", "var, float32"]["checks"]) == 5
    killed = parts["train", "killed and resumed"]
    assert 10 <= killed["killed_at_step"] < 40 and killed["next_scale_parameter_difference"] == 0
    assert {"grouped, bfloat16", "remat full, float32"} <= {
        name for stage, name in parts if stage == "attention"
    }
    train, torch = (parts["throughput", name] for name in ("train d1", "train d1, PyTorch eager"))
    assert torch["ours_over_it"] == pytest.approx(train["images_per_s"] / 2, rel=1e-2)
    step = parts["kernels", "training step"]
    assert 0 < sum(kernel["ms"] for kernel in step["kernels"]) <= step["busy_ms"] * 1.001
    assert any("mlp/fc1" in kernel["op_name"] for kernel in step["kernels"])
    assert json.loads((tmp_path / "out" / "device_check.json").read_text()) == records
    table = (tmp_path / "out" / "device_check.md").read_text()
    assert table.strip() in process.stdout and "| killed and resumed |" in table and "| `" in table


def test_a_stage_that_fails_is_shown_and_sets_the_exit_code(tmp_path):
    for name in ("vae.npz", "vae.pth"):
        (tmp_path / name).write_text("damaged")
    flags = (f"--out={tmp_path}/out", f"--goldens={tmp_path}", "--stages=goldens")
    process = command("-m", "benchmarks.device_check", *flags)
    assert process.returncode == 1 and "device_check: failed: goldens; see" in process.stderr
    versions, broken = (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{"))
    assert (versions["status"], broken["status"]) == ("ok", "failed")
    assert all("Traceback" in part["error"] for part in broken["parts"]) and len(broken["parts"]) == 3
    assert "tokenizer, float32:\nTraceback" in (tmp_path / "out" / "device_check.md").read_text()


def check(monkeypatch, tmp_path, endings: dict, *flags) -> tuple[object, dict]:
    """Run main with fake stage processes: each records one part and ends as `endings` describes."""

    def fake_process(arguments, environment, log, limit):
        stage = next(a for a in arguments if a.startswith("--stage=")).removeprefix("--stage=")
        part = {
            "part": "one",
            "is_check": True,
            "platform": "gpu",
            "checks": {"it holds": True},
            "took_s": 1.0,
        }
        log.write_text("what the process said")
        ending = endings.get(stage)
        (tmp_path / f"{stage}.jsonl").write_text(
            json.dumps({**part, **(ending or {}).get("part", {})}) + "\n"
        )
        return (ending or {}).get("how")

    monkeypatch.setattr(device_check, "run_process", fake_process)
    (tmp_path / "vae.pth").touch()
    arguments = [f"--out={tmp_path}", f"--goldens={tmp_path}", *flags]
    monkeypatch.setattr(sys, "argv", ["device_check", *arguments])
    failure = None
    try:
        device_check.main()
    except SystemExit as error:
        failure = error.code
    records = json.loads((tmp_path / "device_check.json").read_text())
    return failure, {record["stage"]: record for record in records}


def test_stages_after_one_that_crashes_still_run(monkeypatch, tmp_path, capsys):
    endings = {
        "goldens": {"how": "ended by SIGSEGV"},
        "attention": {"part": {"checks": {"forward is within tolerance": False}}},
    }
    failure, records = check(monkeypatch, tmp_path, endings)
    assert failure.startswith("device_check: failed: goldens, attention; see")
    status = {stage: record["status"] for stage, record in records.items()}
    assert status == dict.fromkeys(device_check.STAGE_PARTS, "ok") | {
        "goldens": "failed",
        "attention": "failed",
    }
    assert "SIGSEGV" in records["goldens"]["error"] and "what the process said" in records["goldens"]["error"]
    assert len(records["goldens"]["parts"]) == 1  # the part recorded before the crash
    printed = capsys.readouterr().out
    assert "one: does not hold: forward is within tolerance" in printed and "| FAILED |" in printed


def test_lack_of_time_fails_checks_and_cuts_measurements(monkeypatch, tmp_path):
    stopped = {"how": "stopped after 3 s, its share of --minutes"}
    left_out = {"not_run": "no time left", "is_check": False, "checks": {}}
    endings = {"throughput": stopped, "kernels": {"part": left_out}}
    failure, records = check(monkeypatch, tmp_path, endings)
    assert failure is None and records["throughput"]["status"] == "cut"
    assert "one: not run, no time left" in (tmp_path / "device_check.md").read_text()
    assert check(monkeypatch, tmp_path, {"train": stopped})[0].startswith("device_check: failed: train;")
    endings = {"attention": {"part": left_out | {"is_check": True}}}
    assert check(monkeypatch, tmp_path, endings)[0].startswith("device_check: failed: attention;")


def test_missing_goldens_are_skipped_with_a_notice(monkeypatch, tmp_path):
    failure, records = check(monkeypatch, tmp_path, {}, f"--goldens={tmp_path}/nowhere", "--stages=goldens")
    assert failure is None and records["goldens"]["status"] == "skipped"
    report = (tmp_path / "device_check.md").read_text()
    assert f"no vae.pth among the golden tensors at {tmp_path}/nowhere (set" in report


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--stages=versions,speed", "--stages=speed: must be some of versions,goldens,train"),
        ("--minutes=0", "--minutes=0.0: must be more than 0"),
        ("--against=nowhere.py", "/nowhere.py: there is no such file"),
        ("--out=gs://bucket/check", "--out=gs://bucket/check: must be a local path"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, capsys, tmp_path, flag, message):
    monkeypatch.setattr(sys, "argv", ["device_check", f"--out={tmp_path}", flag])
    with pytest.raises(SystemExit) as error:
        device_check.main()
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("print('fine')", None),
        ("raise SystemExit(3)", "ended with code 3"),
        (f"import os; os.kill(os.getpid(), {signal.SIGSEGV.value})", "ended by SIGSEGV"),
    ],
)
def test_how_a_process_ended(tmp_path, program, how):
    result = device_check.run_process([sys.executable, "-c", program], dict(os.environ), tmp_path / "log", 60)
    assert result == how and (tmp_path / "log").exists()


def test_a_process_that_hangs_is_stopped_with_those_that_it_started(tmp_path):
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); "
    program += f"open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    start = time.monotonic()
    how = device_check.run_process([sys.executable, "-c", program], dict(os.environ), tmp_path / "log", 3)
    assert how == "stopped after 3 s, its share of --minutes" and time.monotonic() - start < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(500):  # until it is reaped, or a zombie
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        pytest.fail(f"process {child} still runs")


def test_parts_run_after_one_that_raises_and_long_ones_are_left_out(tmp_path):
    def late():
        raise subprocess.TimeoutExpired("sleep", 1)

    parts = [
        Part(name="broken", run=lambda: 1 / 0, seconds=0),
        Part(name="sound", run=lambda: {"ms": 1.0, "checks": {"it holds": True}}, seconds=0),
        Part(name="late", run=late, seconds=0),
        Part(name="long", run=lambda: {}, seconds=1e6, is_check=False),
    ]
    records = []
    run_parts(parts, options(tmp_path), records.append)
    broken, sound, stopped, long = records
    assert "ZeroDivisionError" in broken["error"] and device_check.part_failed(broken)
    assert sound["ms"] == 1.0 and not device_check.part_failed(sound)
    assert stopped["not_run"].startswith("stopped") and device_check.part_failed(stopped)
    assert long["not_run"] == "no time left" and not device_check.part_failed(long)


def test_the_batch_is_halved_while_the_memory_is_too_small(monkeypatch, tmp_path):
    batches = []

    def run(options, arguments):
        batches.append(int(arguments[-1].removeprefix("--batch=")))
        if batches[-1] > 16:
            raise CommandFailed(arguments, 1, "RESOURCE_EXHAUSTED: out of memory" + 5000 * " allocation")
        return json.dumps({"seconds": 0.5, "images_per_s": 32, "tflops": 1, "peak_gib": 9, "compile_s": 3})

    monkeypatch.setattr(device_runs, "run_command", run)
    rates = {}
    values = device_runs.measure_throughput(options(tmp_path), "train", 16, rates)
    assert batches == [64, 32, 16] and values["batch"] == 16 and values["ms"] == 500
    assert rates == {("train", 16): (16, 32)}
    monkeypatch.setattr(device_runs, "MIN_BATCH", 32)
    with pytest.raises(CommandFailed, match="ended with code 1"):
        device_runs.measure_throughput(options(tmp_path), "train", 16, rates)


def test_errors_are_relative_to_the_largest_magnitude_and_nan_holds_no_check():
    assert relative_error([1.0, -4.0], [1.0, -3.0]) == pytest.approx(1 / 3)
    assert not relative_error([np.nan, 1.0], [1.0, 1.0]) <= 1e9
    with pytest.raises(ValueError, match=r"shape \(2,\) for a reference of \(3,\)"):
        relative_error(np.zeros(2), np.ones(3))


def test_every_attention_is_checked_somewhere():
    assert set(device_numerics.RUNS_ON) == set(IMPLEMENTATIONS)


def test_a_wrong_kernel_and_a_wrong_policy_are_noticed(monkeypatch):
    attend = device_numerics.attend
    wrong = lambda *args, name, **how: attend(*args, name=name, **how) * (1.001 if name == "grouped" else 1)
    monkeypatch.setattr(device_numerics, "attend", wrong)
    checks = device_numerics.check_attention("grouped", "float32", tiny=True)["checks"]
    assert checks == {"forward is within tolerance": False, "backward is within tolerance": False}
