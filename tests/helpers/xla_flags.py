"""XLA_FLAGS of the tests and of the processes that they start; imported before JAX is."""

QUICK = "--xla_backend_optimization_level=1"  # tests compile more than they compute


def fake_devices(count: int) -> str:
    """Flags of a process with so many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
