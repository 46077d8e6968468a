"""Training on some maps alone: what the loss is of, and that all maps, the default, is the same program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import randomized
from tests.helpers.tiny import tiny_config
from var_jax.errors import ConfigError
from var_jax.sharding import make_mesh
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask


def make_task(tiny_tokenizer, **loss) -> NextScaleTask:
    """Return a task of the tiny config, of 1 + 4 + 16 tokens, without dropout, with a section `loss`."""
    stage = tiny_config("none").next_scale
    stage.model.update(dict(drop_path=0.0, class_dropout_prob=0.0))
    stage.loss.update(loss)
    return NextScaleTask(stage, 6, *tiny_tokenizer, classes=10)


@pytest.fixture(scope="module")
def state(tiny_tokenizer):
    """Return the shapes of a state of the task."""
    task = make_task(tiny_tokenizer)
    mesh = make_mesh(devices=jax.devices()[:1])
    return create_state(task.init, task.optimizer, True, jax.random.key(0), mesh)[1]


@pytest.fixture(scope="module")
def batch() -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (8, 21), dtype=np.int32)
    return {"tokens": tokens, "label": np.arange(8, dtype=np.int32), "valid": np.ones(8, np.float32)}


def test_all_maps_are_the_same_program_as_the_mean_over_all_tokens(tiny_tokenizer, state, batch):
    task = make_task(tiny_tokenizer)

    def mean_over_all_tokens(params, batch, key):
        variables = {"params": task.model.own_layout(params)}
        losses, is_correct = task.model.apply(
            variables, **batch, train=True, rngs={"dropout": key}, method="losses"
        )
        is_correct = is_correct.astype(jnp.float32)
        metrics = {"loss": losses.mean(), "loss_last": losses[:, 5:].mean()}
        metrics |= {"accuracy": is_correct.mean(), "accuracy_last": is_correct[:, 5:].mean()}
        return metrics["loss"], (metrics, ())

    def plain_step(state, frozen, batch, key):
        tokens, inputs = task._tokens(task.training_tokenizer, frozen, batch)
        sequences = {"labels": batch["label"], "tokens": tokens, "inputs": inputs}
        return task.optimize(state, mean_over_all_tokens, sequences, key)

    programs = [
        jax.jit(lambda *inputs, step=step: step(*inputs).state_and_metrics()).lower(
            state, task.frozen, batch, jax.random.key(1)
        )
        for step in (task.train_step, plain_step)
    ]
    assert programs[0].as_text() == programs[1].as_text()


def test_drafter_and_refiner_have_the_losses_of_their_own_maps(tiny_tokenizer, state, batch):
    params, drafter = randomized(state.params), make_task(tiny_tokenizer, upto=2)
    tokens, inputs = drafter._tokens(drafter.tokenizer, drafter.frozen, batch)
    sequences = {"labels": batch["label"], "tokens": tokens, "inputs": inputs}
    losses = jax.jit(drafter.eval_step)(params, drafter.frozen, batch)["losses"] / 8
    step = jax.jit(jax.value_and_grad(drafter._cross_entropy, has_aux=True))
    (loss, (metrics, _)), gradient = step(params, sequences, jax.random.key(0))
    assert float(loss) == float(metrics["loss"]) == pytest.approx(float(losses[:5].mean()), rel=1e-5)
    assert float(metrics["loss_last"]) == pytest.approx(float(losses[5:].mean()), rel=1e-5)
    rows = np.abs(gradient["position_embedding"]).max(1)
    assert rows[:5].min() > 0 == rows[5:].max()
    refiner = make_task(tiny_tokenizer, from_scale=2)
    loss, (metrics, _) = jax.jit(refiner._cross_entropy)(params, sequences, jax.random.key(0))
    assert float(loss) == float(metrics["loss_last"]) == pytest.approx(float(losses[5:].mean()), rel=1e-5)


def test_evaluation_reports_every_map_and_the_loss_of_the_trained_ones(tiny_tokenizer):
    losses = np.repeat([1.0, 2.0, 4.0], [1, 4, 16])
    sums = {"images": 2.0, "losses": 2 * losses, "correct": np.repeat([2.0, 1.0, 0.0], [1, 4, 16])}
    metrics = {
        name: make_task(tiny_tokenizer, **loss).summarize(sums)
        for name, loss in {"all": {}, "drafter": {"upto": 2}, "refiner": {"from_scale": 2}}.items()
    }
    for values in metrics.values():
        assert [values[f"loss_{k}"] for k in range(3)] == [1, 2, 4] and values["loss_last"] == 4
    assert [values["loss"] for values in metrics.values()] == [pytest.approx(73 / 21), 9 / 5, 4]
    assert [values["accuracy"] for values in metrics.values()] == [pytest.approx(3 / 21), 3 / 5, 0]
    bits = {name: values["bits_per_pixel"] for name, values in metrics.items()}
    assert bits["all"] == pytest.approx(73 / np.log(2) / 64) == bits["drafter"] + bits["refiner"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"from_scale": 3}, "config.loss: from_scale must be a map, 0 .. 2; got 3"),
        ({"from_scale": -1}, "config.loss: from_scale must be a map, 0 .. 2; got -1"),
        ({"upto": 4}, "config.loss: upto must be a number of maps, 1 .. 3, or 0 for all; got 4"),
        (
            {"from_scale": 2, "upto": 2},
            "config.loss: upto must be a number of maps, 3 .. 3, or 0 for all; got 2",
        ),
    ],
)
def test_maps_that_are_not_there_are_refused(tiny_tokenizer, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_task(tiny_tokenizer, **fields)
