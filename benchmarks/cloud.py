"""Commands that ask for the chips that JAX knows by their topology."""

from benchmarks.gpus import GPUS

# Generation -> how Cloud TPU names a slice of {chips} or {cores}, and its software (see launch/tpu_vm.sh).
CLOUD_NAMES = {
    "v4": ("v4-{cores}", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod-{chips}", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p-{cores}", "v2-alpha-tpuv5"),
    "v6e": ("v6e-{chips}", "v2-alpha-tpuv6e"),
}


def launch_command(topology: str, chips: int) -> str:
    """How to get such a slice, or such GPUs; empty for a generation that launch/tpu_vm.sh does not know."""
    kind, shape = topology.split(":")
    if kind in GPUS:
        hosts, gpus = shape.split("x")
        return f"sbatch --nodes={hosts} --ntasks-per-node={gpus} --gpus-per-node={gpus} launch/slurm.sh"
    name, runtime = CLOUD_NAMES.get(kind, ("", ""))
    accelerator = name.format(chips=chips, cores=2 * chips)
    return f"ACCELERATOR={accelerator} RUNTIME={runtime} launch/tpu_vm.sh create" if name else ""
