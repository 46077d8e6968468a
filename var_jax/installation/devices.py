"""Check the devices that JAX finds against the hardware that the machine seems to have."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from var_jax.installation.check import Check, ProbeResult, fail, ok, run_probe, warn

# Smallest drivers, of JAX's and NVIDIA's installation guides.
MIN_DRIVERS = {12: (525, 60), 13: (580, 65)}
NVIDIA_PCI_VENDOR, GOOGLE_PCI_VENDOR = "0x10de", "0x1ae0"
# PCI ids of TPU chips, v3 to v6e and later, as JAX has them; other cards of Google are network cards.
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x0083", "0x007c")
NVIDIA_SMI_TIMEOUT = 20  # seconds; it hangs where the driver does
UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
MAX_GRADIENT_ERROR = 1e-3
CPU_IS_SLOW = 5  # GFLOP/s; a core of ten years ago has 20
INSTALL_CUDA = "pip install 'var_jax[cuda13]' (driver 580 or newer) or 'var_jax[cuda12]' (525 or newer)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Accelerators that a machine seems to have, whatever JAX says.

    Attributes:
      num_nvidia_cards: cards on the PCI bus.
      num_nvidia_devices: cards that the driver offers to this process.
      driver: version of NVIDIA's driver, (580, 95); None if there is none.
      num_tpus: TPU chips on the PCI bus.
      is_tpu_vm: the environment is that of a TPU VM.
    """

    num_nvidia_cards: int = 0
    num_nvidia_devices: int = 0
    driver: tuple[int, int] | None = None
    num_tpus: int = 0
    is_tpu_vm: bool = False

    @property
    def has_gpu(self) -> bool:
        return self.num_nvidia_devices > 0

    @property
    def has_tpu(self) -> bool:
        return self.num_tpus > 0 or self.is_tpu_vm


def find_hardware(environ: Mapping[str, str], root: Path = Path("/")) -> Hardware:
    """Look for accelerators in the files of the kernel, and with nvidia-smi."""
    cards = tpus = 0
    for vendor_file in root.glob("sys/bus/pci/devices/*/vendor"):
        vendor, kind, device = (
            _read(vendor_file.with_name(name)).strip() for name in ("vendor", "class", "device")
        )
        cards += vendor == NVIDIA_PCI_VENDOR and kind.startswith("0x03")  # display controllers
        tpus += vendor == GOOGLE_PCI_VENDOR and device in TPU_PCI_DEVICES
    devices = [path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    driver = _driver_of(_read(root / "proc/driver/nvidia/version"))
    smi_devices = 0
    if smi := shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath)):
        versions = _run_nvidia_smi(smi)
        smi_devices = len(versions)
        driver = driver or (_driver_of(versions[0]) if versions else None)
    return Hardware(
        num_nvidia_cards=cards,
        num_nvidia_devices=max(len(devices), smi_devices),
        driver=driver,
        num_tpus=tpus,
        is_tpu_vm=any(name in environ for name in ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _run_nvidia_smi(executable: str) -> list[str]:
    """Return the driver version of each card that nvidia-smi lists; none if it fails."""
    command = (executable, "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _driver_of(text: str) -> tuple[int, int] | None:
    """Return the version of the driver in the first line of a text, e.g. `... 580.95.05 ...`."""
    version = re.search(r"\b(\d{3})\.(\d{2,3})\b", text.partition("\n")[0])
    return (int(version[1]), int(version[2])) if version else None


def check_hardware(hardware: Hardware, plugins: list[int]) -> list[Check]:
    """Check the accelerators and their driver, without JAX.

    Args:
      hardware: of this machine.
      plugins: major versions of CUDA whose plugins are installed.
    """
    checks = []
    if hardware.num_nvidia_cards and not hardware.has_gpu:
        advice = "install NVIDIA's driver, 580 or newer; in Docker: docker run --gpus all"
        message = f"{hardware.num_nvidia_cards} NVIDIA cards, but no driver offers them to this process"
        checks.append(warn("GPU", message, advice))
    if hardware.has_gpu:
        driver = ".".join(map(str, hardware.driver)) if hardware.driver else "unknown"
        message = f"{hardware.num_nvidia_devices} NVIDIA devices, driver {driver}"
        too_new = [major for major in plugins if hardware.driver and hardware.driver < MIN_DRIVERS[major]]
        if too_new:
            needed = ".".join(map(str, MIN_DRIVERS[too_new[0]]))
            advice = "update the driver" + (", or install 'var_jax[cuda12]'" if too_new[0] > 12 else "")
            checks.append(fail("GPU", f"{message}; CUDA {too_new[0]} needs {needed}", advice))
        else:
            checks.append(ok("GPU", message))
    if hardware.has_tpu:
        checks.append(ok("TPU", f"{hardware.num_tpus or 'unknown number of'} TPU chips"))
    return checks or [ok("accelerators", "none on this machine")]


def check_library_path(environ: Mapping[str, str], plugins: list[int]) -> list[Check]:
    """Check that LD_LIBRARY_PATH does not replace the CUDA libraries that the plugin brings."""
    folders = [Path(folder) for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    hiding = [
        str(folder)
        for folder in folders
        if any([*folder.glob("libcudnn*.so*"), *folder.glob("libcublas.so*")])
    ]
    if plugins and hiding:
        message = f"LD_LIBRARY_PATH has CUDA libraries of another source: {', '.join(hiding)}"
        return [warn("CUDA", message, "unset LD_LIBRARY_PATH, unless you chose them")]
    return []


def check_jax(
    hardware: Hardware, plugins: list[int], environ: Mapping[str, str], timeout: float
) -> list[Check]:
    """Import JAX in a process of its own, list the devices, compute on each.

    XLA_FLAGS and JAX_PLATFORMS that make it fail are reported, and it runs again without them.

    Args:
      hardware: of this machine.
      plugins: major versions of CUDA whose plugins are installed.
      environ: environment of the process.
      timeout: seconds that it may take.
    """
    # Next to a program that runs, most of a GPU's memory is taken.
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environ}
    checks = []
    result = run_probe("jax_probe.py", environ=environ, timeout=timeout)
    while variable := check_variables(result, environ):
        checks.append(variable)
        del environ[variable.name]
        result = run_probe("jax_probe.py", environ=environ, timeout=timeout)
    return checks + describe_probe(result, hardware, plugins, environ)


def check_variables(result: ProbeResult, environ: Mapping[str, str]) -> Check | None:
    """Return the check of the variable that made the probe fail, named like it; None if none did."""
    unknown = UNKNOWN_FLAGS.search(result.stderr)
    if unknown and "XLA_FLAGS" in environ:
        return fail("XLA_FLAGS", f"unknown: {unknown[1]}", "correct or unset XLA_FLAGS")
    platforms = environ.get("JAX_PLATFORMS")
    error = result.get("error")
    if not platforms or not result.get("jax") or not error or result.get("devices"):
        return None
    extra = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}.get(platforms.split(",")[0])
    advice = "unset JAX_PLATFORMS" + (f", or pip install 'var_jax[{extra}]'" if extra else "")
    return fail("JAX_PLATFORMS", f"{platforms}: JAX finds no such device ({error['error']})", advice)


def describe_probe(
    result: ProbeResult, hardware: Hardware, plugins: list[int], environ: Mapping[str, str]
) -> list[Check]:
    """Return the checks of what `jax_probe.py` printed."""
    checks = []
    for event in result.events:
        if "cuda" in event:
            checks += check_cudnn(event["cuda"])
    listed = result.get("devices")
    devices = listed["devices"] if listed else []
    if devices:
        platforms = {device["platform"] for device in devices}
        checks += check_platforms(platforms, hardware, plugins, environ, result.stderr)
    checks += [check for event in result.events if "device" in event for check in check_product(event)]
    version = result.get("jax")
    if result.problem or not devices or not version:
        message = result.problem or "ended without a list of devices"
        return [*checks, fail("JAX", message, jax_advice(result, hardware))]
    names = ", ".join(f"{device['platform']}:{device['id']} {device['kind']}" for device in devices)
    return [ok("JAX", f"{version['jax']} with {names}"), *checks]


def jax_advice(result: ProbeResult, hardware: Hardware) -> str:
    """Return what to do about a probe that failed."""
    if result.returncode is None and not hardware.has_tpu:
        return "raise --timeout on a busy machine; if it stays, the driver hangs: restart the machine"
    if not result.get("jax"):
        return "correct the packages above; if none is wrong: pip install --force-reinstall --no-deps jaxlib"
    if hardware.has_tpu:
        return (
            "on a slice of several hosts run this on all of them at once; "
            "end other processes that hold the TPU (sudo lsof /dev/accel* /dev/vfio/*)"
        )
    if hardware.has_gpu:
        return "look at nvidia-smi: another process may hold the memory, or the driver needs a restart"
    return "see the message; a shell shows more: python -c 'import jax; print(jax.devices())'"


def check_cudnn(cuda: Mapping[str, object]) -> list[Check]:
    """Check that the cuDNN that is loaded is as new as the one JAX was built with."""
    name, loaded, built = f"cuDNN of CUDA {cuda['major']}", cuda.get("cudnn"), cuda["cudnn_build"]
    advice = f"pip install 'jax[cuda{cuda['major']}]', and unset LD_LIBRARY_PATH"
    if loaded is None:
        return [fail(name, f"not found: {cuda.get('cudnn_error')}", advice)]
    if loaded < built:
        return [fail(name, f"{loaded} is loaded, JAX was built with {built}", advice)]
    return [ok(name, f"{loaded}, JAX was built with {built}")]


def check_platforms(
    platforms: set[str], hardware: Hardware, plugins: list[int], environ: Mapping[str, str], stderr: str
) -> list[Check]:
    """Compare the platforms that JAX uses with the hardware."""
    chosen = environ.get("JAX_PLATFORMS")
    for name, exists, platform in (("GPU", hardware.has_gpu, "gpu"), ("TPU", hardware.has_tpu, "tpu")):
        if not exists or platform in platforms:
            continue
        message = f"the machine has a {name}, but JAX does not use it"
        if chosen:
            return [warn(name, f"{message}: JAX_PLATFORMS={chosen}", "unset JAX_PLATFORMS to use it")]
        if platform == "tpu":
            return [fail(name, message, "pip install 'var_jax[tpu]'")]
        if not plugins:
            return [fail(name, f"{message}: it has no CUDA plugin", INSTALL_CUDA)]
        reasons = re.findall(r"^(?:\w+Error: .*|.*CUDA_ERROR.*)$", stderr, re.M)
        reason = reasons[-1][:300] if reasons else "no reason given"
        return [fail(name, f"{message}: {reason}", "look at nvidia-smi; restart the machine after an update")]
    if plugins and not hardware.has_gpu:
        return [
            warn("GPU", "a CUDA plugin is installed, but no GPU is visible", "use it on a machine with one")
        ]
    return []


def check_product(event: Mapping[str, object]) -> list[Check]:
    """Check the speed and the gradient of a device, of an event of `jax_probe.py`."""
    name, error, rate = f"compute {event['device']}", event["gradient_error"], event["gflops"]
    memory = f", {event['memory_bytes'] / 2**30:.1f} GiB" if event["memory_bytes"] else ""
    if not error < MAX_GRADIENT_ERROR:  # true for NaN
        advice = "update the driver and JAX; if it stays, the device may be damaged"
        return [fail(name, f"a gradient is wrong by {error:.1e}", advice)]
    message = f"{rate:,.0f} GFLOP/s, gradient within {error:.0e}{memory}"
    if rate < CPU_IS_SLOW:
        return [warn(name, message, "end other processes on this machine")]
    return [ok(name, message)]
