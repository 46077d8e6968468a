"""Training the transformer from a token cache."""

import json

import jax
import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from tests.helpers.token_cache import CACHE_FLAGS, COMMAND, altered, sources
from var_jax.data.sources import DataSetMissing
from var_jax.data.token_cache import open_token_cache
from var_jax.data.transforms import ToPixels
from var_jax.interop.load import load_tokenizer
from var_jax.sharding import make_mesh
from var_jax.stages import build_task, open_sources, run
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask


@pytest.fixture
def stage(tiny_run, token_cache, tmp_path):
    """Return the stage next_scale on the token cache, without images."""
    stage = tiny_config(tmp_path / "no_images", steps=2).next_scale
    stage.tokenizer, stage.data.tokens = str(tiny_run), str(token_cache)
    stage.data.update({name: CACHE_FLAGS[name] for name in ("resize", "flip", "shift")})
    return stage


def test_tokens_of_other_crops_than_the_config_asks_for_are_refused(stage, tmp_path):
    stage.data.update(flip=False, resize=1.0, name="flowers")
    with pytest.raises(ValueError) as error:
        run(stage, tmp_path / "run")
    for words in (
        "name: 'flowers' asked for, 'digits' in the cache",
        "flip: False asked",
        "resize: 1.0 asked",
    ):
        assert words in str(error.value)
    assert "shift" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_step_from_the_cache_is_a_step_from_the_same_crops(tiny_run, token_cache, digits_dir, tmp_path):
    task = NextScaleTask(tiny_config(tmp_path).next_scale, 6, *load_tokenizer(tiny_run), classes=10)
    images, (cached, _) = sources(digits_dir)[0], open_token_cache(token_cache)
    transform = ToPixels("digits", 8, CACHE_FLAGS["resize"], CACHE_FLAGS["flip"], CACHE_FLAGS["shift"])
    indices = np.random.default_rng(0).permutation(len(cached))[:16]
    rng = lambda i: np.random.default_rng((CACHE_FLAGS["seed"], i % 1442, i // 1442))
    on_the_fly = [transform(images[i % 1442], rng(i)) for i in indices]
    together = lambda items: jax.tree.map(lambda *leaves: np.stack(leaves), *items)
    batches = together(on_the_fly), together([cached[i] for i in indices])
    assert "image" not in batches[1] and "tokens" not in batches[0]
    make_state, _ = create_state(task.init, task.optimizer, True, jax.random.key(0), make_mesh())
    key = jax.random.key(1)
    step = jax.jit(
        lambda state, batch: task.train_step(state, task.frozen, batch, key).state_and_metrics()[1]
    )
    want, got = (jax.device_get(step(make_state(), batch)) for batch in batches)
    assert want["loss"] > 1 and want["gradient_norm"] > 0
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=1e-6)


def test_a_run_on_tokens_evaluates_and_draws_and_goes_on_with_no_other_cache(stage, token_cache, tmp_path):
    workdir = tmp_path / "run"
    run(stage, workdir)
    lines = [json.loads(line) for line in (workdir / "next_scale" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if line["kind"] == "eval"]
    assert 0 < evaluated["loss"] < 10 and {"loss_0", "loss_2", "accuracy_last"} <= set(evaluated)
    assert (workdir / "samples.png").exists() and (workdir / "scales.png").exists()
    stage.data.tokens = str(altered(token_cache, tmp_path / "moved"))
    run(stage, workdir)  # the same tokens elsewhere: nothing is left to do
    stage.data.tokens = str(altered(token_cache, tmp_path / "other", seed=4))
    with pytest.raises(ValueError, match=r"another config(.|\n)*cache.seed: 3 there, 4 now"):
        run(stage, workdir)


def test_an_epoch_is_a_pass_over_the_images(stage, tmp_path):
    stage.train.update(dict(steps=0, epochs=3))
    _, steps = build_task(stage, tmp_path, open_sources(stage)[0])
    assert steps == 3 * 1442 // 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "00c0ffee"}, "tokenizer: '00c0ffee' there, '[0-9a-f]{8}' now"),
        ({"scales": (1, 3, 4)}, r"scales: \(1, 3, 4\) there, \(1, 2, 4\) now"),
        ({"num_codes": 32}, "num_codes: 32 there, 16 now"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(stage, token_cache, tmp_path, change, message):
    stage.data.tokens = str(altered(token_cache, tmp_path / "other", **change))
    with pytest.raises(ValueError, match=rf"token cache .* is of another tokenizer(.|\n)*{message}"):
        run(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_incomplete_cache_is_refused(stage, token_cache, tmp_path):
    stage.data.tokens = str(altered(token_cache, tmp_path / "begun", complete=False))
    with pytest.raises(DataSetMissing, match=COMMAND):
        run(stage, tmp_path / "run")


def test_a_tokenizer_is_not_trained_on_tokens(digits_dir, token_cache, tmp_path):
    config = tiny_config(digits_dir)
    config.next_scale.data.tokens = str(token_cache)
    with pytest.raises(ValueError, match="comes first here.*--config.stages=next_scale"):
        run(config, tmp_path)
    config.tokenizer.data.tokens = str(token_cache)
    with pytest.raises(ValueError, match="config.data.tokens=.*the stage tokenizer is trained on images"):
        run(config, tmp_path)
