"""Resuming: a run killed anywhere ends in the numbers of an unbroken one; configs that do not match."""

import json
import random
import re
import signal
import time

import chex
import orbax.checkpoint as ocp
import pytest

from tests.helpers.commands import Command
from var_jax.errors import ConfigError
from var_jax.training.metrics import read_metrics
from var_jax.training.resume import check_resume_compatible

STEPS = 12


@pytest.fixture(scope="module")
def launch(digits_dir, tmp_path_factory):
    """Return a function that starts train.py on the tiny config in a process with one device."""
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(
        "from tests.helpers.tiny import tiny_config\n"
        f"def get_config(): return tiny_config({str(digits_dir)!r}, steps={STEPS}, every=3)\n"
    )
    return lambda workdir, *flags: Command("train.py", f"--config={config}", f"--workdir={workdir}", *flags)


def run(process) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def unbroken(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, run(launch(workdir))


def logged(workdir, stage) -> list[dict]:
    """Return the metrics of every logged line, except those of speed."""
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    speeds = ("images_per_s", "tflops", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in speeds} for line in lines]


def trained(workdir, stage) -> list[int]:
    """Return the training steps in the log."""
    lines = read_metrics(workdir / stage / "metrics.jsonl")
    return [line["step"] for line in lines if line["kind"] == "train"]


def final_state(workdir, stage) -> dict:
    """Read the last checkpoint: parameters, moving average, optimizer state and counts."""
    folder = workdir / stage / "checkpoints" / str(STEPS)
    restore = lambda item: ocp.StandardCheckpointer().restore(folder / item)
    return {"params": restore("params"), "state": restore("state")}


def wait_for(happened, process):
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError(f"it never happened: {process.communicate()}")


def wait_for_step(process, workdir, stage, step):
    """Wait until a step of a stage has been logged."""
    wait_for(lambda: step in trained(workdir, stage), process)


def test_stopped_at_random_steps_and_resumed_equals_unbroken(launch, unbroken, tmp_path):
    """Stop the tokenizer with its adversary by SIGTERM, then both stages by SIGKILL."""
    stops = [("tokenizer", signal.SIGTERM), ("tokenizer", signal.SIGKILL), ("next_scale", signal.SIGKILL)]
    for stage, stop in stops:
        first, last = len(trained(tmp_path, stage)) + 1, STEPS // 2 if stop == signal.SIGTERM else STEPS - 2
        step = random.Random(time.time_ns()).randint(first, max(first, last))
        print(f"{stop.name} after step {step} of {stage}")
        process = launch(tmp_path)
        wait_for_step(process, tmp_path, stage, step)
        if stop == signal.SIGTERM:  # the adversary starts after step 3 and gains weight until the end
            wait_for(lambda: (tmp_path / "tokenizer" / "checkpoints" / "6").exists(), process)
        process.send_signal(stop)
        _, err = process.communicate(timeout=600)
        assert process.returncode != 0
        if stop == signal.SIGTERM:
            pattern = rf"{stage}: stopped at step \d+, saved; run the same command again"
            assert re.search(pattern, err), err[-2000:]
    run(launch(tmp_path))
    for stage in ("tokenizer", "next_scale"):
        chex.assert_trees_all_equal(final_state(tmp_path, stage), final_state(unbroken[0], stage))
        assert logged(tmp_path, stage) == logged(unbroken[0], stage)  # the same losses on the same data


def test_done_is_done(launch, unbroken):
    before = logged(unbroken[0], "next_scale")
    out = run(launch(unbroken[0]))
    assert out.count("already trained for 12 steps") == 2
    assert logged(unbroken[0], "next_scale") == before


def test_a_run_leaves_pictures_curves_and_lines_with_rate_and_time_left(unbroken):
    workdir, out = unbroken
    for name in ("reconstructions", "samples", "scales", "curves_tokenizer", "curves_next_scale"):
        assert (workdir / f"{name}.png").stat().st_size > 500
    assert (workdir / "next_scale" / "previews" / f"samples_{STEPS:07d}.png").exists()
    assert re.search(r"tokenizer train +5/12  .*loss [\d.]+.* \d+ images/s  0:\d\d left", out)
    assert list((workdir / "tokenizer" / "tensorboard").glob("events*"))
    evaluated = next(line for line in logged(workdir, "next_scale") if line["kind"] == "eval")
    for name in ("loss", "accuracy"):
        assert {name, f"{name}_last", f"{name}_0", f"{name}_1", f"{name}_2"} <= set(evaluated)
    use = next(line for line in logged(workdir, "tokenizer") if line["kind"] == "eval")
    assert use["most_0"] == 16 and 1 <= use["perplexity_0"] <= use["distinct_0"] <= 16


def test_another_config_is_refused_with_the_fields_named(launch, unbroken):
    process = launch(unbroken[0], "--config.tokenizer.train.batch=32", "--config.tokenizer.model.ch=16")
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    for words in ("config.train.batch: 16 there, 32 now", "config.model.ch: 8 there, 16 now"):
        assert words in err


def test_sampling_does_not_matter_to_a_resumed_run(tmp_path):
    """Runs of before have no temperature."""
    run = lambda **sampling: {"dtype": "float32", "weights": {}, "stage": {"sampling": sampling}}
    saved, now = run(guidance=1.5), run(guidance=2.0, temperature=1.1)
    assert check_resume_compatible(saved, now, tmp_path) == ""


def test_a_run_without_the_section_correction_goes_on_with_strength_0_alone(tmp_path):
    record = lambda **correction: {"stage": {"task": "next_scale", "correction": correction}}
    older, now = {"stage": {"task": "next_scale"}}, record(strength=0.0, source="uniform")
    check_resume_compatible(older, now, tmp_path)
    with pytest.raises(ConfigError, match="config.correction.strength: None there, 0.3 now"):
        check_resume_compatible(older, record(strength=0.3, source="uniform"), tmp_path)


def test_names_of_classes_do_not_matter_to_a_resumed_run(tmp_path):
    now = {"task": "tokenizer", "steps": 4, "dtype": "float32", "weights": {}, "class_names": ["cat", "dog"]}
    older = {name: value for name, value in now.items() if name != "class_names"}
    for saved in (older, {**now, "class_names": []}, {**now, "class_names": ["Cat", "Dog"]}):
        assert check_resume_compatible(saved, now, tmp_path) == ""
    with pytest.raises(ConfigError, match="steps: 3 there, 4 now"):
        check_resume_compatible({**older, "steps": 3}, now, tmp_path)
