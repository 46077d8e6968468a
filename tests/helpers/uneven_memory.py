"""Run train.py on hosts whose devices report different amounts of memory, as with NVIDIA's allocator.

For devices of another process, a process only knows the data sheet.
"""

import jax
from absl import app, flags

import train
from var_jax.training import hardware


def memory_bytes(device: jax.Device) -> float:
    """Return a small memory on process 0."""
    return 2.0**20 if device.process_index == jax.process_index() == 0 else 80e9


if __name__ == "__main__":
    hardware.memory_bytes = memory_bytes
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(train.main)
