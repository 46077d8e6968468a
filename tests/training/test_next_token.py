"""Next-token run from config to samples, by the same loop, checkpoints and API as next-scale."""

import numpy as np
import pytest
from PIL import Image

import var_jax
from configs import next_token
from tests.helpers.tiny import tiny_config
from var_jax import stages
from var_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    config = next_token.flattened(tiny_config(digits_dir, steps=4))
    config.tokenizer.adversarial.weight = 0.0
    config.tokenizer.model.patch = 2  # tokens from pixels: no networks under it
    config.next_token.model.update(dict(order="hilbert", positions="learned_2d+rotary_2d", mask="axial"))
    folder = tmp_path_factory.mktemp("next_token")
    stages.run(config, folder)
    return folder, config


def test_it_trains_logs_and_draws(run):
    folder, _ = run
    log = read_metrics(folder / "next_token" / "metrics.jsonl")
    first, last = [line for line in log if line["kind"] == "eval"], log[-1]
    loss, bits = first[-1]["loss"], first[-1]["bits_per_pixel"]
    assert bits == pytest.approx(loss * 16 / np.log(2) / 64)
    assert not any(name.startswith("loss_") for name in last)
    assert Image.open(folder / "samples.png").width > 300


def test_the_public_api_takes_it(run):
    folder, _ = run
    tokenizer = var_jax.load_tokenizer(folder)
    model = var_jax.load_var(folder, tokenizer=tokenizer)
    assert (tokenizer.scales, model.depth, model.num_classes) == ((4,), 2, 10)
    images, tokens = model.generate([0, 1, 2], guidance=1.0, return_tokens=True)
    assert images.shape == (3, 8, 8, 3) and model.logits(tokens, [0, 1, 2]).shape == (3, 16, 16)
    mask = np.zeros((8, 8), bool)
    mask[4:] = True
    _, again = model.inpaint(images, mask, [0, 1, 2], seed=1, return_tokens=True)
    kept = tokenizer.encode(images).reshape(3, 4, 4)[:, :2]
    np.testing.assert_array_equal(again.reshape(3, 4, 4)[:, :2], kept)


def test_a_done_run_is_not_done_again_and_another_order_is_another_run(run, capfd):
    folder, config = run
    stages.run(config, folder)
    assert "already trained for 4 steps" in capfd.readouterr().out
    config.next_token.model.order = "raster"
    with pytest.raises(ValueError, match="model.order: 'hilbert' there, 'raster' now"):
        stages.run(config, folder)
    config.next_token.model.order = "hilbert"


def test_a_tokenizer_of_several_maps_is_refused(tiny_run, digits_dir, tmp_path):
    stage = next_token.flattened(tiny_config(digits_dir)).next_token
    stage.tokenizer = str(tiny_run)
    with pytest.raises(ValueError, match="needs a tokenizer of one map"):
        stages.run(stage, tmp_path)


def test_configs_of_next_token():
    config = next_token.get_config("d20")
    assert (config.task, config.scales, config.model.depth) == ("next_token", (16,), 20)
    with pytest.raises(ValueError, match="d12, d16, .*digits; got 'd36'"):
        next_token.get_config("d36")
