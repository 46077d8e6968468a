"""The command of the page, up to the server."""

import importlib.util
import os

import pytest

from tests.helpers.commands import command
from var_jax.app import __main__ as app
from var_jax.errors import ConfigError

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the page needs gradio")


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'var_jax\[app\]'"):
        app.prepare_gradio("folder")


def test_gradio_sends_nothing_and_writes_to_its_own_folder(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    app.prepare_gradio("folder")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["GRADIO_TEMP_DIR"] == "folder"


@needs_gradio
def test_a_model_that_does_not_exist_is_one_line():
    done = command("-m", "var_jax.app", "--workdir=nowhere")
    assert done.returncode == 1 and done.stderr.startswith("app: ") and "nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
