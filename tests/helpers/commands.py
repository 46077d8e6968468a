"""Commands of the repository, run as processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.xla_flags import QUICK

REPOSITORY = Path(__file__).parent.parent.parent


def python(*arguments, xla_flags: str = QUICK) -> dict:
    """What subprocess takes to run Python with the arguments, in the repository."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags}
    return dict(args=[sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True)


def command(*arguments, xla_flags: str = QUICK) -> subprocess.CompletedProcess:
    """Runs Python with the arguments to its end."""
    return subprocess.run(**python(*arguments, xla_flags=xla_flags), capture_output=True, timeout=600)
