"""What the hosts of a run agree on before and while they train together."""

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

WIDTH = 512  # bytes of a text that is gathered
SEEN_WITHIN = 30.0  # seconds that a new file may take to be seen by all hosts
ANSWER_WITHIN = 300.0  # seconds that the other hosts may take to answer one that failed


def from_primary(values: np.ndarray) -> np.ndarray:
    """Return process 0's values on every process; shape and dtype (of 32 bits at most) are equal on all."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def gather_text(text: str) -> list[str]:
    """Return the texts of all processes, in their order, each cut to WIDTH bytes."""
    content = text.encode()[:WIDTH].ljust(WIDTH, b"\0")
    if jax.process_count() == 1:
        return [text]
    gathered = np.asarray(multihost_utils.process_allgather(np.frombuffer(content, np.uint8)))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered]


def succeeded_everywhere(success: bool) -> bool:
    """Return whether all processes succeeded.

    Where one alone fails, the others may wait in a collective operation that it will never join: it ends
    itself, and thereby all, if they do not answer.
    """
    if jax.process_count() == 1:
        return success

    def give_up():
        print("the other hosts do not answer to a failure on this one; it ends", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(ANSWER_WITHIN, give_up)
    timer.daemon = True
    if not success:
        timer.start()
    everyone = multihost_utils.process_allgather(np.int32(success))
    timer.cancel()
    return bool(np.all(everyone))


def check_one_file_system(directory: epath.Path) -> None:
    """Check that a file which process 0 writes is seen by all.

    Raises:
      ConfigError: on every process, naming the hosts that do not see it.
    """
    if jax.process_count() == 1:
        return
    nonce = from_primary(np.frombuffer(secrets.token_bytes(8), np.uint32)).tobytes().hex()
    path = directory / f".hosts-{nonce}"  # a new name, which no cache of a file system knows to be absent
    primary = jax.process_index() == 0
    if primary:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(nonce)
    multihost_utils.sync_global_devices(f"wrote {path.name}")
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    answers = gather_text(f"{int(seen)}{socket.gethostname()}")
    if primary:
        path.unlink(missing_ok=True)
    if blind := [f"process {i} ({answer[1:]})" for i, answer in enumerate(answers) if answer[0] == "0"]:
        raise ConfigError(
            f"the hosts do not share --workdir: {', '.join(blind)} cannot see a file that process 0 "
            f"({answers[0][1:]}) wrote under {directory}. Give a folder that all hosts mount at the same "
            "path, or one in a bucket (gs://...)."
        )


def program_hash(program: Callable, args: tuple) -> str:
    """Return a hash of a jitted function as it is lowered for its arguments."""
    text = program.lower(*args).as_text()
    # Kernels of Mosaic are serialized with the paths of the source; what they compute follows from the rest.
    text = re.sub(r'(@tpu_custom_call\(.*?)backend_config = "[^"]*"', r"\1", text)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_program(program: Callable, args: tuple, choices: dict[str, str]) -> None:
    """Check that all processes would compile the same program.

    Args:
      program: jitted.
      args: of its first call, global arrays.
      choices: what was chosen on this host, for the message.

    Raises:
      ConfigError: on every process, with the choices of each.
    """
    if jax.process_count() == 1:
        return
    chosen = ", ".join(f"{name} {value}" for name, value in choices.items())
    summary = f"{socket.gethostname()}: {chosen}, jax {jax.__version__}"
    everyone = [text.split(" ", 1) for text in gather_text(f"{program_hash(program, args)} {summary}")]
    if len({digest for digest, _ in everyone}) > 1:
        hosts = "\n".join(
            f"  process {i}, {summary}" + ("" if digest == everyone[0][0] else "  <- another than process 0")
            for i, (digest, summary) in enumerate(everyone)
        )
        raise ConfigError(
            "the hosts would run different programs, and wait for each other for ever. Give all the same "
            f"config and versions:\n{hosts}"
        )
