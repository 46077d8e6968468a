"""Commands of the repository, run as processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.xla_flags import QUICK

REPOSITORY = Path(__file__).parent.parent.parent


def python(*arguments, xla_flags: str = QUICK) -> dict:
    """Return the arguments of a subprocess that runs Python in the repository."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags}
    return dict(args=[sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True)


def command(*arguments, xla_flags: str = QUICK) -> subprocess.CompletedProcess:
    """Run Python with the arguments, and wait for its end."""
    return subprocess.run(**python(*arguments, xla_flags=xla_flags), capture_output=True, timeout=600)
