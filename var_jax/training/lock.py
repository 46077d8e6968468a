"""Lock file that keeps two runs from writing to one directory.

The file names the host and process of its holder, which touches it as a heartbeat. A lock of this machine
whose process is gone is taken over at once; one of another machine, once it has had no heartbeat for a while.
On object storage (gs://) the lock is best effort: two runs that start within the same second may both get it.
"""

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import jax
from absl import logging
from etils import epath

from var_jax.errors import UserError
from var_jax.paths import is_remote, storage_errors

LOCK_FILE = "run.lock"
HEARTBEAT_INTERVAL = 10.0  # seconds
STALE_AFTER = 60.0  # seconds without heartbeat after which the holder counts as gone
LOCK_TIMEOUT = 120.0  # seconds to wait for a running holder on another machine


class RunLocked(UserError):
    """Error for a directory that another process works on."""


class RunLock:
    """Context that holds the lock of a directory; does nothing on processes other than 0.

    Raises:
      RunLocked: on entering, if another process holds the lock.
    """

    def __init__(self, directory: epath.Path):
        self.path = directory / LOCK_FILE
        self._own = {"machine": _machine_id(), "host": socket.gethostname(), "nonce": secrets.token_hex(8)}
        self._own |= {"pid": os.getpid(), "started": _start_time(os.getpid()), "since": time.ctime()}
        self._released = threading.Event()
        self._is_lost = False
        self._active = jax.process_index() == 0

    def __enter__(self) -> "RunLock":
        if self._active:
            self._acquire()
            self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, daemon=True)
            self._heartbeat_thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._released.set()
        if self._active:
            self._heartbeat_thread.join(HEARTBEAT_INTERVAL)  # a heartbeat in progress would restore the file
            if self._is_own():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunLocked if another process has taken over the lock, e.g. while this one was suspended."""
        if self._is_lost:
            raise RunLocked(
                f"{self.path} was taken over by {_describe(self._read())}: this process sent no heartbeat "
                f"for over {STALE_AFTER:.0f} s. It stops, so that two runs do not write to one directory."
            )

    def _acquire(self) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT
        heartbeat = None
        last_heartbeat = time.monotonic()
        has_warned = False
        while True:
            holder = self._read()
            new_heartbeat = self._read_heartbeat()
            if heartbeat != new_heartbeat:
                heartbeat = new_heartbeat
                last_heartbeat = time.monotonic()
            silence = time.monotonic() - last_heartbeat
            if holder is None or silence > STALE_AFTER or not _may_be_alive(holder):
                if holder is not None:
                    logging.warning("%s of %s is stale; taking it over.", self.path, _describe(holder))
                if self._take(new=holder is None):
                    return
                continue
            has_timed_out = silence < 2 * HEARTBEAT_INTERVAL and time.monotonic() > deadline
            if holder.get("machine") == _machine_id() or has_timed_out:
                raise RunLocked(
                    f"{_describe(holder)} works on {self.path.parent}. Wait for it to end, stop it, or "
                    f"choose another --workdir. If there is no such process, remove {self.path}."
                )
            if not has_warned:
                has_warned = True
                logging.warning(
                    "%s holds %s; waiting up to %.0f s for it to end or to stop sending heartbeats.",
                    _describe(holder),
                    self.path,
                    LOCK_TIMEOUT,
                )
            time.sleep(1.0)

    def _take(self, new: bool) -> bool:
        """Write the lock; return whether this process then holds it."""
        content = json.dumps(self._own)
        if is_remote(self.path):
            self.path.write_text(content)
            time.sleep(1.0)  # of several processes, the last to write holds it
        elif new:
            try:
                with open(self.path, "x") as file:
                    file.write(content)
            except FileExistsError:
                return False
            except OSError as error:  # a full disk: an empty lock would block the next start
                self.path.unlink(missing_ok=True)
                raise RunLocked(f"{self.path} cannot be written: {error.strerror}") from error
        else:
            partial = self.path.with_name(f"{LOCK_FILE}.{self._own['nonce']}")
            partial.write_text(content)
            partial.replace(self.path)
            time.sleep(0.2)  # of several processes that take it over at once, the last holds it
        return self._is_own()

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_INTERVAL):
            try:
                if not self._is_own():
                    self._is_lost = True
                    return
                if is_remote(self.path):
                    self.path.write_text(json.dumps(self._own | {"beat": time.time()}))
                else:
                    os.utime(self.path)
            except storage_errors() as error:
                logging.warning("%s could not be touched: %s", self.path, error)

    def _is_own(self) -> bool:
        return (self._read() or {}).get("nonce") == self._own["nonce"]

    def _read(self) -> dict | None:
        """Read the holder from the lock; {} if the file is truncated, None without a lock."""
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _read_heartbeat(self) -> tuple | None:
        """Return a value that changes with every heartbeat; None without a lock."""
        try:
            return (self.path.read_text(), self.path.stat().mtime)
        except FileNotFoundError:
            return None


def _describe(holder: dict | None) -> str:
    holder = holder or {}
    host, pid, since = (holder.get(key, "unknown") for key in ("host", "pid", "since"))
    return f"process {pid} on {host} (since {since})"


def _may_be_alive(holder: dict) -> bool:
    """Return False for a process of this machine that is gone, else True."""
    if holder.get("machine") != _machine_id():
        return True
    return _start_time(holder["pid"]) == holder["started"]


def _machine_id() -> str:
    """Identify the host, its boot and its PID namespace, which distinguishes containers."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:  # not on Linux
            parts.append("")
    return " ".join(parts)


def _start_time(pid: int) -> str | None:
    """Return the start time of a process of this machine, since PIDs are reused; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
