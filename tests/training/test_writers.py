"""Writers of metrics: every line reaches each of them, also after a kill; W&B by a stand-in, and really."""

import csv
import importlib
import json
import logging
import math
import sys
import types

import pytest
from PIL import Image

from tests.helpers import fake_wandb
from tests.helpers.tiny import tiny_config
from var_jax.errors import ConfigError
from var_jax.paths import as_path
from var_jax.training.metrics import Log
from var_jax.training.resume import check_resume_compatible
from var_jax.training.trainer import check_training
from var_jax.training.writers import parse_writers


@pytest.fixture(params=["stand-in", "real"])
def wandb(request, monkeypatch):
    """The stand-in as the package wandb, then the real one where it is installed (CI does not)."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
        yield fake_wandb
    else:
        package = pytest.importorskip("wandb", exc_type=ImportError)
        yield package
        package.teardown()  # it reads the environment once


def open_log(directory, start: int, *writers: str, **config) -> Log:
    return Log(directory, "toy", start, 100, 8, 1e6, writers, config).open()


def rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_names_are_checked_before_anything_is_computed(tmp_path):
    assert parse_writers(("csv,tensorboard", "csv")) == ("csv", "tensorboard")  # as the command line has them
    assert parse_writers(()) == parse_writers("") == ()
    stage = tiny_config(tmp_path).tokenizer
    stage.train.writers = ("csv", "mlflow")
    with pytest.raises(ConfigError, match="must be some of tensorboard, csv, wandb, got mlflow"):
        check_training(stage.train)
    with stage.unlocked():
        del stage.train.writers  # a config of an older version
    check_training(stage.train)


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["missing", "a folder wandb"])
def test_a_missing_wandb_is_named_with_the_command_that_installs_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match="not installed: pip install wandb"):
        parse_writers(("wandb",))


def test_a_run_resumes_with_other_writers_and_from_a_record_without(tmp_path):
    record = lambda **train: {"dtype": "float32", "weights": {}, "stage": {"train": train}}
    now = record(batch=8, writers=["csv", "wandb"])
    for saved in (record(batch=8), record(batch=8, writers=["tensorboard"])):
        assert check_resume_compatible(saved, now, tmp_path) == ""


def test_csv_files_have_the_lines_of_metrics_jsonl(tmp_path):
    log = open_log(tmp_path, 0, "csv")
    log.write(1, "train", {"loss": 4.0}, "")
    log.write(2, "train", {"loss": math.nan, "images_per_s": 2.5}, "")  # a new column
    log.write(3, "train", {"loss": 1e-7, "images_per_s": 3.0}, "")
    log.write(3, "eval", {"loss": 0.5, "a,b": 1.0}, "")
    log.event(3, "spike", {"loss": 9.0}, "", [5, 7])
    folder = tmp_path / "csv"  # flushed with every line
    assert rows(folder / "train.csv") == [
        {"step": "1", "loss": "4.0", "images_per_s": ""},
        {"step": "2", "loss": "", "images_per_s": "2.5"},
        {"step": "3", "loss": "1e-07", "images_per_s": "3.0"},
    ]
    assert rows(folder / "eval.csv") == [{"step": "3", "loss": "0.5", "a,b": "1.0"}]
    assert rows(folder / "spike.csv") == [{"step": "3", "loss": "9.0"}]
    log.close()


def test_csv_files_of_a_killed_run_go_on_after_the_resumed_step(tmp_path):
    log = open_log(tmp_path, 0, "tensorboard")  # `csv` is chosen later, and has the lines of before
    for step in (1, 2, 3, 4):
        log.write(step, "train", {"loss": 1.0 / step}, "")
    log.write(4, "eval", {"loss": 0.5}, "")
    log.close()
    open_log(tmp_path, 4, "csv").close()
    assert [row["step"] for row in rows(tmp_path / "csv" / "train.csv")] == ["1", "2", "3", "4"]
    with open(tmp_path / "csv" / "train.csv", "a") as file:
        file.write("5,0.")  # killed while it was writing
    log = open_log(tmp_path, 2, "csv")
    log.write(3, "train", {"loss": 0.25}, "")
    log.close()
    assert [row["loss"] for row in rows(tmp_path / "csv" / "train.csv")] == ["1.0", "0.5", "0.25"]
    assert not (tmp_path / "csv" / "eval.csv").exists()


def test_csv_files_in_a_bucket(bucket):
    folder = as_path(bucket) / "csv_run"
    log = open_log(folder, 0, "csv")
    for step in (1, 2):
        log.write(step, "train", {"loss": 0.5}, "")
    log.close()
    assert (folder / "csv" / "train.csv").read_text() == "step,loss\n1,0.5\n2,0.5\n"


def test_wandb_gets_lines_pictures_and_config_and_goes_on_with_the_same_run(wandb, tmp_path):
    directory, ids = tmp_path / "digits" / "toy", []
    for start in (0, 10):
        log = open_log(directory, start, "wandb", seed=3, train={"batch": 8})
        run = wandb.run
        log.write(start + 10, "train", {"loss": 0.5}, "")
        log.event(start + 7, "skipped", {"loss": 2.0}, "", [1])  # reported after later steps
        log.pictures(start + 10, {"samples": Image.new("RGB", (8, 8))})
        summary = dict(run.summary)
        assert (summary["train/loss"], summary["skipped/loss"]) == (0.5, 2.0)
        assert summary["step"] == start + 10 and "preview/samples" in summary
        assert run.config["seed"] == 3 and run.config["train"]["batch"] == 8
        ids.append(run.id)
        log.close()
    assert ids[0] == ids[1] == json.loads((directory / "wandb_run.json").read_text())["id"]


def test_wandb_is_started_as_its_documentation_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    open_log(tmp_path / "digits" / "toy", 0, "wandb").close()
    run = fake_wandb.run
    names = ("project", "group", "name", "job_type", "resume", "dir")
    want = ["var_jax", "digits", "digits toy", "toy", "allow", str(tmp_path / "digits" / "toy")]
    assert [run.options[name] for name in names] == want
    assert run.metrics == [("step", None), ("*", "step")] and run.is_finished


def test_training_goes_on_with_a_warning_when_wandb_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = open_log(tmp_path, 0, "wandb", "csv")
    fake_wandb.run.is_connected = False
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            log.write(step, "train", {"loss": 0.5}, "")
        log.close()
    assert caplog.text.count("wandb failed: Connection lost. Training goes on") == 1
    assert len(rows(tmp_path / "csv" / "train.csv")) == 2


def test_a_wandb_that_cannot_start_is_an_error_that_says_what_to_do(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no login of this machine applies to it
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"wandb cannot start: .*API key[^\n]*\n.*WANDB_MODE=offline"):
        open_log(tmp_path, 0, "wandb")


def test_other_writers_do_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_log(tmp_path, 0, "tensorboard", "csv").close()
    with pytest.raises(ImportError):
        importlib.import_module("wandb")
