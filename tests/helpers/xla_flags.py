"""XLA_FLAGS of the tests and of their child processes; import this module before JAX."""

from importlib.metadata import version

# Tests compile more than they compute. XLA's older emitters, which JAX 0.11 no longer has, compile faster; so
# do small modules in one piece.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def fake_devices(count: int) -> str:
    """Return the XLA_FLAGS of a process with `count` CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
