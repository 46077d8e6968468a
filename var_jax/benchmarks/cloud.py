"""How Cloud TPU names the slices that JAX knows by their topology."""

# Generation -> how Cloud TPU names a slice of {chips} or {cores}, and its software (see launch/tpu_vm.sh).
CLOUD_NAMES = {
    "v4": ("v4-{cores}", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod-{chips}", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p-{cores}", "v2-alpha-tpuv5"),
    "v6e": ("v6e-{chips}", "v2-alpha-tpuv6e"),
}


def launch_command(topology: str, chips: int) -> str:
    """How to get such a slice; empty for a generation that launch/tpu_vm.sh does not know."""
    name, runtime = CLOUD_NAMES.get(topology.split(":")[0], ("", ""))
    accelerator = name.format(chips=chips, cores=2 * chips)
    return f"ACCELERATOR={accelerator} RUNTIME={runtime} launch/tpu_vm.sh create" if name else ""
