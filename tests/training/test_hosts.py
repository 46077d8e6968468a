"""Runs on several hosts, as processes on loopback with two devices each."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest

from tests.helpers.commands import REPOSITORY
from tests.helpers.hosts import ended, start
from tests.helpers.tiny import tiny_config
from var_jax import cli
from var_jax.data.loader import batch_indices
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.training.checkpoint import load_params
from var_jax.training.metrics import read_metrics

STEPS, BATCH = 40, 40  # more than an epoch of 1442 images
TOY = ("-m", "tests.helpers.toy_run", f"--steps={STEPS}", f"--batch={BATCH}")
CLOSE = 1e-5  # sums over devices in another order


@pytest.fixture(scope="module")
def start_toy(digits_dir):
    return lambda processes, workdir, *extra, **fields: start(
        processes, workdir, *TOY, f"--data_dir={digits_dir}", *extra, **fields
    )


def losses(workdir, stage="toy") -> dict[int, float]:
    lines = read_metrics(workdir / stage / "metrics.jsonl")  # bears a line that is being written
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def wait_for_step(processes, workdir, step) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), ended(processes, 5)
        if step in losses(workdir):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


def fed(workdir, processes: int) -> dict[int, list[int]]:
    """Return the checksums of the images fed to each step by a number of processes, in order."""
    result = {}
    for i in range(processes):
        for step, images in read_metrics(workdir / "fed" / f"{i}_of_{processes}.jsonl"):
            result.setdefault(step, {})[i] = images
    whole = {step: parts for step, parts in result.items() if len(parts) == processes}
    return {step: [image for i in range(processes) for image in parts[i]] for step, parts in whole.items()}


def test_preempted_on_two_hosts_killed_on_four_done_on_one_equals_unbroken(start_toy, digits_dir, tmp_path):
    start = start_toy
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    alone = start(1, whole)
    # SIGTERM to one of two: both save the same step.
    hosts = start(2, broken, "--pause=0.1")
    wait_for_step(hosts, broken, 7)
    hosts[1].send_signal(signal.SIGTERM)
    result = ended(hosts, within=60)
    pattern = r"toy: stopped at step (\d+), saved; run the same command again"
    words = [re.search(pattern, err) for _, _, err in result]
    assert [code for code, _, _ in result] == [1, 1] and all(words), result
    assert words[0][1] == words[1][1]
    assert result[0][1].count(" train ") >= 7 and "toy" not in result[1][1]  # process 0 alone speaks
    stopped = int(words[0][1])
    # SIGKILL to one of four: the others leave, none with 0.
    hosts = start(4, broken, "--pause=0.1")
    wait_for_step(hosts, broken, stopped + 8)
    killed = time.monotonic()
    hosts[2].send_signal(signal.SIGKILL)
    result = ended(hosts, within=60)
    print(f"{time.monotonic() - killed:.0f} s after the kill all had left: {[code for code, _, _ in result]}")
    assert all(code != 0 for code, _, _ in result)
    assert f"steps {stopped}..{STEPS}, 8 x" in result[0][1]
    # One goes on with two devices, from the last checkpoint that the four wrote.
    ((code, out, err),) = ended(start(1, broken), within=100)
    assert code == 0, err[-2000:]
    went_on = int(re.search(r"steps (\d+)\.\.", out)[1])
    assert went_on % 5 == 0 and stopped < went_on
    assert ended(alone, within=100)[0][0] == 0
    got, want = losses(broken), losses(whole)
    assert sorted(got) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([got[i] for i in sorted(got)], [want[i] for i in sorted(want)], rtol=CLOSE)
    got, want = (load_params(folder / "toy" / "checkpoints")[0] for folder in (broken, whole))
    np.testing.assert_allclose(got["w"], want["w"], rtol=CLOSE)
    # Of the steps that came to stay, every image of the epoch once, and then those of the next.
    two, four, one = (fed(broken, processes) for processes in (2, 4, 1))
    steps = range(1, STEPS + 1)
    stayed = [two[i] if i <= stopped else four[i] if i <= went_on else one[i] for i in steps]
    assert stayed == [fed(whole, 1)[i] for i in steps]
    source, pixels = open_source("digits", "train", digits_dir), ToPixels("digits", 8, 1.0, False)
    images = [zlib.crc32(pixels(source[i])["image"]) for i in range(len(source))]
    seed = tiny_config(digits_dir).next_scale.seed
    assert stayed == [[images[j] for j in batch_indices(len(source), BATCH, seed, i - 1)] for i in steps]
    assert sorted(np.ravel(stayed)[: len(source)]) == sorted(images)


@pytest.fixture(scope="module")
def next_scale_flags(tiny_run, digits_dir, tmp_path_factory) -> tuple[str, ...]:
    """Return the flags of train.py for three steps of the transformer."""
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(
        "from tests.helpers.tiny import tiny_config\n"
        f"def get_config(): return tiny_config({str(digits_dir)!r}, steps=3, every=3)\n"
    )
    stage = ("--config.stages=next_scale", f"--config.next_scale.tokenizer={tiny_run}")
    return (f"--config={config}", *stage)


def test_the_networks_learn_on_two_hosts_as_on_one(next_scale_flags, tmp_path):
    """Run train.py on two hosts that see different amounts of memory, each of its own devices only."""
    commands = {1: ("train.py",), 2: ("-m", "tests.helpers.uneven_memory")}
    flags = {1: (*next_scale_flags, "--config.next_scale.train.preview_every=0"), 2: next_scale_flags}
    result = [
        host
        for n, command in commands.items()
        for host in ended(start(n, tmp_path / str(n), *command, *flags[n]), within=900)
    ]
    assert [code for code, _, _ in result] == [0, 0, 0], result[1][2][-2000:] + result[2][2][-2000:]
    assert ["next_scale train" in out for _, out, _ in result] == [True, True, False]
    assert "remat none" in result[0][1] and "remat full" in result[1][1]  # for the smaller of the two
    want, got = (losses(tmp_path / str(n), "next_scale") for n in (1, 2))
    assert sorted(got) == [1, 2, 3]
    np.testing.assert_allclose([got[i] for i in sorted(got)], [want[i] for i in sorted(want)], rtol=CLOSE)
    assert (tmp_path / "2" / "samples.png").exists()


def test_hosts_that_would_run_different_programs_are_refused(next_scale_flags, tmp_path):
    remat = lambda i: ("--config.next_scale.transformer.remat=full",) if i else ()
    result = ended(start(2, tmp_path, "train.py", *next_scale_flags, own=remat), within=900)
    assert [code for code, _, _ in result] == [1, 1]
    for _, _, err in result:
        assert "train.py: the hosts would run different programs" in err, err[-2000:]
        choices = "dtype float32, attention grouped, remat none, layers scanned"
        assert re.search(rf"process 0, \S+: {choices}, jax [\d.]+\n", err)
        assert re.search(r"process 1, \S+: .* remat full, .* <- differs from process 0", err)
        assert "Traceback" not in err
    assert not (tmp_path / "next_scale" / "metrics.jsonl").exists()


def test_hosts_that_do_not_share_a_file_system_are_refused(start_toy, tmp_path):
    local = lambda i: ("--file_timeout=1", f"--workdir={tmp_path}/{i}")
    result = ended(start_toy(2, tmp_path, own=local), within=120)
    assert all(code == 1 for code, _, _ in result)
    for _, _, err in result:
        assert re.search(r"the hosts do not share --workdir: process 1 \(\S+\) cannot see a file", err), err


def test_a_failure_on_one_host_ends_all(start_toy, tmp_path):
    hosts = start_toy(2, tmp_path, "--pause=0.1", "--fails_at=3")
    began = time.monotonic()
    result = ended(hosts, within=60)
    print(f"all had left after {time.monotonic() - began:.0f} s")
    assert all(code != 0 for code, _, _ in result)
    assert "the cosmic ray" in result[1][2]


def test_a_full_disk_ends_several_hosts_and_loses_nothing(start_toy, small_disk):
    """Hosts do not know of each other's disks, so the first checkpoint that fails ends the run."""
    run = lambda processes, *extra: start_toy(processes, small_disk, "--ballast=200000", *extra)
    result = ended(run(2, "--pause=0.1", "--full_at=8"), within=120)
    assert all(code != 0 for code, _, _ in result)
    message = "".join(err for _, _, err in result)
    assert "could not be written under" in message and "last complete one is of step 5" in message, message[
        -3000:
    ]
    (small_disk / "filler").unlink()
    ((code, out, err),) = ended(run(1), within=100)
    assert code == 0, err[-2000:]
    assert "steps 5.." in out


def test_hosts_that_do_not_find_each_other_say_what_to_check(monkeypatch):
    given = types.SimpleNamespace(coordinator="far:1", num_processes=2, process_id=1, host_timeout=9)
    monkeypatch.setattr(cli, "FLAGS", given)

    def initialize(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(cli.jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match="DEADLINE_EXCEEDED\n  Check that(.|\n)*address far:1 is reachable"):
        cli.initialize_distributed()


JOIN = """
import jax
from absl import app
from var_jax.cli import define_host_flags, initialize_distributed
define_host_flags()
def main(_):
    initialize_distributed()
    print(jax.distributed.is_initialized(), jax.process_count())
app.run(main)
"""


@pytest.mark.parametrize("inside", [True, False])
def test_a_cluster_that_jax_knows_is_joined_without_flags_and_none_is_missed(inside):
    """Join a SLURM job of one task; and train alone in a plain shell, without a cluster."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = dict.fromkeys(["NTASKS", "JOB_ID"], "1") | dict.fromkeys(["PROCID", "LOCALID"], "0")
    slurm |= {"STEP_NODELIST": "localhost", "STEP_NUM_TASKS": "1", "JOB_NUM_NODES": "1"}
    cluster = {f"SLURM_{name}": value for name, value in slurm.items()} | {"JAX_COORDINATOR_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=REPOSITORY,
        env={**os.environ, **(cluster if inside else {})},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == [str(inside), "1"], done.stderr[-2000:]
