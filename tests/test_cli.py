"""Flags and failures that the scripts share."""

import types

import numpy as np
import pytest
from absl import app

from var_jax import cli
from var_jax.training.trainer import Preempted


class Exited(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture(params=[1, 2])
def hosts(request, monkeypatch):
    """One host, or one of two, where `os._exit` is seen."""

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(cli.jax, "process_count", lambda: request.param)
    monkeypatch.setattr(cli.os, "_exit", leave)
    return request.param


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("the cosmic ray"), "Traceback"),
        (SystemExit("sample.py: the disk is full"), "sample.py: the disk is full\n"),
    ],
)
def test_a_host_that_fails_leaves_at_once_with_its_message(hosts, capsys, error, message):
    expected = type(error) if hosts == 1 else Exited
    with pytest.raises(expected) as raised, cli.failing_at_once():
        raise error
    if hosts > 1:
        assert raised.value.args == (1,)
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [Preempted("toy: stopped at step 3, saved"), SystemExit(), SystemExit(0)])
def test_what_ends_all_hosts_alike_goes_the_usual_way(hosts, error):
    with pytest.raises(type(error)), cli.failing_at_once():
        raise error
    with cli.failing_at_once():
        pass


def test_edits_lead_to_one_class(monkeypatch):
    model = types.SimpleNamespace(num_classes=10, check_labels=lambda labels: labels)
    flag = lambda *words: {"label": types.SimpleNamespace(value=words)}  # noqa: E731
    monkeypatch.setattr(cli, "FLAGS", flag("none"))
    np.testing.assert_array_equal(cli.labels(model, "label", most=1), [10])
    for words in (("3", "5"), ("3-5",)):
        monkeypatch.setattr(cli, "FLAGS", flag(*words))
        with pytest.raises(app.UsageError, match="--label=.*: must name 1 class, got"):
            cli.labels(model, "label", most=1)
