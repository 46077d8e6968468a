"""Processes on loopback that act as the hosts of a run, with two devices each."""

import socket
import subprocess
import time

from tests.helpers.commands import Command
from tests.helpers.xla_flags import fake_devices

TIMEOUT = "--host_timeout=10"


def start(processes: int, workdir, *command, own=lambda i: ()) -> list[Command]:
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
        Command(*command, f"--workdir={workdir}", *mine(i), *own(i), xla_flags=fake_devices(2))
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
