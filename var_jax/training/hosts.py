"""Checks and exchanges between the hosts of a run."""

import hashlib
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from var_jax.errors import ConfigError

MAX_TEXT_BYTES = 512  # of a text to gather
FILE_TIMEOUT = 30.0  # seconds until all hosts must see a new file
ANSWER_TIMEOUT = 300.0  # seconds until the other hosts must answer one that failed


def from_primary(values: np.ndarray) -> np.ndarray:
    """Broadcast process 0's values; shape and dtype (at most 32 bits) must be equal on all processes."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def gather_text(text: str) -> list[str]:
    """Gather a text from every process, in order, each truncated to MAX_TEXT_BYTES."""
    if jax.process_count() == 1:
        return [text]
    content = text.encode()[:MAX_TEXT_BYTES].ljust(MAX_TEXT_BYTES, b"\0")
    gathered = np.asarray(multihost_utils.process_allgather(np.frombuffer(content, np.uint8)))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered]


def succeeded_everywhere(success: bool) -> bool:
    """Return whether all processes succeeded.

    If only one fails, the others may wait in a collective operation that it never joins. If they do not
    answer, the failed process exits, and JAX then ends the others.
    """
    if jax.process_count() == 1:
        return success

    def give_up():
        print("this host failed and the others do not answer; exiting", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(ANSWER_TIMEOUT, give_up)
    timer.daemon = True
    if not success:
        timer.start()
    successes = multihost_utils.process_allgather(np.int32(success))
    timer.cancel()
    return bool(np.all(successes))


def check_one_file_system(directory: epath.Path) -> None:
    """Check that all processes see a file that process 0 writes.

    Raises:
      ConfigError: on every process, naming the hosts that do not see the file.
    """
    if jax.process_count() == 1:
        return
    nonce = from_primary(np.frombuffer(secrets.token_bytes(8), np.uint32)).tobytes().hex()
    path = directory / f".hosts-{nonce}"  # a new name, which no file system has cached as absent
    is_primary = jax.process_index() == 0
    if is_primary:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(nonce)
    multihost_utils.sync_global_devices(f"wrote {path.name}")
    deadline = time.monotonic() + FILE_TIMEOUT
    while not (exists := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    answers = gather_text(f"{int(exists)}{socket.gethostname()}")
    if is_primary:
        path.unlink(missing_ok=True)
    missing_on = [f"process {i} ({answer[1:]})" for i, answer in enumerate(answers) if answer[0] == "0"]
    if missing_on:
        raise ConfigError(
            f"the hosts do not share --workdir: {', '.join(missing_on)} cannot see a file that process 0 "
            f"({answers[0][1:]}) wrote under {directory}. Give a directory that all hosts mount at the same "
            "path, or one in a bucket (gs://...)."
        )


def program_hash(program: Callable, args: tuple) -> str:
    """Hash a jitted function as lowered for its arguments."""
    text = program.lower(*args).as_text()
    # Serialized Mosaic kernels contain paths of source files; the rest determines what they compute.
    text = re.sub(r'(@tpu_custom_call\(.*?)backend_config = "[^"]*"', r"\1", text)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_program(program: Callable, args: tuple, choices: dict[str, str]) -> None:
    """Check that all processes would compile the same program.

    Args:
      program: jitted function.
      args: arguments of its first call, global arrays or their shapes and shardings.
      choices: settings that this host resolved, for the message.

    Raises:
      ConfigError: on every process, with the choices of each.
    """
    if jax.process_count() == 1:
        return
    settings = ", ".join(f"{name} {value}" for name, value in choices.items())
    summary = f"{socket.gethostname()}: {settings}, jax {jax.__version__}"
    hosts = [text.split(" ", 1) for text in gather_text(f"{program_hash(program, args)} {summary}")]
    if len({digest for digest, _ in hosts}) > 1:
        lines = "\n".join(
            f"  process {i}, {summary}" + ("" if digest == hosts[0][0] else "  <- differs from process 0")
            for i, (digest, summary) in enumerate(hosts)
        )
        raise ConfigError(
            "the hosts would run different programs, and wait for each other forever. Give all hosts the "
            f"same config and versions:\n{lines}"
        )
