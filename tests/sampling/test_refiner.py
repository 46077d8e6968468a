"""Collaborative decoding: the first maps of one transformer, the others of a second one."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

import var_jax
from tests.helpers.arrays import close, randomized
from var_jax import cli
from var_jax.errors import ConfigError
from var_jax.sampling import auto_batch_size
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import KnownTokens, generate
from var_jax.transformer.next_scale import NextScale

LABELS = [0, 1, 2, 3]
# The unconditional half ends with the drafted maps, or never.
GUIDANCE = {"drafted": [0.0, 3.0, 0.0], "all": [3.0] * 3}


@pytest.fixture(scope="module")
def models(tiny_tokenizer, tiny_var) -> tuple[var_jax.LoadedVAR, var_jax.LoadedVAR]:
    """Two models of one tokenizer: the tiny one, and one of a single block with other parameters."""
    tokenizer, options = var_jax.LoadedTokenizer(*tiny_tokenizer), SamplingOptions()
    small = NextScale(dataclasses.replace(tiny_var[0].config, depth=1))
    shapes = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, 20, 4)))
    params = randomized(shapes["params"], 9)
    return tuple(var_jax.LoadedVAR(*model, options, tokenizer) for model in (tiny_var, (small, params)))


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_a_refiner_equal_to_the_drafter_changes_nothing(models, guidance):
    """One pass over two maps sums in another order than two steps, so images are equal to rounding."""
    model = models[0]
    options = dict(seed=1, guidance=guidance, return_tokens=True)
    images, tokens = model.sample(LABELS, **options)
    refined_images, refined_tokens = model.with_refiner(model, 2).sample(LABELS, **options)
    np.testing.assert_array_equal(refined_tokens, tokens)
    close(refined_images, images, 1e-5)


def test_the_cache_of_one_pass_is_that_of_the_steps(tiny_var):
    module = tiny_var[0].clone(scan_layers=False)
    inputs = jax.random.normal(jax.random.key(0), (3, 4, 4))

    @jax.jit
    def both(params):
        apply = lambda *args, method: module.apply({"params": params}, *args, method=method)
        condition = apply(jnp.array([0, 5, 3]), method="condition")
        _, cache = apply(0, None, condition, apply(3, method="empty_cache"), method="step")
        _, cache = apply(1, inputs, condition, cache, method="step")
        return apply(inputs, condition, method="prefill"), cache

    prefilled, stepped = both(module.own_layout(tiny_var[1]))
    jax.tree.map(lambda got, want: close(got, want, 1e-5), prefilled, stepped)
    assert all(np.abs(leaf[:, :, :5]).min() > 0 for leaf in jax.tree.leaves(stepped))


def test_the_cache_of_the_drafter_holds_the_drafted_maps_alone(models):
    pair = models[0].with_refiner(models[1], 2)
    cfg = pair.module.config
    per_scale = dataclasses.replace(pair.options, guidance=0.0).per_scale(cfg.schedule, cfg.num_codes)
    keys = jax.random.split(jax.random.key(0), 4)
    written = re.findall(
        r":f32\[\d,4,(\d+),4,8\] = dynamic_update_slice",
        str(jax.make_jaxpr(generate)(pair.networks, jnp.array(LABELS), keys, per_scale)),
    )
    # Keys and values: of the drafter's two maps; then of the draft, at once, and of the refiner's map.
    assert written == ["5"] * 4 + ["21"] * 4


@pytest.mark.parametrize("pair", ["causal, causal", "causal, markov", "markov, causal"])
def test_each_model_samples_its_own_maps(models, pair):
    """Greedy tokens are the likeliest of the logits of their model after all earlier tokens."""
    drafter, refiner = models
    config = dataclasses.replace(refiner.module.config, mask="block_diagonal")
    markov = var_jax.LoadedVAR(
        refiner.module.clone(config=config), refiner.params, refiner.options, refiner.tokenizer
    )
    pairs = {"causal, causal": (drafter, refiner, 1)}
    pairs |= {"causal, markov": (drafter, markov, 2), "markov, causal": (markov, drafter, 2)}
    first, second, num_drafted = pairs[pair]
    greedy = dict(guidance=0.0, top_k=1, return_tokens=True)
    _, tokens = first.with_refiner(second, num_drafted).sample(LABELS, **greedy)
    drafted, refined = (model.logits(tokens, LABELS).argmax(-1) for model in (first, second))
    end = [1, 5][num_drafted - 1]
    np.testing.assert_array_equal(tokens, np.concatenate([drafted[:, :end], refined[:, end:]], axis=1))
    assert (tokens != drafted).any()


def test_known_tokens_stay_and_reach_the_refiner(models):
    pair = models[0].with_refiner(models[1], 2)
    _, tokens = pair.sample(LABELS, return_tokens=True)
    _, varied = pair.vary(tokens, 1, labels=LABELS, seed=5, return_tokens=True)
    np.testing.assert_array_equal(varied[:, :1], tokens[:, :1])
    assert (varied != tokens).any(axis=1).all()
    # All drafted maps known: the refiner's own seed gives its own tokens again.
    known = KnownTokens(tokens, np.broadcast_to(np.arange(21) >= 5, tokens.shape))
    (result,) = pair.generate_batches(LABELS, 0, 4, pair.options, known=known)
    np.testing.assert_array_equal(result[1], tokens)


def test_pairs_are_the_same_on_eight_devices(models):
    pair = models[0].with_refiner(models[1], 2)
    _, tokens = pair.sample(LABELS, return_tokens=True)
    _, replicated = pair.replicate().sample(LABELS, return_tokens=True)
    np.testing.assert_array_equal(replicated, tokens)


def test_models_that_do_not_fit_are_refused(models, tiny_tokenizer):
    drafter, refiner = models
    other = var_jax.LoadedTokenizer(tiny_tokenizer[0], jax.tree.map(lambda x: x + 1, tiny_tokenizer[1]))
    stranger = var_jax.LoadedVAR(refiner.module, refiner.params, refiner.options, other)
    with pytest.raises(ValueError, match=r"must predict tokens of one tokenizer, got \w{8} and \w{8}"):
        drafter.with_refiner(stranger, 1)
    config = dataclasses.replace(refiner.module.config, num_classes=4)
    fewer = var_jax.LoadedVAR(NextScale(config), refiner.params, refiner.options, refiner.tokenizer)
    with pytest.raises(ValueError, match="must have the same classes, got 5 and 4"):
        drafter.with_refiner(fewer, 1)
    for draft_scales in (0, 3):
        with pytest.raises(
            ValueError, match=f"draft_scales must be a whole number in 1 .. 2, got {draft_scales}"
        ):
            drafter.with_refiner(refiner, draft_scales)
    with pytest.raises(ValueError, match="stream samples with one model"):
        drafter.with_refiner(refiner, 1).stream(LABELS)


def test_the_flags_name_a_refiner(tiny_run, monkeypatch):
    model = var_jax.load_var(tiny_run)
    flags = SimpleNamespace(refiner=str(tiny_run), draft_scales=None, dtype="auto", seed=0)
    monkeypatch.setattr(cli, "FLAGS", flags)
    with pytest.raises(app.UsageError, match="give both --refiner and --draft_scales"):
        cli.with_refiner(model)
    flags.draft_scales = 2
    pair = cli.with_refiner(model)
    assert pair.draft_scales == 2 and pair.refiner.depth == 2
    alone, both = (cli.job(m, np.array([0]), m.options) for m in (model, pair))
    assert both == alone | {"refiner": alone["transformer"], "draft_scales": 2}  # not resumed as one another
    flags.draft_scales = 3
    with pytest.raises(ConfigError, match="--refiner: draft_scales must be a whole number in 1 .. 2, got 3"):
        cli.with_refiner(model)


def test_the_batch_fits_both_models(models, tiny_tokenizer, monkeypatch):
    small = models[1].module
    large = small.clone(config=dataclasses.replace(small.config, depth=16))
    per_scale = SamplingOptions().per_scale(large.config.schedule, 16)
    monkeypatch.setattr(auto_batch_size, "free_bytes", lambda device: 2**22)
    batch = lambda *model: auto_batch_size.largest_batch(
        tiny_tokenizer[0], model[0], per_scale, 10**4, *model[1:]
    )
    assert batch(small) > batch(large) == batch(small, large) == batch(large, small)


# --- Best of several


def test_the_best_of_several_images_has_the_highest_score(models):
    model, calls = models[1], []

    def brightness(images, labels):
        calls.append(labels.tolist())
        return images.mean((1, 2, 3))

    images, scores = model.best_of([3, 1], brightness, 3, seed=7, batch=4)
    assert calls == [[3, 3, 3, 1], [1, 1]]
    drawn = model.sample([3, 3, 3, 1, 1, 1], seed=7, batch=4)
    means = drawn.mean((1, 2, 3)).reshape(2, 3)
    np.testing.assert_array_equal(scores, means.max(1))
    np.testing.assert_array_equal(images, drawn[[means[0].argmax(), 3 + means[1].argmax()]])
    with pytest.raises(ValueError, match="score must return a number for each of 4 images"):
        model.best_of([3, 1], lambda images, labels: np.zeros(2), 3, seed=7, batch=4)
