"""XLA_FLAGS of the tests and of their child processes; import this module before JAX."""

# Tests compile more than they compute.
QUICK = "--xla_backend_optimization_level=0"


def fake_devices(count: int) -> str:
    """Return the XLA_FLAGS of a process with `count` CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
