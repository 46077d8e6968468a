import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.toy import RATE, WIDTH, Toy, toy_stage
from var_jax.data.loader import batch_indices, train_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.training.checkpoint import load_params
from var_jax.training.nan_guard import TrainingDiverged, is_finite, skip_if_not_finite
from var_jax.training.state import TrainState
from var_jax.training.task import StepOutput
from var_jax.training.trainer import train


@pytest.fixture(scope="module")
def sources(digits_dir):
    return tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))


def lines(workdir, kind) -> list[dict]:
    result = [json.loads(line) for line in (workdir / "toy" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in result if line["kind"] == kind]


def expected(source, stage, steps, skipped) -> float:
    """Compute the parameters after following the mean of each batch that is not skipped."""
    batches = train_batches(source, ToPixels("digits", 8, 1.0, False), 16, stage.seed)
    w = 0.0
    for step in range(1, steps + 1):
        mean = next(batches)["image"].mean() / 255
        w -= 0.0 if step in skipped else RATE * 2 / WIDTH * (w - mean)
    return w


def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(sources, digits_dir, tmp_path, capsys):
    stage = toy_stage(digits_dir, every=5, log_every=4)
    train(Toy(bad=(3, 6)), stage, 10, tmp_path, sources)
    params, _ = load_params(tmp_path / "toy" / "checkpoints")
    np.testing.assert_allclose(params["w"], expected(sources[0], stage, 10, {3, 6}), rtol=1e-5)
    result = lines(tmp_path, "skipped")
    assert [line["step"] for line in result] == [3, 6] and all(line["loss"] is None for line in result)
    for line in result:
        want = batch_indices(len(sources[0]), 16, stage.seed, line["step"] - 1)
        assert line["records"] == want.tolist()
    last = lines(tmp_path, "train")[-1]
    assert (last["step"], last["skipped"], last["skipped_in_a_row"]) == (10, 2, 0)
    line_start = "toy skipped: step 3  loss nan  its loss or gradient is not finite; records "
    assert f"{line_start}{result[0]['records'][0]}, " in capsys.readouterr().out


def test_a_run_that_diverges_ends_with_its_last_sound_checkpoint(sources, digits_dir, tmp_path):
    stage = toy_stage(digits_dir, every=3, log_every=1, max_skipped=4)
    with pytest.raises(TrainingDiverged) as error:
        train(Toy(bad=range(8, 100)), stage, 30, tmp_path, sources)
    for words in (
        "last 4 steps, 8 to 11, were skipped",
        "is of step 6",
        str(tmp_path / "toy" / "checkpoints"),
    ):
        assert words in str(error.value)
    kept = sorted(int(path.name) for path in (tmp_path / "toy" / "checkpoints").iterdir())
    assert kept == [3, 6]  # none of step 9
    with pytest.raises(
        TrainingDiverged, match="last 4 steps, 8 to 11"
    ):  # goes on from step 6, to the same end
        train(Toy(bad=range(8, 100)), stage, 30, tmp_path, sources)
    train(Toy(), stage, 30, tmp_path, sources)
    params, _ = load_params(tmp_path / "toy" / "checkpoints")
    np.testing.assert_allclose(params["w"], expected(sources[0], stage, 30, {}), rtol=1e-5)


@pytest.mark.parametrize("max_skipped", [0, 1])
def test_a_run_that_may_skip_no_step_ends_at_the_first(sources, digits_dir, tmp_path, max_skipped):
    stage = toy_stage(digits_dir, every=3, log_every=1, max_skipped=max_skipped)
    train(Toy(), stage, 4, tmp_path / "sound", sources)
    with pytest.raises(TrainingDiverged, match="the last 1 steps, 4 to 4, were skipped(.|\n)*is of step 3"):
        train(Toy(bad=(4,)), stage, 6, tmp_path, sources)
    (line,) = lines(tmp_path, "skipped")
    assert line["step"] == 4


def test_a_spike_is_named_with_its_records_once(sources, digits_dir, tmp_path):
    stage = toy_stage(digits_dir, every=100, log_every=7)
    train(Toy(high=31), stage, 40, tmp_path, sources)
    (spike,) = lines(tmp_path, "spike")
    assert spike["step"] == 31 and spike["loss"] > 90 and 1 <= spike["usual"] < 1.2
    assert spike["records"] == batch_indices(len(sources[0]), 16, stage.seed, 30).tolist()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["loss", "loss_last", "gradient_norm", "discriminator", "discriminator_gradient_norm"]
)
def test_any_loss_or_gradient_that_is_not_finite_keeps_the_state_of_before(name, number):
    zero = jnp.zeros((), jnp.int32)
    old = TrainState(zero + 4, {"w": jnp.ones(2)}, None, (), {}, zero + 2, zero)
    new = old.replace(step=zero + 5, params={"w": jnp.full(2, 7.0)})
    finite = dict.fromkeys(("loss_last", "discriminator", "discriminator_gradient_norm"), 1.0)
    scalars = {"loss": 1.0, "gradient_norm": 1.0}
    output = lambda changed: StepOutput(
        state=new,
        **{key: changed.get(key, value) for key, value in scalars.items()},
        metrics={"perplexity": jnp.inf} | {key: changed.get(key, value) for key, value in finite.items()},
        must_be_finite=tuple(finite),
    )
    state, _ = jax.jit(skip_if_not_finite)(old, output({}))
    assert (state.params["w"][0], state.step, state.skipped, state.skipped_in_a_row) == (7, 5, 2, 0)
    state, metrics = jax.jit(skip_if_not_finite)(old, output({name: number}))
    assert (state.params["w"][0], state.step, state.skipped, state.skipped_in_a_row) == (1, 5, 3, 1)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (3, 1)


def test_a_state_with_a_number_that_is_not_finite_is_told():
    assert is_finite({"a": jnp.ones(3), "n": jnp.zeros((), jnp.int32)})
    assert not is_finite({"a": jnp.ones(3).at[1].set(jnp.inf), "n": jnp.zeros((), jnp.int32)})
