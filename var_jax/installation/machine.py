"""Check what the machine gives: cores, memory, open files, disks, the compile cache, image libraries."""

import io
import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from var_jax.installation.check import Check, fail, ok, warn

GIB = 2**30
MIN_MEMORY, GOOD_MEMORY = 1 * GIB, 4 * GIB
MIN_DISK, GOOD_DISK = GIB // 16, 2 * GIB
GOOD_OPEN_FILES = 1024
LARGE_CACHE = 20 * GIB
TEST_BYTES = 2**20  # written to see whether a folder takes files


def compilation_cache_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of JAX's persistent compilation cache: JAX_COMPILATION_CACHE_DIR, or in ~/.cache."""
    if folder := environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(folder)
    return Path(environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "var_jax" / "xla"


def read_number(path: Path) -> int | None:
    """Return the first number of a file of cgroups; None if there is no file, or no limit."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def available_cores(root: Path = Path("/")) -> float:
    """Return the number of cores that this process may use: its affinity, and the quota of its cgroup."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = root / "sys/fs/cgroup"
    quota = read_number(group / "cpu.max") or read_number(group / "cpu/cpu.cfs_quota_us")
    try:
        period = int((group / "cpu.max").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        period = read_number(group / "cpu/cpu.cfs_period_us") or 100_000
    return min(affinity, quota / period) if quota and quota > 0 else affinity


def check_cores(root: Path = Path("/")) -> list[Check]:
    """Report the cores that this process may use, of those of the machine."""
    cores, total = available_cores(root), os.cpu_count() or 1
    if cores < 1:
        advice = "raise the CPU limit of the container to at least 1"
        return [warn("cores", f"{cores:g} of {total}", advice)]
    return [ok("cores", f"{cores:g} of {total}")]


def check_memory(root: Path = Path("/")) -> list[Check]:
    """Check the memory that is available, under the limit of the cgroup."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass  # macOS; an old kernel
    group = root / "sys/fs/cgroup"
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = read_number(group / limit_name), read_number(group / used_name)
        if limit is not None and limit < total:
            total, available = limit, min(available, limit - (used or 0))
    message = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    advice = "end other processes, raise the container's limit, or lower --config.train.batch"
    if available < MIN_MEMORY:
        return [fail("memory", message, advice)]
    return [warn("memory", message, advice) if available < GOOD_MEMORY else ok("memory", message)]


def check_open_files(limit: int | None = None) -> list[Check]:
    """Check the limit of open files; the loader opens every file of a data set.

    Args:
      limit: the soft limit; by default that of this process.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if limit == resource.RLIM_INFINITY:
        return [ok("open files", "no limit")]
    if limit < GOOD_OPEN_FILES:
        return [warn("open files", f"at most {limit}", f"ulimit -n {4 * GOOD_OPEN_FILES}")]
    return [ok("open files", f"at most {limit}")]


def existing_folder(path: Path) -> Path:
    """Return a folder, or the innermost one above it that exists."""
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_folder(name: str, path: str | Path, option: str) -> list[Check]:
    """Check that a folder takes files, or can be created, and has space.

    Args:
      name: of the check.
      path: the folder; a URL is not checked.
      option: flag or variable that chooses another folder.
    """
    if "://" in os.fspath(path):
        return [ok(name, f"{path}: not on this machine, not checked")]
    folder = existing_folder(Path(path))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".var_jax_doctor.") as file:
            file.write(bytes(TEST_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = f"make room or correct the permissions, or choose another folder with {option}"
        return [fail(name, f"{path}: cannot be written: {error.strerror}", advice)]
    free = shutil.disk_usage(folder).free
    message = f"{path}: {free / GIB:.1f} GiB free"
    advice = f"make room, or choose another folder with {option}"
    if free < MIN_DISK:
        return [fail(name, message, advice)]
    return [warn(name, message, advice) if free < GOOD_DISK else ok(name, message)]


def check_cache(environ: Mapping[str, str]) -> list[Check]:
    """Check that the compile cache can be written, and report its size."""
    folder = compilation_cache_folder(environ)
    (check,) = check_folder("compile cache", folder, "JAX_COMPILATION_CACHE_DIR")
    if check.status != "ok" or "://" in os.fspath(folder):
        return [check]
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    message = f"{check.message}, {len(sizes)} files of {sum(sizes) / GIB:.2f} GiB"
    if sum(sizes) > LARGE_CACHE:
        return [warn(check.name, message, f"remove files from {folder}: they are compiled again when needed")]
    return [ok(check.name, message)]


def check_images() -> list[Check]:
    """Check that PNG and JPEG survive a round trip: PNG exactly, JPEG within 8 of 255 on a flat color."""
    from PIL import Image

    for encoding, tolerance in (("PNG", 0), ("JPEG", 8)):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (200, 100, 50)).save(buffer, encoding)
        pixel = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB").getpixel((8, 8))
        error = max(abs(a - b) for a, b in zip(pixel, (200, 100, 50), strict=True))
        if error > tolerance:
            advice = "pip install --force-reinstall Pillow"
            return [fail("images", f"{encoding} changes a color by {error} of 255", advice)]
    return [ok("images", "PNG and JPEG are written and read")]
