"""Command lines of the experiments: what is refused in one line, and bugs that keep their traceback."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import app

from tests.conftest import REPOSITORY
from var_jax import command_line
from var_jax.errors import ConfigError

COMMANDS = ("codebook", "compare", "complexity", "generality", "locality", "scaling", "scaling_law")
FIRST_WORK = {"compare": "bases_of", "generality": "compare.bases_of", "scaling_law": "prepare"}


class Flags(SimpleNamespace):
    """Values of flags, as attributes and, as absl has it, by name."""

    def __getitem__(self, name):
        return SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def flags(monkeypatch):
    """Puts flags in place for a benchmark; returns its module."""

    def put(command: str, out: str):
        module = importlib.import_module(f"var_jax.benchmarks.{command}")
        lists = dict(systems=None, variants=None, seeds=["0"], sides=["2", "4"], depths=["1", "2", "3"])
        values = Flags(config="config", merge=None, out=out, width=32, depth=1, steps=4, crops=1, **lists)
        values.per_class = values.draws = 1
        for owner in (module, command_line):
            monkeypatch.setattr(owner, "FLAGS", values)
        monkeypatch.setattr(command_line, "start", lambda: None)
        monkeypatch.setattr(command_line, "join_hosts", lambda: None)
        return module

    return put


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_for_the_results_is_refused_before_anything_is_computed(flags, command):
    with pytest.raises(app.UsageError, match=r"--out=gs://bucket/run: must be a local path. Copy it"):
        flags(command, "gs://bucket/run").main(["benchmark"])


@pytest.mark.parametrize("command", FIRST_WORK)
def test_a_bug_keeps_its_traceback_and_a_users_error_is_one_line(flags, monkeypatch, tmp_path, command):
    module = flags(command, str(tmp_path / "out"))

    def fail(error):
        def work(*args, **kwargs):
            raise error

        monkeypatch.setattr(f"{module.__name__}.{FIRST_WORK[command]}", work)

    fail(ValueError("operands could not be broadcast together"))
    with pytest.raises(ValueError, match="broadcast"):
        module.main(["benchmark"])
    fail(ConfigError("--config must have a stage next_scale"))
    with pytest.raises(SystemExit, match=f"{command}: --config must have a stage next_scale"):
        module.main(["benchmark"])


def test_out_of_a_checkout_the_benchmarks_say_so(tmp_path):
    (tmp_path / "var_jax").symlink_to(REPOSITORY / "var_jax")  # as it is installed: without configs
    program = "import sys; sys.path[0] = '.'; import var_jax.benchmarks"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "run them from the root of a checkout" in done.stderr, done.stderr
