"""Guidance-free alignment: the losses against their formulas, the frozen reference, runs from end to end."""

import shutil
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import var_jax
from benchmarks.plan import make_planned_task
from benchmarks.programs import training_programs
from configs import align
from tests.helpers.tiny import tiny_config
from tests.helpers.token_cache import CACHE_FLAGS
from var_jax.data.token_cache import PairedTokenSource
from var_jax.errors import ConfigError
from var_jax.interop.load import load_tokenizer
from var_jax.sharding import global_batch, make_mesh
from var_jax.stages import build_task, open_sources, run
from var_jax.tokenizer.model import fingerprint
from var_jax.tools.sample_tokens import samples_spec, write_samples
from var_jax.training.align_task import AlignTask, contrastive_losses
from var_jax.training.checkpoint import load_params
from var_jax.training.hardware import state_bytes
from var_jax.training.jit_steps import jit_train_step
from var_jax.training.metrics import read_metrics
from var_jax.training.state import create_state
from var_jax.transformer.flops import training_flops

KEY = jax.random.key(3)


def align_stage(source, data_dir, steps=2, **fields):
    """Return the alignment of a tiny run, with changed fields of the section `align`."""
    stage = align.small_data(tiny_config(data_dir, steps).next_scale)
    stage.train.update(dict(steps=steps, batch=16, log_every=1, checkpoint_every=1, eval_every=steps))
    stage.train.preview_every = 0
    stage.tokenizer = stage.init_from = str(source)
    stage.align.update(fields)
    return stage


def on_tokens(stage, token_cache):
    """Let a stage read tokens."""
    stage.data.update({name: CACHE_FLAGS[name] for name in ("resize", "flip", "shift")})
    stage.data.tokens = str(token_cache)
    return stage


@pytest.fixture(scope="module")
def task(tiny_run, digits_dir, tmp_path_factory) -> AlignTask:
    stage = align_stage(tiny_run, digits_dir, beta=0.3, negative_weight=5.0)
    task = build_task(stage, tmp_path_factory.mktemp("none"), open_sources(stage)[0])[0]
    task.frozen = jax.tree.map(jnp.asarray, task.frozen)
    return task


@pytest.fixture(scope="module")
def moved(task) -> dict:
    """Parameters away from the reference."""
    noise = np.random.default_rng(0)
    add = lambda x: x + 0.05 * noise.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(add, task.frozen["reference"])


@pytest.fixture(scope="module")
def batch() -> dict:
    tokens = np.random.default_rng(1).integers(0, 16, (8, 21))
    return {"tokens": jnp.asarray(tokens), "label": jnp.array([0, 1, 1, 2, 3, 4, 5, 6])}


def copy_of(task, drop=0.1) -> AlignTask:
    """Return a copy of a task that drops another share of the labels."""
    stage = task.stage.copy_and_resolve_references()
    stage.model.class_dropout_prob = drop
    copy = AlignTask(stage, 2, task.tokenizer, task.frozen["tokenizer"], 10)
    copy.frozen = task.frozen
    return copy


@partial(jax.jit, static_argnums=0)
def log_probs(task, params, batch, labels):
    """Compute log p(tokens | label) of each image from the logits."""
    tokens, inputs = task._tokens(task.tokenizer, task.frozen, batch)
    logits = task.model.apply({"params": params}, labels, inputs)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
    return chosen.sum((1, 2))


def log_ratios(task, params, batch, labels):
    return log_probs(task, params, batch, labels) - log_probs(task, task.frozen["reference"], batch, labels)


def test_losses_and_their_gradients_are_those_of_the_formula():
    r, is_negative = np.array([0.0, 3.0, -2.0, 40.0]), np.array([False, True, False, True])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    want = [np.log(2), -7 * np.log(sigmoid(-1.5)), -np.log(sigmoid(-1.0)), -7 * np.log(sigmoid(-20.0))]
    np.testing.assert_allclose(contrastive_losses(r, is_negative, 0.5, 7.0), want, rtol=1e-5)
    gradient = lambda weight: jax.grad(lambda r: contrastive_losses(r, is_negative, 0.5, weight).sum())(r)
    positives = np.array([-0.5 * sigmoid(0.0), 0, -0.5 * sigmoid(1.0), 0])
    np.testing.assert_allclose(gradient(0.0), positives, rtol=1e-5)
    negatives = np.array([0, 3.5 * sigmoid(1.5), 0, 3.5 * sigmoid(20.0)])
    np.testing.assert_allclose(gradient(7.0), positives + negatives, rtol=1e-5)


def test_at_the_reference_the_log_ratio_is_zero_and_each_term_log_2(task, batch):
    task = copy_of(task, drop=0.0)
    pairs = task.make_pairs(task.frozen, batch, KEY)
    reference = task.frozen["reference"]
    loss, (metrics, _) = jax.jit(task.pair_loss)(reference, pairs, KEY, reference)
    assert metrics["log_ratio_positive"] == metrics["log_ratio_negative"] == 0
    # Of 8 negatives one has the label of its own, and counts as a positive.
    assert loss == pytest.approx((8 + 1 + 7 * 5) / 8 / 5 * np.log(2), rel=1e-6)


def test_loss_and_gradient_of_cca_equal_the_formula_on_logits(task, batch, moved):
    task, labels = copy_of(task, drop=0.5), batch["label"]
    dropped = jnp.where(jax.random.bernoulli(KEY, 0.5, (8,)), 10, labels)
    rolled = jnp.concatenate([dropped[-1:], dropped[:-1]])
    negative = jnp.array([float(x != 10 and x != y) for x, y in zip(rolled, labels, strict=True)])
    assert 0 < negative.sum() < 8 and (dropped == 10).any()

    def formula(params):
        r = log_ratios(task, params, batch, dropped), log_ratios(task, params, batch, rolled)
        terms = -jnp.log(jax.nn.sigmoid(0.3 * r[0]))
        terms += -negative * 5 * jnp.log(jax.nn.sigmoid(-0.3 * r[1]))
        terms += -(1 - negative) * jnp.log(jax.nn.sigmoid(0.3 * r[1]))
        return terms.mean() / 5

    pairs = task.make_pairs(task.frozen, batch, KEY)
    loss = lambda params: task.pair_loss(params, pairs, KEY, task.frozen["reference"])[0]
    want, got = (jax.jit(jax.value_and_grad(f))(moved) for f in (formula, loss))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)
    assert optax.tree.norm(got[1]) > 0.1


def test_negatives_of_ddo_are_the_samples_with_their_labels(task, batch, moved):
    task = copy_of(task, drop=0.0)
    task.stage.align.method = "ddo"
    samples = {"tokens": (batch["tokens"] + 3) % 16, "label": 9 - batch["label"]}
    both = batch | {"sample_tokens": samples["tokens"], "sample_label": samples["label"]}
    ratios = [log_ratios(task, moved, x, x["label"]) for x in (batch, samples)]
    want = -jnp.log(jax.nn.sigmoid(0.3 * ratios[0])) - 5 * jnp.log(jax.nn.sigmoid(-0.3 * ratios[1]))
    pairs = task.make_pairs(task.frozen, both, KEY)
    loss, (metrics, _) = jax.jit(task.pair_loss)(moved, pairs, KEY, task.frozen["reference"])
    got = loss, metrics["log_ratio_positive"], metrics["log_ratio_negative"]
    chex.assert_trees_all_close(got, (want.mean(), ratios[0].mean(), ratios[1].mean()), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def aligned(tiny_run, digits_dir, tmp_path_factory):
    """Alignment of the tiny run for two steps, from images: its config and directory."""
    stage, folder = align_stage(tiny_run, digits_dir), tmp_path_factory.mktemp("aligned")
    run(stage, folder)
    return stage, folder


def train_losses(folder) -> list[float]:
    lines = read_metrics(folder / "next_scale" / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_resumed_run_equals_an_unbroken_one(aligned, tmp_path):
    stage, unbroken = aligned
    shutil.copytree(unbroken, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "next_scale" / "checkpoints" / "2")  # as after a kill at step 2
    run(stage, tmp_path / "killed")
    params = [load_params(x / "next_scale" / "checkpoints", 2)[0] for x in (tmp_path / "killed", unbroken)]
    chex.assert_trees_all_equal(*params)
    losses = train_losses(unbroken)
    assert train_losses(tmp_path / "killed") == losses and len(losses) == 2
    assert losses[0] == pytest.approx(2 * np.log(2), rel=1e-5)  # a negative weight of 1


def test_a_run_holds_no_reference_and_is_sampled_without_guidance(aligned, tiny_run):
    _, folder = aligned
    checkpoints = folder / "next_scale" / "checkpoints"
    start, params = load_params(tiny_run / "next_scale" / "checkpoints")[0], load_params(checkpoints)[0]
    chex.assert_trees_all_equal_shapes(params, start)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (start, params)), strict=True))
    state = ocp.StandardCheckpointer().restore(checkpoints / "2" / "state")
    num_arrays = len(jax.tree.leaves(params))
    assert 0 <= len(jax.tree.leaves(state)) - 2 * num_arrays < 10  # moments and counts
    model = var_jax.load_var(folder)  # the tokenizer is that of the run which its config names
    assert model.options.guidance == 0 and model.sample([0, 1]).shape == (2, 8, 8, 3)


def test_another_reference_is_refused_when_a_run_is_resumed(aligned, digits_dir):
    stage, folder = aligned
    other = align_stage(stage.tokenizer, digits_dir)
    other.init_from = str(folder)
    with pytest.raises(ConfigError, match="weights.reference: '[0-9a-f]{8}' there, '[0-9a-f]{8}' now"):
        run(other, folder)


def test_ddo_reads_samples_from_a_cache(tiny_run, digits_dir, token_cache, tmp_path):
    model, samples = var_jax.load_var(tiny_run), tmp_path / "samples"
    stage = align_stage(tiny_run, digits_dir, steps=1, method="ddo", samples=str(samples))
    stage = on_tokens(stage, token_cache)
    with pytest.raises(FileNotFoundError, match="config.align.samples(.|\n)*sample_tokens --workdir=RUN"):
        run(stage, tmp_path / "run")
    spec = samples_spec(model, fingerprint(load_tokenizer(tiny_run)[1]), num_per_class=3, seed=5)
    write_samples(samples, spec, model, 16, "command")
    (source, _) = open_sources(stage)
    assert isinstance(source, PairedTokenSource) and len(source) == 2 * 1442
    item = source.batch([4, 34])
    np.testing.assert_array_equal(item["sample_label"], [4, 4])
    np.testing.assert_array_equal(item["sample_tokens"][0], item["sample_tokens"][1])  # 34 % 30
    options = dict(guidance=0.0, top_k=0, top_p=0.0)
    _, want = model.generate(np.arange(16) % 10, seed=5, return_tokens=True, **options)
    np.testing.assert_array_equal(item["sample_tokens"][0], want[4])
    run(stage, tmp_path / "run")
    assert train_losses(tmp_path / "run")[0] == pytest.approx(2 * np.log(2), rel=1e-5)


def test_the_reference_is_sharded_as_the_parameters_are_and_costs_what_plans_count():
    mesh, config = make_mesh(fsdp=4, data=2), align.small_data(tiny_config("unused").next_scale)
    config.model.update(dict(width=32, num_heads=4, depth=2))
    task = make_planned_task(config, mesh)
    programs, state, frozen = training_programs(task, mesh, from_tokens=True)
    specs = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding.spec), tree)
    assert specs(frozen["reference"]) == specs(state.params)
    assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(frozen["reference"]))
    step, inputs = programs["step"]
    assert "dot" in step.lower(*inputs).as_text()
    assert task.flops_per_image() == pytest.approx(training_flops(task.config) * (2 * 3 + 2) / 3)
    plain = tiny_config("unused").next_scale
    plain.train.ema_decay = 0.0
    assert state_bytes(config, task.config, mesh) == 5 / 4 * state_bytes(plain, task.config, mesh)


def test_eight_devices_and_accumulation_equal_one(task, batch):
    task = copy_of(task)
    batch = {name: np.tile(x, (2, *[1] * (x.ndim - 1))).astype(np.int32) for name, x in batch.items()}
    results = []
    for accumulate, mesh in ((1, make_mesh(devices=jax.devices()[:1])), (2, make_mesh(fsdp=4, data=2))):
        task.stage.train.grad_accum_steps = accumulate
        make_state, abstract = create_state(task.init, task.optimizer, False, KEY, mesh)
        frozen = jax.device_put(task.frozen, task.frozen_shardings(mesh, abstract.params))
        step = jit_train_step(task, task.stage.train, 2, mesh, abstract)
        state, metrics = step(make_state(), frozen, global_batch(batch, mesh), KEY)
        results.append((metrics["loss"], metrics["gradient_norm"], state.params))
    one, eight = jax.device_get(results)
    chex.assert_trees_all_close(eight, one, rtol=1e-4, atol=1e-5)
    assert one[0] != pytest.approx(2 * np.log(2), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(init_from=""), "config.init_from is empty: an alignment fine-tunes"),
        (lambda c: c.align.update(method="dpo"), "config.align.method must be one of cca, ddo; got 'dpo'"),
        (lambda c: c.align.update(beta=0.0), "config.align.beta must be positive.*got 0.0 and 1.0"),
        (lambda c: c.align.update(method="ddo"), "config.align.method=ddo needs two token caches"),
        (lambda c: c.model.update(width=64), "config.model.width must be 32, as in init_from"),
    ],
)
def test_wrong_fields_are_named(tiny_run, digits_dir, tmp_path, change, message):
    stage = align_stage(tiny_run, digits_dir)
    change(stage)
    with pytest.raises(ConfigError, match=message):
        run(stage, tmp_path / "run")
    assert not (tmp_path / "run").exists()
