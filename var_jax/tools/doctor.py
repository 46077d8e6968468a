"""Check an installation, and say what is wrong with it and what to do.

    python -m var_jax.tools.doctor
    python -m var_jax.tools.doctor --workdir=runs/digits --data_dir=data --json

It prints a line for each check: ok, warn or FAIL, what was found, and after an arrow what to do.  The exit
code is 1 if a check fails.  It runs where JAX or another dependency is missing or broken.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping

from var_jax.installation.check import Check, guarded
from var_jax.installation.data_sets import check_data_sets
from var_jax.installation.devices import (
    Hardware,
    check_hardware,
    check_jax,
    check_library_path,
    find_hardware,
)
from var_jax.installation.machine import (
    check_cache,
    check_cores,
    check_folder,
    check_images,
    check_memory,
    check_open_files,
)


def check_packages() -> list[Check]:
    from var_jax.installation import packages  # imports `packaging`, which may be missing

    return packages.check_packages()


def installed_plugins() -> list[int]:
    """Return the major versions of CUDA whose plugins are installed; none if that cannot be told."""
    try:
        from var_jax.installation import packages
    except ImportError:
        return []
    return packages.cuda_plugins(packages.installed_packages())


def run_checks(workdir: str, data_dir: str, timeout: float, environ: Mapping[str, str]) -> list[Check]:
    """Run all checks, each guarded on its own.

    Args:
      workdir: directory of a run.
      data_dir: directory of data sets.
      timeout: seconds that a process with JAX, or one that reads a data set, may take.
      environ: environment variables.
    """
    try:
        hardware = find_hardware(environ)
    except OSError:
        hardware = Hardware()
    plugins = installed_plugins()
    return [
        *guarded("packages", check_packages),
        *guarded("accelerators", check_hardware, hardware, plugins),
        *guarded("CUDA", check_library_path, environ, plugins),
        *guarded("JAX", check_jax, hardware, plugins, environ, timeout),
        *guarded("cores", check_cores),
        *guarded("memory", check_memory),
        *guarded("open files", check_open_files),
        *guarded("workdir", check_folder, "workdir", workdir, "--workdir"),
        *guarded("temporary", lambda: check_folder("temporary", tempfile.gettempdir(), "TMPDIR")),
        *guarded("compile cache", check_cache, environ),
        *guarded("images", check_images),
        *guarded("data", check_data_sets, data_dir, environ, timeout),
    ]


def format_check(check: Check) -> str:
    """Format a check as a line."""
    message = " ".join(check.message.split())
    return f"{check.status:<5}{check.name:<16} {message}" + (f" -> {check.advice}" if check.advice else "")


def main() -> None:
    # Not absl: it may be missing.
    parser = argparse.ArgumentParser(
        prog="python -m var_jax.tools.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", default="runs", help="directory of a run; its disk is checked")
    parser.add_argument("--data_dir", default="data", help="directory of the data sets")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for JAX, and for each data set")
    parser.add_argument("--json", action="store_true", help="print a JSON list of all checks")
    flags = parser.parse_args()
    checks = run_checks(flags.workdir, flags.data_dir, flags.timeout, os.environ)
    num_failed = sum(check.status == "FAIL" for check in checks)
    num_warnings = sum(check.status == "warn" for check in checks)
    if flags.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(*map(format_check, checks), sep="\n")
        print(f"{len(checks)} checks: {num_failed} failed, {num_warnings} warnings")
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
