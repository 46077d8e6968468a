"""Flags and error handling that the commands share."""

import os
import re
import types

import numpy as np
import pytest
from absl import app
from ml_collections import ConfigDict

from tests.helpers.commands import command
from tests.helpers.xla_flags import fake_devices
from var_jax import cli
from var_jax.errors import ConfigError
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tools import encode_dataset
from var_jax.training.config_fields import check_names, rename_fields
from var_jax.training.trainer import Preempted
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig


class Exited(BaseException):
    """Raised in place of the end of the process."""


@pytest.fixture(params=[1, 2])
def hosts(request, monkeypatch):
    """Pretend to be one host, or one of two, and record `os._exit`."""

    def record_exit(code):
        raise Exited(code)

    monkeypatch.setattr(cli.jax, "process_count", lambda: request.param)
    monkeypatch.setattr(cli.os, "_exit", record_exit)
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
    with pytest.raises(expected) as raised, cli.abort_on_error():
        raise error
    if hosts > 1:
        assert raised.value.args == (1,)
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [Preempted("toy: stopped at step 3, saved"), SystemExit(), SystemExit(0)])
def test_what_ends_all_hosts_alike_goes_the_usual_way(hosts, error):
    with pytest.raises(type(error)), cli.abort_on_error():
        raise error
    with cli.abort_on_error():
        pass


def test_edits_lead_to_one_class(monkeypatch):
    model = types.SimpleNamespace(num_classes=10, check_labels=lambda labels: labels)
    flag = lambda *words: {"label": types.SimpleNamespace(value=words)}
    monkeypatch.setattr(cli, "FLAGS", flag("none"))
    np.testing.assert_array_equal(cli.labels(model, "label", max_count=1), [10])
    for words in (("3", "5"), ("3-5",)):
        monkeypatch.setattr(cli, "FLAGS", flag(*words))
        with pytest.raises(app.UsageError, match="--label=.*: must name at most 1 class, got"):
            cli.labels(model, "label", max_count=1)


def test_an_error_of_a_user_is_a_line_and_a_bug_is_itself(monkeypatch):
    def fail(error):
        def main(_):
            raise error

        return main

    monkeypatch.setattr(cli.sys, "argv", ["edit"])
    monkeypatch.setattr(cli.app, "run", lambda command, **_: command(cli.sys.argv))
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(cli.logging, "set_verbosity", lambda level: None)  # of all tests that follow
    monkeypatch.setattr(cli, "command_name", lambda: "edit")
    with pytest.raises(SystemExit, match="^edit: --mask is too small$"):
        cli.run(fail(ConfigError("--mask is too small")))
    with pytest.raises(ValueError, match="broadcast"):
        cli.run(fail(ValueError("cannot broadcast")))


def test_a_wrong_flag_is_the_last_thing_seen_and_help_lists_the_flags_of_the_package_alone():
    for flags, message in (
        (["--bogus=1"], "Unknown command line flag 'bogus'"),
        (
            [],
            "give --workdir of a run, or --tokenizer and --checkpoint of published files "
            "(.pth, .pt, .safetensors)",
        ),
    ):
        done = command("sample.py", *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"sample.py: {message}\n  see --help\n"
    shown = re.findall(r"^  -+(?:\[no\])?(\w+):", command("sample.py", "--help").stdout, re.MULTILINE)
    assert {"labels", "workdir", "guidance", "refiner", "coordinator"} <= set(shown)
    assert not {"verbosity", "alsologtostderr", "pdb", "only_check_args"} & set(shown)


@pytest.mark.parametrize(("devices", "threads"), [(1, None), (100, "800")])
def test_fake_devices_get_several_threads_each(devices, threads, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", fake_devices(devices))
    monkeypatch.delenv("PJRT_NPROC")
    cli.provide_threads()
    assert os.environ.get("PJRT_NPROC") == threads


def test_config_fields_of_the_last_release_are_accepted_with_a_notice(monkeypatch, capsys):
    flags = ("--config.next_scale.train.learning_rate=1e-3", "--config.train.batch=8", "--out=x")
    monkeypatch.setattr(cli.sys, "argv", ["train.py", *flags])
    monkeypatch.setattr(cli.app, "run", lambda command, **_: None)
    cli.run(lambda argv: None)
    assert cli.sys.argv == ["train.py", "--config.next_scale.train.base_learning_rate=1e-3", *flags[1:]]
    assert (
        "train.learning_rate is now called --config.next_scale.train.base_learning_rate"
        in capsys.readouterr().err
    )


def test_flags_of_the_last_release_are_accepted_with_a_notice(monkeypatch, capsys):
    monkeypatch.setattr(
        cli.sys, "argv", ["encode_dataset", "--data.name=digits", "--data.dir", "x", "--flip"]
    )
    monkeypatch.setattr(cli.app, "run", lambda command, **_: None)
    cli.run(lambda argv: None, renamed=encode_dataset.RENAMED_FLAGS)
    assert cli.sys.argv == ["encode_dataset", "--data=digits", "--data_dir", "x", "--flip"]
    notices = capsys.readouterr().err.splitlines()
    assert [notice.split(";")[0] for notice in notices] == [
        "--data.name is called --data now",
        "--data.dir is called --data_dir now",
    ]


def test_saved_configs_of_the_last_release_get_present_names():
    saved = {"model": {"label_drop": 0.1, "depth": 2}, "stage": {"train": {"keep": 1, "batch": 4}}}
    saved["stage"]["adversarial"] = {"start": 0.2, "train": {"clip": 1.0}}
    renamed = rename_fields(saved)
    assert renamed["model"] == {"class_dropout_prob": 0.1, "depth": 2}
    assert renamed["stage"]["train"] == {"max_to_keep": 1, "batch": 4}
    assert renamed["stage"]["adversarial"] == {"start_fraction": 0.2, "train": {"grad_clip_norm": 1.0}}
    assert rename_fields(renamed) == renamed
    both = {"train": {"learning_rate": 1e-9, "base_learning_rate": 6e-3}}
    assert rename_fields(both) == {"train": {"base_learning_rate": 6e-3}}


def test_a_config_file_with_a_field_of_the_last_release_is_refused():
    stage = ConfigDict({"train": {"base_learning_rate": 6e-3}, "adversarial": {"train": {}}})
    check_names(stage)
    stage.adversarial.train.clip = 1.0
    match = "config.adversarial.train.clip is now called config.adversarial.train.grad_clip_norm"
    with pytest.raises(ConfigError, match=match):
        check_names(stage)


def test_samples_of_the_last_release_are_recognized():
    """Their job holds the checksum of the config under its old field names."""
    config = TokenizerConfig(scales=(1, 2, 4), num_codes=16, code_dim=4)
    assert cli.config_checksum(config) == 0x5AAB8AA6
    assert (
        cli.config_checksum(NextScaleConfig()) == 0xB9EE80EF
        and cli.config_checksum(NextTokenConfig()) == 0xE66F140A
    )


@pytest.mark.parametrize(
    ("plugin", "flags", "expected"),
    [
        ("jax_cuda13_plugin", "", "--xla_gpu_enable_triton_gemm=false"),
        (
            "jax_cuda12_plugin",
            "--xla_gpu_autotune_level=0",
            "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        ),
        ("jax_cuda13_plugin", "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
        ("libtpu", "", ""),
    ],
)
def test_commands_on_an_nvidia_gpu_multiply_with_cublas_unless_told_otherwise(
    monkeypatch, plugin, flags, expected
):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == plugin or None)
    monkeypatch.setenv("XLA_FLAGS", flags)
    cli.prefer_cublas()
    assert os.environ["XLA_FLAGS"] == expected
