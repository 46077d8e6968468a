"""Prompts and embeddings at the public API: images of texts, and errors that say what to give."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

import var_jax
from tests.helpers.arrays import close, randomized
from var_jax import cli
from var_jax.api import LoadedTokenizer, LoadedVAR
from var_jax.app import drawing
from var_jax.app.device import Device
from var_jax.errors import ConfigError
from var_jax.interop.exported import write_exported
from var_jax.sampling.auto_batch_size import bytes_per_image
from var_jax.sampling.options import SamplingOptions
from var_jax.tools.convert import check_expressible
from var_jax.training.param_init import match_params
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale

WORDS = ("a", "blue", "red", "star")
CAPTION = dict(condition="caption", condition_length=3, vocabulary=WORDS, text_depth=1)


def load(tiny_tokenizer, tiny_var, **fields) -> LoadedVAR:
    """The tiny transformer on other conditions, with random parameters."""
    module = NextScale(dataclasses.replace(tiny_var[0].config, **fields), scan_layers=False)
    scanned = module.clone(scan_layers=True)
    blank = module.config.null_conditions(1), jnp.zeros((1, 20, 4))
    params = randomized(jax.eval_shape(scanned.init, jax.random.key(0), *blank)["params"], 1)
    return LoadedVAR(module, module.own_layout(params), SamplingOptions(), LoadedTokenizer(*tiny_tokenizer))


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tiny_var):
    return load(tiny_tokenizer, tiny_var, **CAPTION)


@pytest.fixture(scope="module")
def embedded(tiny_tokenizer, tiny_var):
    return load(tiny_tokenizer, tiny_var, condition="embedding", condition_length=3, condition_width=2)


def test_greedy_images_of_prompts_are_the_likeliest_tokens_of_teacher_forcing(model, tmp_path):
    """The second of three maps is guided, and its tokens are those of both logits."""
    options = dict(guidance=(0.0, 2.0, 0.0), top_k=1, top_p=0.0, return_tokens=True)
    prompts = ["A red star!", "blue"]
    images, tokens = model.generate(prompt=prompts, **options)
    assert images.shape == (2, 8, 8, 3) and images.min() >= 0 and np.abs(images[0] - images[1]).max() > 0.01
    conditional, unconditional = model.logits(tokens, prompt=prompts), model.logits(tokens)
    t = np.array([0.0, 2.0, 0.0])[model.module.config.schedule.levels][:, None]
    np.testing.assert_array_equal(((1 + t) * conditional - t * unconditional).argmax(-1), tokens)
    assert (conditional.argmax(-1) != tokens)[:, 1:5].any()

    networks = {
        "tokenizer": (model.tokenizer.module.config, model.tokenizer.params),
        "next_scale": (model.module.config, model.checkpoint_params),
    }
    write_exported(tmp_path, networks, model.options, (), {}, jnp.float32)
    again = var_jax.load_var(tmp_path)
    assert again.module.config == model.module.config
    close(again.logits(tokens, prompt=prompts), conditional, 1e-6)


def test_the_page_draws_prompts_and_looks_into_them(model):
    fields = dict(seed=3.0, count=1, values=(1.0, 1.0, 0, 0.0), per_map=("",) * 4, max_images=4)
    settings = drawing.read_settings(model, " red star ", **fields)
    assert settings.condition == "red star" and drawing.no_condition(model) == ""
    with pytest.raises(ConfigError, match="green"):
        drawing.read_settings(model, "green star", **fields)
    *_, result = drawing.draw(Device(), model, settings)
    options = dataclasses.asdict(settings.options)
    _, tokens = model.sample(prompt="red star", seed=3, return_tokens=True, **options)
    np.testing.assert_array_equal(result.tokens, tokens)
    weights = drawing.attention(Device(), model, result.picture(0, "a star"), 4)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_prompts_become_word_ids(model):
    assert model.conditions(prompt="a red star").tolist() == [[2, 4, 5]]
    assert model.conditions(prompt=["Blue.", None]).tolist() == [[3, 0, 0], [0, 0, 0]]
    assert model.conditions(prompt="red", count=2).tolist() == [[4, 0, 0]] * 2
    assert model.conditions(count=2).tolist() == [[0, 0, 0]] * 2
    for arguments, message in (
        (dict(prompt="a rde star"), "the word 'rde', which no caption .* known are "),
        (dict(prompt="a a a a"), "has 4 words, but the longest caption"),
        (dict(prompt=[]), "at least one"),
        (dict(labels=[0]), "this model was trained on captions: give prompt=; got labels"),
        (dict(), "this model was trained on captions: give prompt=; got nothing"),
        (dict(prompt="red", labels=[0]), "give prompt=; got labels and prompt"),
        (dict(prompt=["red"], count=2), "got 2 images and 1 prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            model.conditions(**arguments)
    with pytest.raises(ValueError, match="trained on captions: give prompt="):
        model.generate([0, 1])
    with pytest.raises(ValueError, match="trained on captions: give prompt=, not labels"):
        model.check_labels([0])
    for ids in ([[9, 0, 0]], [[-1, 0, 0]]):
        with pytest.raises(ValueError, match=r"word ids must be in 0 .. 5, got"):
            model.generate_batches(np.array(ids), 0, 1, model.options)


def test_embeddings_and_labels_are_told_from_prompts(embedded, tiny_tokenizer, tiny_var):
    conditions = embedded.conditions(embeddings=np.ones((2, 1, 2)))
    assert conditions.dtype == np.float32 and conditions.shape == (2, 1, 2)
    assert not embedded.conditions(count=2).any()
    with pytest.raises(
        ValueError, match=r"conditioned on embeddings, float32 \[B, up to 3, 2\]; got float64"
    ):
        embedded.conditions(embeddings=np.ones((2, 1, 3)))
    with pytest.raises(ValueError, match="must be finite"):
        embedded.conditions(embeddings=np.full((1, 1, 2), np.nan))
    labelled = LoadedVAR(*tiny_var, SamplingOptions(), embedded.tokenizer)
    with pytest.raises(ValueError, match="this model was trained on labels: give labels=; got prompt"):
        labelled.sample(prompt="a red star")
    with pytest.raises(ValueError, match="must take the same conditions, but their condition differs"):
        labelled.with_refiner(embedded, 1)


def test_commands_take_captions_and_name_models_of_other_kinds(model, embedded, monkeypatch):
    flags = lambda *words: {"label": types.SimpleNamespace(value=list(words))}
    monkeypatch.setattr(cli, "FLAGS", flags("a red", " star"))
    assert cli.condition(model, "label", 2) == {"prompt": ["a red, star"] * 2}
    monkeypatch.setattr(cli, "FLAGS", flags("rde"))
    with pytest.raises(app.UsageError, match="--label: the prompt 'rde' has the word"):
        cli.condition(model, "label", 2)
    monkeypatch.setattr(cli, "FLAGS", flags())
    assert cli.condition(model, "label", 2) == {"prompt": [None, None]}
    assert cli.condition(embedded, "label", 2)["embeddings"].shape == (2, 3, 2)
    with pytest.raises(ConfigError, match="trained on captions, not on classes: sample.py has --prompts"):
        cli.check_classes(model)
    with pytest.raises(ConfigError, match="condition is caption, must be label"):
        check_expressible(model.module.config)


def test_another_vocabulary_keeps_the_words_that_it_shares(model):
    config, params = model.module.config, model.checkpoint_params
    target = dataclasses.replace(config, vocabulary=("blue", "green", "star"))
    shapes = jax.eval_shape(
        NextScale(target).init, jax.random.key(0), target.null_conditions(1), jnp.zeros((1, 20, 4))
    )["params"]
    values, notes = match_params(params, config, nn.meta.unbox(shapes), target)
    words = values["encoder/word_embedding"]
    assert words.rows.tolist() == [0, 1, 2, 4]
    np.testing.assert_array_equal(words.values, params["encoder"]["word_embedding"][np.array([0, 1, 3, 5])])
    assert len(notes) == 1 and "4 of 5 rows loaded" in notes[0]


def test_samples_of_the_last_release_are_resumed_and_memory_counts_captions(model, tiny_tokenizer, tiny_var):
    assert cli.config_checksum(NextScaleConfig()) == 0xB9EE80EF
    assert cli.config_checksum(model.module.config) != cli.config_checksum(tiny_var[0].config)
    per_scale = model.options.per_scale(model.module.config.schedule, 16)
    size = lambda module: bytes_per_image(tiny_tokenizer[0], module, per_scale)
    assert size(model.module) > size(tiny_var[0])
