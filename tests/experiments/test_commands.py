"""Test command lines of the experiments: users' errors take one line, bugs keep their traceback."""

import importlib
from types import SimpleNamespace

import pytest
from absl import app

from var_jax import cli
from var_jax.errors import ConfigError

EXPERIMENTS = (
    "alignment",
    "codebook",
    "collaborative",
    "complexity",
    "inpainting",
    "locality",
    "markov",
    "next_token",
    "scaling_law",
    "self_correction",
)
COMMANDS = ("benchmarks.scaling", *(f"experiments.{name}.run" for name in EXPERIMENTS))
FIRST_WORK = {
    "next_token": "prepare_bases",
    "inpainting": "next_token.prepare_bases",
    "scaling_law": "prepare_stage",
    "alignment": "compare_seed",
}


class Flags(SimpleNamespace):
    """Values of flags, by attribute and, like absl's FLAGS, by name."""

    def __getitem__(self, name):
        return SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def flags(monkeypatch):
    """Return a function that sets the flags of a command and returns its module."""

    def set_flags(command: str, out: str):
        module = importlib.import_module(command)
        lists = dict(systems=None, variants=None, seeds=["0"], sides=["2", "4"], depths=["1", "2", "3"])
        lists |= dict(guidance=["0"], parts=["cost"], kinds=["untuned"])
        values = Flags(config="config", merge=None, out=out, width=32, depth=1, steps=4, crops=1, **lists)
        values.per_class = values.draws = 1
        for owner in (module, cli):
            monkeypatch.setattr(owner, "FLAGS", values)
        monkeypatch.setattr(cli, "initialize_distributed", lambda: None)
        return module

    return set_flags


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_for_the_results_is_refused_before_anything_is_computed(flags, command):
    with pytest.raises(app.UsageError, match=r"--out=gs://bucket/run: must be a local path. Copy it"):
        flags(command, "gs://bucket/run").main([])


@pytest.mark.parametrize("name", FIRST_WORK)
def test_bugs_and_errors_of_users_are_told_apart(flags, monkeypatch, tmp_path, name):
    module = flags(f"experiments.{name}.run", str(tmp_path / "out"))

    def fail(error):
        def work(*args, **kwargs):
            raise error

        monkeypatch.setattr(f"{module.__name__}.{FIRST_WORK[name]}", work)

    fail(ValueError("operands could not be broadcast together"))
    with pytest.raises(ValueError, match="broadcast"):
        module.main([])
    fail(ConfigError("--config must have a stage next_scale"))
    with pytest.raises(ConfigError, match="--config must have a stage next_scale"):
        module.main([])
