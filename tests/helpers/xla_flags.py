"""XLA_FLAGS of the tests and of their child processes; import this module before JAX."""

from importlib.metadata import version

# Tests compile more than they compute.  Level 0 takes a third less time than 1, but with JAX 0.11 it draws
# other images from the golden files.
QUICK = f"--xla_backend_optimization_level={int(version('jax') >= '0.11')}"


def fake_devices(count: int) -> str:
    """Return the XLA_FLAGS of a process with `count` CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
