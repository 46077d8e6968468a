"""Lock of a run, against real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import REPOSITORY
from var_jax.paths import as_path
from var_jax.training import lock
from var_jax.training.lock import RunLock, RunLocked

HOLDER = """
import sys, time
from var_jax.paths import as_path
from var_jax.training.lock import RunLock
with RunLock(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process of this machine that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def from_another_machine(path, beat: float) -> None:
    """Change a lock to one of another machine, with the last heartbeat `beat` seconds ago."""
    content = json.loads(path.read_text()) | {"machine": "elsewhere", "host": "elsewhere"}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - beat,) * 2)


def test_a_second_start_is_refused_and_a_killed_one_is_taken_over_at_once(holder, tmp_path, caplog):
    with pytest.raises(
        RunLocked, match=f"process {holder.pid} on .* works on {tmp_path}. Wait for it to end"
    ):
        RunLock(as_path(tmp_path)).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.LOCK_FILE).exists()
    began = time.monotonic()
    with RunLock(as_path(tmp_path)) as own:
        own.check()
        assert time.monotonic() - began < 5
        assert f"process {holder.pid}" in caplog.text and "is stale; taking it over" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_number_of_a_process_that_another_has_by_now_is_not_taken_for_it(holder, tmp_path):
    """Reuse a PID, as containers do."""
    path = tmp_path / lock.LOCK_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    with RunLock(as_path(tmp_path)) as own:
        own.check()  # the lock is ours now


def test_a_silent_holder_on_another_machine_is_taken_over_after_a_while(
    holder, tmp_path, monkeypatch, caplog
):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    from_another_machine(tmp_path / lock.LOCK_FILE, beat=5)
    monkeypatch.setattr(lock, "STALE_AFTER", 3.0)
    began = time.monotonic()
    with RunLock(as_path(tmp_path)):
        assert 3 <= time.monotonic() - began < 30
    assert "waiting up to" in caplog.text and "is stale; taking it over" in caplog.text


def test_a_holder_on_another_machine_that_lives_is_waited_for_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_INTERVAL", 0.5)
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 3.0)
    with RunLock(as_path(tmp_path)) as held:  # touches the file all along
        held._own["machine"] = "elsewhere"
        held.path.write_text(json.dumps(held._own))
        with pytest.raises(RunLocked, match="Wait for it to end, stop it, or choose another --workdir"):
            RunLock(as_path(tmp_path)).__enter__()
        held.check()


def test_a_run_whose_lock_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_INTERVAL", 0.2)
    with RunLock(as_path(tmp_path)) as own:
        held = json.loads((tmp_path / lock.LOCK_FILE).read_text())
        (tmp_path / lock.LOCK_FILE).write_text(json.dumps(held | {"nonce": "other", "host": "elsewhere"}))
        deadline = time.monotonic() + 20
        with pytest.raises(RunLocked, match="was taken over by process .* on elsewhere"):
            while time.monotonic() < deadline:
                own.check()
                time.sleep(0.1)
    assert (tmp_path / lock.LOCK_FILE).exists()  # it is the other's
