"""FID of samples while a transformer trains."""

import json

import numpy as np
import pytest

import var_jax
from tests.helpers.tiny import tiny_config
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError
from var_jax.evaluation.classifier import Classifier
from var_jax.stages import run, sample_scorer
from var_jax.training.checkpoint import load_config
from var_jax.training.trainer import check_training


@pytest.fixture
def stage(tiny_run, digits_dir):
    stage = tiny_config(digits_dir, steps=4).next_scale
    stage.tokenizer = str(tiny_run)
    stage.train.update(fid_every=2, fid_samples=100, best_by="fid", preview_every=0)
    return stage


def test_fid_in_the_log_is_that_of_the_samples_and_selects_the_best_checkpoint(stage, digits_dir, tmp_path):
    run(stage, tmp_path)
    text = (tmp_path / "next_scale" / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "samples"]
    assert [(line["step"], line["num_samples"]) for line in lines] == [(2, 100), (4, 100)]
    best = min(lines, key=lambda line: line["fid"])["step"]
    assert load_config(tmp_path / "next_scale" / "checkpoints", "best")[0] == best

    source, transform = open_source("digits", "train", digits_dir), ToPixels("digits", 8, 1.0, False)
    records = [transform(source[i]) for i in range(len(source))]
    real, labels = (np.stack([record[name] for record in records]) for name in ("image", "label"))
    model = var_jax.load_var(tmp_path, tokenizer=var_jax.load_tokenizer(stage.tokenizer))
    images = model.sample(np.arange(100) % 10, seed=stage.seed)
    expected = Classifier(real, labels).frechet(np.round(images * 255).astype(np.uint8), real)
    np.testing.assert_allclose(lines[1]["fid"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(fid_reference="stats.npz"), "fid_reference needs config.train.fid_inception"),
        (dict(fid_inception="none.pth"), r"fid_inception: .*none\.pth"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_training(stage, digits_dir, fields, message):
    stage.train.update(fields)
    with pytest.raises(ConfigError, match=message):
        sample_scorer(stage, open_source("digits", "train", digits_dir), 8)


def test_a_run_on_tokens_and_images_too_large_for_a_classifier_are_refused(stage, digits_dir):
    source = open_source("digits", "train", digits_dir)
    with pytest.raises(ConfigError, match="1442 images of 512 pixels are too many for a small classifier"):
        sample_scorer(stage, source, 512)
    stage.data.tokens = "cache"
    with pytest.raises(ConfigError, match="config.data.tokens needs reference images"):
        sample_scorer(stage, source, 8)


def test_best_by_fid_needs_scores_at_checkpoints(stage):
    stage.train.checkpoint_every = 4
    with pytest.raises(ConfigError, match="a multiple of train.checkpoint_every=4, got 2"):
        check_training(stage.train)
