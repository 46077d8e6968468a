"""Shell commands that request the TPU slice or GPU nodes of a topology."""

from benchmarks.gpus import GPUS

# TPU generation -> accelerator type of a slice at Cloud TPU, and runtime version (see launch/tpu_vm.sh).
CLOUD_NAMES = {
    "v4": ("v4-{cores}", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod-{chips}", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p-{cores}", "v2-alpha-tpuv5"),
    "v6e": ("v6e-{chips}", "v2-alpha-tpuv6e"),
}


def launch_command(topology: str, chips: int) -> str:
    """Return the command that requests a TPU slice or GPU nodes; "" if launch/tpu_vm.sh does not support it.

    Args:
      topology: such as v5e:4x4, or h100:2x8 (hosts x GPUs).
      chips: number of chips of the slice.
    """
    kind, shape = topology.split(":")
    if kind in GPUS:
        hosts, gpus = shape.split("x")
        return f"sbatch --nodes={hosts} --ntasks-per-node={gpus} --gpus-per-node={gpus} launch/slurm.sh"
    name, runtime = CLOUD_NAMES.get(kind, ("", ""))
    accelerator = name.format(chips=chips, cores=2 * chips)
    return f"ACCELERATOR={accelerator} RUNTIME={runtime} launch/tpu_vm.sh create" if name else ""
