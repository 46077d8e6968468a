"""Commands of the repository, run as processes."""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.helpers.xla_flags import QUICK

REPOSITORY = Path(__file__).parent.parent.parent
# Forked from a process that has imported JAX and its neighbors, a command saves 4 seconds of CPU time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.preloaded"])
NOT_FORKED = ("var_jax.tools.prepare",)  # they spawn processes, which hang in a fork


def python(*arguments, xla_flags: str = QUICK) -> dict:
    """Return the arguments of a subprocess that runs Python in the repository."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags}
    return dict(args=[sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True)


class Command:
    """Running `python ARGUMENTS` in the repository, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, *arguments, xla_flags: str = QUICK):
        self.args = [str(argument) for argument in arguments]
        self._folder = Path(tempfile.mkdtemp())
        environment = {**os.environ, "XLA_FLAGS": xla_flags}
        self._process = FORKS.Process(target=_run, args=(self.args, environment, self._folder))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        shutil.rmtree(self._folder)
        return out, err


def command(*arguments, xla_flags: str = QUICK) -> subprocess.CompletedProcess:
    """Run Python with the arguments, and wait for its end."""
    process = Command(*arguments, xla_flags=xla_flags)
    try:
        out, err = process.communicate(timeout=600)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _run(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """Become `python ARGUMENTS`, with its output in files; runs in the forked process."""
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with open(folder / name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    settings = [{k: v for k, v in e.items() if k.startswith("JAX_")} for e in (os.environ, environment)]
    os.chdir(REPOSITORY)
    if settings[0] != settings[1] or set(arguments[:2]) & set(NOT_FORKED):  # JAX reads them when imported
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    os.environ.clear()
    os.environ.update(environment)
    try:
        _run_python(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:  # as the interpreter ends; multiprocessing leaves out `atexit`
        threading._shutdown()
        atexit._run_exitfuncs()


def _run_python(first: str, *rest: str) -> None:
    """Run `-m MODULE`, `-c PROGRAM` or a file, with the arguments after it."""
    sys.path.insert(0, str(REPOSITORY))
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
