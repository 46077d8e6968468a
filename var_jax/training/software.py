"""Software of a run: versions of packages, and the git commit of the checkout."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

_PACKAGES = (
    "var_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "torch",
    "libtpu",
)
_CUDA_PACKAGES = re.compile(r"jax-cuda.*|nvidia-(cudnn|cublas|cuda-runtime|cuda-nvcc|nccl).*")
GIT_TIMEOUT = 10.0  # seconds


def describe_software() -> dict[str, str]:
    """Return the versions of Python, JAX and its CUDA libraries, and the commit of the checkout, if any."""
    distributions = importlib.metadata.distributions()
    installed = {(d.metadata["Name"] or "").lower(): d.version for d in distributions}
    values = {"python": platform.python_version(), "machine": platform.platform()}
    values |= {name: installed[name] for name in _PACKAGES if name in installed}
    values |= {name: installed[name] for name in sorted(installed) if _CUDA_PACKAGES.fullmatch(name)}
    commit = git_commit(Path(__file__).parent)
    return values | ({"commit": commit} if commit else {})


def git_commit(folder: Path) -> str:
    """Return the commit that a folder is checked out from, with `-dirty` if files were changed.

    Returns "" without git, and for a folder that is not tracked, such as an installation in the environment
    of another repository.
    """
    options = dict(cwd=folder, capture_output=True, text=True, timeout=GIT_TIMEOUT)
    try:
        if not subprocess.run(["git", "ls-files", "."], **options).stdout:
            return ""
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, **options).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
