"""Several hosts, as processes on loopback with two devices each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from var_jax import command_line
from var_jax.training.checkpoint import load_params

STEPS = 40
TIMEOUT = "--host_timeout=10"
CLOSE = 1e-5  # sums over devices in another order


@pytest.fixture(scope="module")
def start(digits_dir, tmp_path_factory):
    """Starts the processes of a run of the toy; compiled programs are shared."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(processes: int, workdir, *extra) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = (f"--workdir={workdir}", f"--data_dir={digits_dir}", f"--steps={STEPS}", *extra)
        hosts = (
            (f"--coordinator=localhost:{port}", f"--num_processes={processes}", TIMEOUT)
            if processes > 1
            else ()
        )
        return [
            subprocess.Popen(
                [sys.executable, "-m", "tests.training.toy_run", *flags, *hosts]
                + ([f"--process_id={i}"] if hosts else []),
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]

    return run


def ended(processes, within: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    deadline, found = time.monotonic() + within, []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        found.append((process.returncode, out, err))
    return found


def losses(workdir) -> dict[int, float]:
    path = workdir / "toy" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def wait_for_step(processes, workdir, step) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), ended(processes, 5)
        if step in losses(workdir):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


def test_preempted_on_two_hosts_killed_on_four_done_on_one_equals_unbroken(start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    alone = start(1, whole)
    # SIGTERM to one of two: both save the same step.
    hosts = start(2, broken, "--pause=0.1")
    wait_for_step(hosts, broken, 7)
    hosts[1].send_signal(signal.SIGTERM)
    found = ended(hosts, within=60)
    pattern = r"toy: stopped at step (\d+), saved; run the same command again"
    words = [re.search(pattern, err) for _, _, err in found]
    assert [code for code, _, _ in found] == [1, 1] and all(words), found
    assert words[0][1] == words[1][1]
    assert found[0][1].count(" train ") >= 7 and "toy" not in found[1][1]  # process 0 alone speaks
    stopped = int(words[0][1])
    # SIGKILL to one of four: the others leave, none with 0.
    hosts = start(4, broken, "--pause=0.1")
    wait_for_step(hosts, broken, stopped + 8)
    killed = time.monotonic()
    hosts[2].send_signal(signal.SIGKILL)
    found = ended(hosts, within=60)
    print(f"{time.monotonic() - killed:.0f} s after the kill all had left: {[code for code, _, _ in found]}")
    assert all(code != 0 for code, _, _ in found)
    assert f"steps {stopped}..{STEPS}, 8 x" in found[0][1]
    # One goes on with two devices, from the last checkpoint that the four wrote.
    ((code, out, err),) = ended(start(1, broken), within=100)
    assert code == 0, err[-2000:]
    went_on = int(re.search(r"steps (\d+)\.\.", out)[1])
    assert went_on % 5 == 0 and stopped < went_on
    assert ended(alone, within=100)[0][0] == 0
    got, want = losses(broken), losses(whole)
    assert sorted(got) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([got[i] for i in sorted(got)], [want[i] for i in sorted(want)], rtol=CLOSE)
    got, want = (load_params(folder / "toy" / "checkpoints")[0] for folder in (broken, whole))
    np.testing.assert_allclose(got["w"], want["w"], rtol=CLOSE)


def test_a_failure_on_one_host_ends_all(start, tmp_path):
    hosts = start(2, tmp_path, "--pause=0.1", "--fails_at=3")
    began = time.monotonic()
    found = ended(hosts, within=60)
    print(f"all had left after {time.monotonic() - began:.0f} s")
    assert all(code != 0 for code, _, _ in found)
    assert "the cosmic ray" in found[1][2]


def test_hosts_that_do_not_find_each_other_say_what_to_check(monkeypatch):
    given = types.SimpleNamespace(coordinator="far:1", num_processes=2, process_id=1, host_timeout=9)
    monkeypatch.setattr(command_line, "FLAGS", given)

    def initialize(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(command_line.jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match="DEADLINE_EXCEEDED\n  Check that(.|\n)*address far:1 is reachable"):
        command_line.join_hosts()


@pytest.mark.parametrize("inside", [True, False])
def test_a_cluster_that_jax_knows_is_joined_without_flags(monkeypatch, inside):
    slurm = dict.fromkeys(["JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"], "1")
    for name, value in slurm.items() if inside else ():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert command_line.in_cluster() == inside
