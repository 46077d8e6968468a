"""A lock file that keeps two runs out of one folder.

The holder is known by host and process, and shows that it lives by touching the file.  On one machine a lock
whose process is gone is taken over at once; that of another machine once it has not been touched for a while.
On object storage (gs://) it is best effort: two runs that start within the same second may both get it.
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

FILE = "run.lock"
BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which the holder counts as gone
PATIENCE = 120.0  # seconds to wait for a holder on another machine that still lives


class RunLocked(UserError):
    """Another process works on the same folder."""


class RunLock:
    """Context that holds the lock of a folder; does nothing on processes other than 0.

    Raises:
      RunLocked: on entering, while another process holds it.
    """

    def __init__(self, directory: epath.Path):
        self.path = directory / FILE
        self._own = {"machine": _machine(), "host": socket.gethostname(), "nonce": secrets.token_hex(8)}
        self._own |= {"pid": os.getpid(), "started": _start_time(os.getpid()), "since": time.ctime()}
        self._done, self._lost = threading.Event(), False
        self._active = jax.process_index() == 0

    def __enter__(self) -> "RunLock":
        if self._active:
            self._acquire()
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._active:
            self._beating.join(BEAT)  # a sign of life that is still being written would bring the lock back
            if self._is_own():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunLocked if another process has taken the lock over, e.g. while this one was suspended."""
        if self._lost:
            raise RunLocked(
                f"{self.path} was taken over by {_name(self._read())}: this process gave no sign of life for "
                f"over {STALE:.0f} s. It stops here, so that two runs do not write to one folder."
            )

    def _acquire(self) -> None:
        deadline, beat, last_beat, waiting = time.monotonic() + PATIENCE, None, time.monotonic(), False
        while True:
            holder, new_beat = self._read(), self._last_beat()
            if beat != new_beat:
                beat, last_beat = new_beat, time.monotonic()
            silent = time.monotonic() - last_beat
            if holder is None or silent > STALE or not _is_alive(holder):
                if holder is not None:
                    logging.warning("%s of %s is stale; taking it over.", self.path, _name(holder))
                if self._take(new=holder is None):
                    return
                continue
            if holder.get("machine") == _machine() or (silent < 2 * BEAT and time.monotonic() > deadline):
                raise RunLocked(
                    f"{_name(holder)} works on {self.path.parent}. Wait for it to end, stop it, or choose "
                    f"another --workdir. If there is no such process, remove {self.path}."
                )
            if not waiting:
                waiting = True
                logging.warning(
                    "%s holds %s; waiting up to %.0f s for it to end or to fall silent.",
                    _name(holder),
                    self.path,
                    PATIENCE,
                )
            time.sleep(1.0)

    def _take(self, new: bool) -> bool:
        """Write the lock; return whether it is this process that has it."""
        content = json.dumps(self._own)
        if is_remote(self.path):
            self.path.write_text(content)
            time.sleep(1.0)  # the last one to write has it
        elif new:
            try:
                with open(self.path, "x") as file:
                    file.write(content)
            except FileExistsError:
                return False
            except OSError as error:  # a full disk: an empty lock would hold the next start up
                self.path.unlink(missing_ok=True)
                raise RunLocked(f"{self.path} cannot be written: {error.strerror}") from error
        else:
            partial = self.path.with_name(f"{FILE}.{self._own['nonce']}")
            partial.write_text(content)
            partial.replace(self.path)
            time.sleep(0.2)  # of several that take it over at once, the last one has it
        return self._is_own()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            try:
                if not self._is_own():
                    self._lost = True
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
        """What the lock says of its holder; {} where it is cut short; None without a lock."""
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _last_beat(self) -> tuple | None:
        try:
            return (self.path.read_text(), self.path.stat().mtime)
        except FileNotFoundError:
            return None


def _name(holder: dict | None) -> str:
    holder = holder or {}
    host, pid, since = (holder.get(key, "unknown") for key in ("host", "pid", "since"))
    return f"process {pid} on {host} (since {since})"


def _is_alive(holder: dict) -> bool:
    """Whether a holder may live: False only for a process of this machine that is gone."""
    if holder.get("machine") != _machine():
        return True
    return _start_time(holder["pid"]) == holder["started"]


def _machine() -> str:
    """This host since its boot, and its table of processes, so that containers are told apart."""
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
    """When a process of this machine started, which tells it from a later one of that number; None: gone."""
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
