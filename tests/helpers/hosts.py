"""Processes on loopback that act as the hosts of a run, with two devices each."""

import os
import socket
import subprocess
import sys
import time

from tests.helpers.commands import REPOSITORY
from tests.helpers.xla_flags import fake_devices

TIMEOUT = "--host_timeout=10"


def start(processes: int, workdir, *command, own=lambda i: ()) -> list[subprocess.Popen]:
    """Start the processes of a run.

    Args:
      processes: number of processes.
      workdir: directory of the run.
      *command: arguments of Python.
      own: returns further flags of a process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = (f"--coordinator=localhost:{port}", f"--num_processes={processes}", TIMEOUT)
    mine = lambda i: (*several, f"--process_id={i}") if processes > 1 else ()
    return [
        subprocess.Popen(
            [sys.executable, *command, f"--workdir={workdir}", *mine(i), *own(i)],
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": fake_devices(2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def ended(processes, within: float) -> list[tuple[int, str, str]]:
    """Wait for the processes; return the exit code, stdout and stderr of each."""
    deadline, result = time.monotonic() + within, []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        result.append((process.returncode, out, err))
    return result
