"""XLA_FLAGS of the tests and of their child processes; import this module before JAX."""

# Tests compile more than they compute.
QUICK = "--xla_backend_optimization_level=0"


def fake_devices(count: int) -> str:
    """Return the XLA_FLAGS of a process with `count` CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"


def cache_single_device_programs_only() -> None:
    """Make JAX recompile programs of several devices instead of reading them from its persistent cache.

    A CPU program that is read from the cache may run its collectives in another order on each device, and on
    few cores it then hangs: XLA does not store their order.
    """
    from jax._src import compilation_cache

    read = compilation_cache.get_executable_and_time

    def read_single_device(cache_key, compile_options, *args):
        several = compile_options.num_replicas * compile_options.num_partitions > 1
        return (None, None) if several else read(cache_key, compile_options, *args)

    compilation_cache.get_executable_and_time = read_single_device
