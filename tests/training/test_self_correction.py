"""Self-correction: which tokens are replaced, what follows, and that strength 0 changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close, randomized
from tests.helpers.tiny import tiny_config
from tests.helpers.token_cache import COMMAND, small
from var_jax import stages
from var_jax.data.token_cache import open_token_cache
from var_jax.data.token_writer import make_cache_spec, write_cache
from var_jax.errors import ConfigError
from var_jax.paths import as_path
from var_jax.scales import Scales
from var_jax.sharding import make_mesh
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.training.self_correction import draw_replaced, requantize
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask

SCALES = Scales((1, 2, 4))


@pytest.fixture(scope="module")
def quantizer(tiny_tokenizer) -> Quantizer:
    module, params = tiny_tokenizer
    return Quantizer.create(params["quantizer"], module.config)


@pytest.fixture(scope="module")
def features() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (64, 4, 4, 4))


@pytest.fixture(scope="module")
def drawn() -> tuple[jax.Array, jax.Array]:
    """Return tokens to replace, a fifth of all, and replacements, for the features."""
    mask_key, code_key = jax.random.split(jax.random.key(1))
    return draw_replaced(mask_key, 64, SCALES, 0.4), jax.random.randint(code_key, (64, 21), 0, 16)


def make_task(tiny_tokenizer, **correction) -> NextScaleTask:
    """Return a task of the tiny config that drops no labels and no layers, with a section `correction`."""
    stage = tiny_config("none").next_scale
    stage.model.update(dict(drop_path=0.0, class_dropout_prob=0.0))
    stage.correction.update(correction)
    return NextScaleTask(stage, 6, *tiny_tokenizer, classes=10)


@pytest.fixture(scope="module")
def batch() -> dict:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    return {"image": images, "label": np.arange(16, dtype=np.int32) % 10, "valid": np.ones(16, np.float32)}


def make_state(task):
    return create_state(task.init, task.optimizer, True, jax.random.key(0), one_device())[0]()


def one_device():
    return make_mesh(devices=jax.devices()[:1])


# --- Which tokens


def test_the_share_of_an_image_and_map_is_uniform_between_0_and_the_strength():
    is_replaced = np.asarray(draw_replaced(jax.random.key(0), 20_000, SCALES, 0.4))
    assert is_replaced.shape == (20_000, 21) and is_replaced.mean(0) == pytest.approx(0.2, abs=0.02)
    shares = is_replaced[:, 5:].mean(1)  # of 16 tokens: binomial, of a share that is uniform in [0, s]
    assert shares.var() == pytest.approx((0.4 / 2 - 0.4**2 / 3) / 16 + 0.4**2 / 12, rel=0.03)
    others = is_replaced[:, 1:5].mean(1)
    assert abs(np.corrcoef(shares, others)[0, 1]) < 0.03  # each map has a share of its own
    assert is_replaced[:, 1].astype(float) @ is_replaced[:, 2] / 20_000 == pytest.approx(0.4**2 / 3, rel=0.05)
    assert not draw_replaced(jax.random.key(0), 50, SCALES, 0.0).any()


# --- What follows


def test_where_nothing_is_replaced_tokens_and_sums_are_those_of_the_quantizer(quantizer, features, drawn):
    none = jnp.zeros((64, 21), bool)
    targets, sums = jax.jit(requantize)(quantizer, features, none, drawn[1])
    want = jax.jit(Quantizer.tokenize)(quantizer, features)
    np.testing.assert_array_equal(targets, want)
    np.testing.assert_array_equal(sums, jax.jit(Quantizer.partial_sums)(quantizer, want))


def test_targets_and_sums_equal_a_plain_loop(quantizer, features, drawn):
    is_replaced, replacements = (np.asarray(x) for x in drawn)
    targets, sums = jax.jit(requantize)(quantizer, features, *drawn)
    codes, f_hat = np.asarray(quantizer.codes, np.float64), np.zeros((64, 4, 4, 4))
    for k, (start, side) in enumerate(zip((0, 1, 5), (1, 2, 4), strict=True)):
        residual = np.asarray(features) - f_hat
        fed = np.zeros((64, side, side), int)
        for image, row, column in np.ndindex(fed.shape):
            n = 4 // side
            cell = residual[image, row * n : (row + 1) * n, column * n : (column + 1) * n].mean((0, 1))
            token, position = int(((codes - cell) ** 2).sum(1).argmin()), start + row * side + column
            assert targets[image, position] == token
            replace = is_replaced[image, position]
            fed[image, row, column] = replacements[image, position] if replace else token
        vectors = jnp.asarray(codes[fed], jnp.float32).reshape(64, -1, 4)
        f_hat = f_hat + np.asarray(quantizer.upsample_and_smooth(k, vectors))
        close(sums[k], f_hat, 1e-5)


def test_later_maps_repair_what_was_replaced(features, drawn):
    quantizer = Quantizer(jax.random.normal(jax.random.key(3), (256, 4)), None, None, SCALES)
    replacements = jax.random.randint(jax.random.key(4), (64, 21), 0, 256)
    is_replaced = drawn[0].at[:, 5:].set(False)  # the last map has no map after it
    targets, sums = requantize(quantizer, features, is_replaced, replacements)
    clean = quantizer.tokenize(features)
    not_requantized = quantizer.partial_sums(jnp.where(is_replaced, replacements, clean))[-1]
    sums = {"clean": quantizer.partial_sums(clean)[-1], "repaired": sums[-1], "broken": not_requantized}
    error = {name: float(jnp.mean((f_hat - features) ** 2)) for name, f_hat in sums.items()}
    assert error["clean"] < error["repaired"] < 0.5 * error["broken"]
    np.testing.assert_array_equal(targets[:, 0], clean[:, 0])  # the first map has nothing to repair
    is_intact = ~np.asarray(is_replaced).any(1)
    assert 3 < is_intact.sum() < 60
    np.testing.assert_array_equal(targets[is_intact], clean[is_intact])
    assert (targets[~is_intact, 5:] != clean[~is_intact, 5:]).mean() > 0.2


@pytest.mark.parametrize("source", ["uniform", "model"])
def test_an_image_does_not_depend_on_the_others_of_its_batch(tiny_tokenizer, batch, source):
    task = make_task(tiny_tokenizer, strength=1.0, source=source)
    params = make_state(task).params
    corrected = jax.jit(lambda batch: task._corrected_tokens(params, task.frozen, batch, jax.random.key(2)))
    tokens, inputs = corrected(batch)
    other = dict(batch, image=batch["image"].copy())
    other["image"][1:] = 255 - other["image"][1:]
    other_tokens, other_inputs = corrected(other)
    np.testing.assert_array_equal(other_tokens[0], tokens[0])
    close(other_inputs[0], inputs[0], 1e-6)
    assert (other_tokens[1:] != tokens[1:]).any()


def test_replacements_of_the_model_are_drawn_from_its_predictions(tiny_tokenizer):
    task = make_task(tiny_tokenizer, strength=0.3, source="model")
    task.stage.train.grad_accum_steps = 2
    params = randomized(make_state(task).params)  # predictions far from uniform
    labels = jnp.full(4000, 3)
    inputs = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (20, 4)), (4000, 20, 4))
    drawn = jax.jit(task._predicted_tokens)(params, labels, inputs, jax.random.key(1))
    shares = np.asarray(jax.nn.one_hot(drawn, 16).mean(0))
    variables = {"params": task.model.own_layout(params)}
    want = np.asarray(jax.nn.softmax(task.model.apply(variables, labels[:1], inputs[:1])))[0]
    assert want.max() > 0.5
    np.testing.assert_allclose(shares, want, atol=5 * 0.5 / 4000**0.5)
    assert (drawn[:2000] != drawn[2000:]).any()  # microbatches have keys of their own


# --- In training


def test_strength_0_is_the_same_program_as_training_on_the_tokens(tiny_tokenizer, batch):
    task = make_task(tiny_tokenizer)
    state, key = make_state(task), jax.random.key(1)

    def plain_step(state, frozen, batch, key):
        tokens, inputs = task._tokens(task.training_tokenizer, frozen, batch)
        return task.train_on_tokens(state, batch["label"], tokens, inputs, key)

    programs = [
        jax.jit(lambda *inputs, step=step: step(*inputs).state_and_metrics()).lower(
            state, task.frozen, batch, key
        )
        for step in (task.train_step, plain_step)
    ]
    assert programs[0].as_text() == programs[1].as_text()


def test_a_strength_that_replaces_nothing_has_the_loss_and_gradients_of_strength_0(tiny_tokenizer, batch):
    results = []
    for strength in (0.0, 1e-12, 0.5):
        task = make_task(tiny_tokenizer, strength=strength)
        step = jax.jit(
            lambda state, batch, task=task: task.train_step(state, task.frozen, batch, jax.random.key(1))
        )
        results.append(step(make_state(task), batch))
    zero, tiny, half = results
    assert float(zero.loss) == float(tiny.loss) != float(half.loss)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), zero.state.params, tiny.state.params)
    assert all(jax.tree.leaves(equal)) and float(zero.gradient_norm) == float(tiny.gradient_norm)


def test_evaluation_replaces_nothing(tiny_tokenizer, batch):
    texts = []
    for strength in (0.0, 0.5):
        task = make_task(tiny_tokenizer, strength=strength, source="model")
        texts.append(jax.jit(task.eval_step).lower(make_state(task).params, task.frozen, batch).as_text())
    assert texts[0] == texts[1]


def test_replacements_of_the_model_cost_one_more_forward_pass(tiny_tokenizer):
    flops = {
        source: make_task(tiny_tokenizer, strength=0.3, source=source).flops_per_image()
        for source in ("uniform", "model")
    }
    assert flops["uniform"] == make_task(tiny_tokenizer).flops_per_image()
    assert flops["model"] == pytest.approx(flops["uniform"] * 4 / 3, rel=1e-6)


# --- Token cache


def test_a_cache_with_features_requantizes_as_images_do(tiny_tokenizer, digits_dir, tmp_path):
    spec, parts, encode = small(digits_dir, tiny_tokenizer)
    assert make_spec(tiny_tokenizer, parts, features=False).feature_shape == ()
    spec = dataclasses.replace(
        spec, feature_shape=make_spec(tiny_tokenizer, parts, features=True).feature_shape
    )
    assert spec.layout.itemsize == 4 + 2 * 21 + 2 * 64
    write_cache(as_path(tmp_path), spec, parts, encode, 2, COMMAND)
    cached, held_out = open_token_cache(tmp_path, features=True)
    items = cached.batch(range(16))
    assert items["features"].dtype == np.float16 and "features" not in held_out[0]
    assert "features" not in open_token_cache(tmp_path)[0][0]
    task = make_task(tiny_tokenizer, strength=0.5)
    quantizer = Quantizer.create(tiny_tokenizer[1]["quantizer"], tiny_tokenizer[0].config)
    same = np.asarray(quantizer.tokenize(items["features"])) == items["tokens"]
    assert same.mean() > 0.98  # float16 changes near ties
    corrected = jax.jit(lambda batch: task._corrected_tokens({}, task.frozen, batch, jax.random.key(2)))
    targets, inputs = corrected(items)
    features = jnp.asarray(items["features"], jnp.float32)
    want, _ = corrected(dict(items, features=features))
    np.testing.assert_array_equal(targets, want)
    assert inputs.shape == (16, 20, 4) and (targets != items["tokens"]).mean() > 0.04


def make_spec(tokenizer: tuple, sources: tuple, features: bool):
    """Return the spec that `encode_dataset` makes of the digits."""
    data = tiny_config("none").next_scale.data
    return make_cache_spec(*tokenizer, sources, data, crops=1, seed=0, features=features)


def test_a_cache_without_features_is_refused(tiny_tokenizer, digits_dir, tmp_path):
    spec, parts, encode = small(digits_dir, tiny_tokenizer)
    write_cache(as_path(tmp_path), spec, parts, encode, 2, COMMAND)
    stage = tiny_config("none").next_scale
    stage.data.tokens = str(tmp_path)
    assert len(stages.open_sources(stage)[0]) == 80
    stage.correction.strength = 0.3
    with pytest.raises(
        ConfigError, match="has no features(.|\n)*strength=0, or encode again with --features"
    ):
        stages.open_sources(stage)


# --- Configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.5}, "config.correction: strength must be a share between 0 and 1; got 1.5"),
        ({"strength": -0.1}, "config.correction: strength must be a share between 0 and 1; got -0.1"),
        ({"source": "random"}, "config.correction: source must be one of uniform, model; got 'random'"),
    ],
)
def test_bad_fields_are_refused(tiny_tokenizer, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_task(tiny_tokenizer, **fields)


def test_what_has_no_later_maps_is_refused(tiny_tokenizer, tmp_path):
    module, params = tiny_tokenizer
    one_map = dataclasses.replace(module, config=dataclasses.replace(module.config, scales=(4,)))
    stage = tiny_config("none").next_scale
    stage.correction.strength = 0.3
    with pytest.raises(ConfigError, match="needs a transformer that predicts several maps"):
        NextScaleTask(stage, 6, one_map, params, classes=10)
