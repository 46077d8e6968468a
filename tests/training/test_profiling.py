"""Profiler traces: their steps, also across a resume, and invalid flags."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.commands import command
from tests.helpers.tiny import tiny_config
from var_jax.stages import run
from var_jax.training.profiling import EVENT, Profile, StepRange, parse_steps


def traced_steps(directory) -> list[list[int]]:
    """Return the steps in each trace of a stage, the oldest trace first."""
    result = []
    for path in sorted(directory.glob("profile/process_0/plugins/profile/*/perfetto_trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        result.append([int(e["args"]["step_num"]) for e in events if e.get("name") == EVENT])
        assert list(path.parent.glob("*.xplane.pb"))  # what XProf reads
    return result


def loop(profile: Profile, first: int, last: int) -> None:
    """Take steps as the training loop does."""
    state, step_fn = jnp.zeros(()), jax.jit(lambda x: x + 1)
    with profile:
        for step in range(first, last + 1):
            with profile.step(step, before=state):
                state = step_fn(state)
            profile.end(step, after=state)


def test_a_run_resumed_within_the_steps_traces_the_rest_of_them(tmp_path):
    loop(Profile(StepRange(2, 4), tmp_path), 1, 2)  # stopped after step 2
    assert traced_steps(tmp_path) == [[2]]
    (oldest,) = tmp_path.glob("profile/process_0/plugins/profile/*")
    oldest.rename(oldest.with_name("0"))  # traces are named by the second
    loop(Profile(StepRange(2, 4), tmp_path), 3, 9)
    assert traced_steps(tmp_path) == [[2], [3, 4]]
    loop(Profile(StepRange(2, 4), tmp_path), 5, 9)
    loop(Profile(None, tmp_path), 1, 9)
    assert traced_steps(tmp_path) == [[2], [3, 4]]


def test_training_leaves_a_trace(tiny_run, digits_dir, tmp_path):
    stage = tiny_config(digits_dir, steps=2).next_scale  # as in the tiny run, whose programs are compiled
    stage.tokenizer = str(tiny_run)
    run(stage, tmp_path, parse_steps("2:2"))
    assert traced_steps(tmp_path / "next_scale") == [[2]]


@pytest.mark.parametrize("text", ["", "3", "0:2", "4:3", "a:b", "1:2:3", "-1:2"])
def test_what_names_no_steps_is_refused(text):
    with pytest.raises(ValueError, match="must be START:STOP"):
        parse_steps(text)


def test_steps_that_a_stage_does_not_have_are_refused_before_it_trains(digits_dir, tmp_path):
    with pytest.raises(ValueError, match="--profile=3:7: the stage tokenizer ends with step 6"):
        run(tiny_config(digits_dir, steps=6), tmp_path, parse_steps("3:7"))
    assert not list(tmp_path.iterdir())


def test_the_flag_is_checked_first(tmp_path):
    done = command("train.py", "--config=configs/digits.py", f"--workdir={tmp_path}/run", "--profile=5")
    assert done.returncode != 0 and "--profile=5: must be START:STOP" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
