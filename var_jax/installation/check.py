"""Result of a check, and the two ways in which a check may run: guarded, and in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

DISTRIBUTIONS = {"PIL": "Pillow"}  # of modules that have another name
KILL_TIMEOUT = 5  # seconds; a process that waits inside a driver cannot be killed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Result of a check.

    Attributes:
      name: what was checked.
      status: `ok`, `warn` or `FAIL`.
      message: what was found.
      advice: what to do about it.
    """

    name: str
    status: str
    message: str
    advice: str = ""


def ok(name: str, message: str) -> Check:
    return Check(name=name, status="ok", message=message)


def warn(name: str, message: str, advice: str) -> Check:
    return Check(name=name, status="warn", message=message, advice=advice)


def fail(name: str, message: str, advice: str) -> Check:
    return Check(name=name, status="FAIL", message=message, advice=advice)


def guarded(name: str, check: Callable[..., list[Check]], *arguments: object) -> list[Check]:
    """Run a check; its exception becomes a failed check, so that the others still run."""
    try:
        return check(*arguments)
    except ModuleNotFoundError as error:
        return [fail(name, str(error), f"pip install {DISTRIBUTIONS.get(error.name, error.name)}")]
    except Exception as error:
        return [fail(name, f"{type(error).__name__}: {error}", "see the message; nothing more is known")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe printed, and how it ended.

    Attributes:
      events: objects that it printed, one a line; `{"begin": STAGE}` precedes the results of a stage.
      returncode: negative for a signal; None if it ran out of time.
      stderr: its other output.
    """

    events: tuple[dict, ...]
    returncode: int | None
    stderr: str

    def get(self, key: str) -> dict | None:
        """Return the first event with a key; None if there is none."""
        return next((event for event in self.events if key in event), None)

    @property
    def problem(self) -> str | None:
        """Stage at which the probe failed, and how; None if it did not."""
        stage = next((event["begin"] for event in reversed(self.events) if "begin" in event), "start")
        if self.returncode is None:
            return f"{stage}: no answer in time"
        if error := self.get("error"):
            return f"{stage}: {error['error']}"
        if self.returncode < 0:
            return f"{stage}: killed by {signal.Signals(-self.returncode).name}: {last_line(self.stderr)}"
        return f"{stage}: exit code {self.returncode}: {last_line(self.stderr)}" if self.returncode else None


def last_line(text: str) -> str:
    """Return the last line of a text that is not a frame of a stack, at most 300 characters of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("@")]
    return lines[-1][:300] if lines else "no message"


def run_probe(script: str, *arguments: str, environ: Mapping[str, str], timeout: float) -> ProbeResult:
    """Run a script of this folder in a process of its own, which may crash or hang.

    Args:
      script: name of the file.
      *arguments: of its command line.
      environ: its environment.
      timeout: seconds after which it is killed.
    """
    # -P: the modules of this folder do not hide others of the same name.
    command = (sys.executable, "-P", os.fspath(Path(__file__).with_name(script)), *arguments)
    process = subprocess.Popen(
        command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    returncode = None
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        returncode = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            stdout, stderr = process.communicate(timeout=KILL_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            stdout, stderr = error.stdout or b"", error.stderr or b""
    return ProbeResult(
        events=tuple(_parse_events(stdout.decode(errors="replace"))),
        returncode=returncode,
        stderr=stderr.decode(errors="replace"),
    )


def _parse_events(text: str) -> list[dict]:
    """Return the objects among lines; libraries may print others, and a kill cuts one short."""
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
