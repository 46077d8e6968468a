"""Runs under gs://, by the protocols of Orbax and TensorStore, on the server of tests/helpers/fake_gs.py."""

import os
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from PIL import Image

from tests.helpers.commands import REPOSITORY
from tests.helpers.tiny import tiny_config
from tests.helpers.toy import Toy, toy_stage
from tests.helpers.xla_flags import fake_devices
from tests.training.test_profiling import loop
from var_jax import stages
from var_jax.data.sources import open_source
from var_jax.images import save_png
from var_jax.paths import as_path
from var_jax.sharding import make_mesh
from var_jax.training.checkpoint import (
    CheckpointMissing,
    Checkpoints,
    check_storage,
    load_config,
    load_params,
)
from var_jax.training.checkpoint_integrity import CheckpointDamaged, steps_under
from var_jax.training.metrics import Log, plot_curves, read_metrics
from var_jax.training.profiling import Profile, StepRange
from var_jax.training.state import create_state
from var_jax.training.trainer import train
from var_jax.training.writers import AppendFile


@pytest.fixture
def run(bucket, request):
    """Return the URL of a run that no other test uses."""
    return as_path(bucket) / request.node.name


@pytest.fixture(scope="module")
def two_steps(bucket):
    """Save checkpoints of steps 1 and 2, to be copied; return their URL, state and abstract state."""
    folder = as_path(bucket) / "two_steps"
    toy = Toy()
    make_state, abstract = create_state(toy.init, toy.optimizer, False, jax.random.key(0), make_mesh(fsdp=8))
    state = make_state()
    saved = Checkpoints(folder, keep=2)
    for step in (1, 2):
        saved.save(step, state.replace(step=jnp.array(step)), {"step": step}, 1.0)
    saved.wait()
    saved.close()
    return folder, state, abstract


def files(folder) -> list:
    """Return all files under a directory."""
    return [f for p in folder.iterdir() for f in (files(p) if p.is_dir() else [p])]


def copied(folder, target):
    for path in files(folder):
        (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def test_a_run_that_is_interrupted_ends_in_the_numbers_of_a_local_one(run, digits_dir, tmp_path, monkeypatch):
    sources = tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))
    stage = toy_stage(digits_dir, every=4, log_every=1, max_to_keep=1)
    train(Toy(), stage, 12, tmp_path, sources)

    def interrupt(log, step):
        if step == 9:  # while step 8 is being written
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Log, "advance", interrupt)
        train(Toy(), stage, 12, run, sources)
    assert steps_under(run / "toy" / "checkpoints") == [8]
    train(Toy(), stage, 12, run, sources)
    assert steps_under(run / "toy" / "checkpoints") == [12]
    (got, _), (want, _) = (load_params(folder / "toy" / "checkpoints") for folder in (run, tmp_path))
    chex.assert_trees_all_equal(got, want)
    got, want = (read_metrics(folder / "toy" / "metrics.jsonl") for folder in (run, tmp_path))
    assert [(x["step"], x["kind"], x["loss"]) for x in got] == [
        (x["step"], x["kind"], x["loss"]) for x in want
    ]
    assert len(list((run / "toy" / "tensorboard").iterdir())) == 2


HOST = """
from absl import app, flags
from tests.helpers import fake_gs
fake_gs.install()
from tests.helpers.toy import Toy, toy_stage
from var_jax.cli import define_host_flags, abort_on_error, initialize_distributed
from var_jax.data.sources import open_source
from var_jax.paths import as_path
from var_jax.training.trainer import train
for name in ("workdir", "data_dir"):
    flags.DEFINE_string(name, None, "")
define_host_flags()

def main(_):
    initialize_distributed()
    data = flags.FLAGS.data_dir
    sources = tuple(open_source("digits", split, data) for split in ("train", "test"))
    with abort_on_error():
        train(Toy(), toy_stage(data, every=4), 8, as_path(flags.FLAGS.workdir), sources)

app.run(main)
"""


def on_two_hosts(run, digits_dir) -> list[str]:
    """Train 8 steps on two processes with four devices each; return their stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = (
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
        f"--workdir={run}",
        f"--data_dir={digits_dir}",
    )
    environment = {**os.environ, "XLA_FLAGS": fake_devices(4)}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, *several, f"--process_id={i}"],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        stderr = [host.communicate(timeout=300)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], stderr[0][-2000:] + stderr[1][-2000:]
    return stderr


def test_two_hosts_write_one_checkpoint_and_agree_on_a_damaged_one(run, digits_dir, tmp_path):
    sources = tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))
    train(Toy(), toy_stage(digits_dir, every=4), 8, tmp_path, sources)
    want, _ = load_params(tmp_path / "toy" / "checkpoints")
    folder = run / "toy" / "checkpoints"
    on_two_hosts(run, digits_dir)
    assert steps_under(folder) == [4, 8]
    assert {path.name for path in (folder / "8" / "params").iterdir()} >= {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    np.testing.assert_allclose(load_params(folder)[0]["w"], want["w"], rtol=1e-5)
    (folder / "8" / "params" / "ocdbt.process_1" / "manifest.ocdbt").unlink()
    stderr = on_two_hosts(run, digits_dir)
    assert "8 is damaged: params/ocdbt.process_1/manifest.ocdbt is missing" in stderr[0]
    assert "is damaged: " not in stderr[1]  # process 0 alone looks
    assert steps_under(folder) == [4, 8] and (folder / "8.damaged").exists()
    np.testing.assert_allclose(load_params(folder)[0]["w"], want["w"], rtol=1e-5)


def test_a_checkpoint_that_was_not_finished_does_not_count_and_is_removed(run, two_steps):
    folder, _, abstract = two_steps
    copied(folder, run)
    (run / "2" / "commit_success.txt").unlink()
    assert load_params(run)[1]["step"] == 1
    with pytest.raises(CheckpointMissing, match=r"no checkpoint of step 2 under .*there are \[1\]"):
        load_params(run, 2)
    saved = Checkpoints(run, keep=2)
    assert int(saved.restore(saved.latest(), abstract).step) == 1
    saved.save(2, two_steps[1], {"step": "again"}, 1.0)
    saved.wait()
    saved.close()
    assert load_params(run)[1]["step"] == "again"


def test_a_damaged_checkpoint_is_set_aside_and_stays_there(run, two_steps, caplog):
    folder, _, abstract = two_steps
    copied(folder, run)
    (damaged,) = (run / "2" / "params" / "d").iterdir()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointDamaged, match=rf"2 is damaged: params/d/.*{len(content) - 1} bytes in place"
    ):
        load_params(run)
    for _ in range(2):
        saved = Checkpoints(run, keep=2)
        assert int(saved.restore(saved.latest(), abstract).step) == 1
        saved.close()
    assert caplog.text.count("is damaged: ") == 1 and f"{run / '2'} is damaged" in caplog.text
    assert (run / "2.damaged" / damaged.relative_to(run / "2")).read_bytes() == content[:-1]


def test_a_listing_is_never_an_old_one(run):
    """gcsfs caches listings by default, but TensorStore and other processes write files too."""
    (run / "first").write_text("")
    assert [path.name for path in run.iterdir()] == ["first"]
    bucket, _, name = str(run).removeprefix("gs://").partition("/")
    store = ts.KvStore.open({"driver": "gcs", "bucket": bucket, "path": f"{name}/"}).result()
    store.write("second", b"").result()
    assert sorted(path.name for path in run.iterdir()) == ["first", "second"]


def test_logs_pictures_and_traces(run):
    log = Log(run, "toy", 0, 4, 8, 1e6).open()
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0 / step}, "")
    log.sync()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    log.close()
    plot_curves(run, run / "curves.png", "toy")
    save_png(Image.new("RGB", (8, 8)), run / "previews" / "black.png")
    for name in ("curves.png", "previews/black.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    loop(Profile(StepRange(2, 3), run), 1, 4)
    traces = [path.name for path in files(run / "profile" / "process_0")]
    assert any(name.endswith(".xplane.pb") for name in traces) and "perfetto_trace.json.gz" in traces


def test_an_object_grows_by_being_written_again_less_often_the_longer_that_takes(run, monkeypatch):
    now, path = [0.0], run / "lines"
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = AppendFile(path, b"0")
    write = type(path).write_bytes

    def slow_write(path, content):
        now[0] += 1.0
        write(path, content)

    monkeypatch.setattr(type(path), "write_bytes", slow_write)
    for second in range(60):
        now[0] = second * 1.0
        file.write(b"1")
        file.flush()
    assert path.read_bytes() == b"0" + 43 * b"1"  # at 0, 21 and 42 s: a twentieth of the time
    file.flush(now=True)
    assert path.read_bytes() == b"0" + 60 * b"1"


@pytest.mark.parametrize("url", ["s3://bucket/run", "az://bucket/run", "memory://run"])
def test_urls_that_orbax_does_not_write_to_are_refused_at_the_start(url):
    with pytest.raises(ValueError, match=rf"--workdir={url}: Orbax keeps checkpoints in .* Mount the bucket"):
        check_storage(url, "--workdir")


def test_a_missing_package_is_named(bucket, monkeypatch):
    check_storage(f"{bucket}/run", "--workdir")
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(ValueError, match="--workdir=gs://bucket/run: gs:// needs gcsfs"):
        check_storage("gs://bucket/run", "--workdir")


def test_train_py_and_its_stages_write_to_a_bucket(run, digits_dir):
    """Train a tokenizer with all its previews, with the programs of the tiny run."""
    config = tiny_config(digits_dir, steps=2)
    config.stages = ("tokenizer",)
    stages.run(config, run)
    assert (run / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (run / "tokenizer" / "previews").iterdir()] != []
    assert load_config(run / "tokenizer" / "checkpoints")[0] == 2
