"""Cost of pairs against the jaxpr of the sampler, and the configs and systems of the experiment."""

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from experiments.collaborative import report
from experiments.collaborative.cost import Pass, bound_seconds, cache_bytes, sampling_passes
from experiments.collaborative.run import KINDS, list_systems, run_config
from experiments.complexity.run import IdentityDecoder, abstract_params
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, Refiner, generate, image_keys
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.training.hardware import Chip
from var_jax.training.task import program_flops
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import generation_flops
from var_jax.transformer.next_scale import NextScale

SIZES = dict(scales=(1, 2, 3), num_codes=64, code_dim=8)
DRAFTER, REFINER = (NextScale(NextScaleConfig(depth=depth, num_classes=3, **SIZES)) for depth in (4, 2))


def test_the_passes_of_a_pair_are_those_of_the_sampler():
    """The sampler also looks up codes and resizes maps."""
    options = SamplingOptions(guidance=1.5, guidance_schedule="constant", top_k=0, top_p=0.0)
    per_scale = options.per_scale(DRAFTER.config.schedule, 64)
    tokenizer = IdentityDecoder(TokenizerConfig(**SIZES, num_phis=0))
    tokenizer_params = {"quantizer": {"codebook": jax.ShapeDtypeStruct((64, 8), jnp.float32)}}
    refiner = Refiner(REFINER, 2, abstract_params(REFINER))
    networks = Networks(tokenizer, DRAFTER, tokenizer_params, abstract_params(DRAFTER), refiner)
    label, keys = jnp.zeros(1, int), image_keys(0, jnp.arange(1))
    counted = program_flops(lambda networks: generate(networks, label, keys, per_scale), networks)
    passes = sampling_passes(DRAFTER, REFINER, 2, sequences=2)
    assert len(passes) == 1 + 2 + 2 + 1  # vectors of adaLN, maps; the same and the draft, the last map
    assert sum(one.flops for one in passes) == pytest.approx(counted, rel=1e-3)
    alone = sum(one.flops for one in sampling_passes(DRAFTER, None, 0, sequences=2))
    assert alone == pytest.approx(generation_flops(DRAFTER.config, 3), rel=1e-3)  # embeds the start


def test_two_models_hold_their_keys_and_values_in_turn():
    drafter, refiner = (NextScale(NextScaleConfig(depth=depth)) for depth in (30, 16))
    held = lambda refiner, draft_scales: cache_bytes(drafter, refiner, draft_scales, sequences=2)
    assert held(None, 0) == 2 * 2 * 30 * 680 * 1920 * 4
    assert held(refiner, 9) == 2 * 2 * 30 * 424 * 1920 * 4
    assert held(refiner, 6) == 2 * 2 * 16 * 680 * 1024 * 4


def test_a_pass_computes_or_reads():
    chip = Chip(flops=100.0, memory=0, bandwidth=10.0, link=0)
    passes = [Pass(200.0, 50, 0), Pass(10.0, 50, 5)]  # 2 and 5 s, 0.1 and 5.5 s
    assert bound_seconds(passes, 1, chip) == pytest.approx(10.5)
    assert bound_seconds(passes, 4, chip) == pytest.approx((8 + 7) / 4)


def test_runs_are_specialized_from_that_of_their_seed(tmp_path):
    base = digits.next_scale()
    config = lambda role, tuning: run_config(base, role, tuning, 3, 400, tmp_path)
    small, drafter, refiner = config("refiner", ""), config("drafter", "2"), config("refiner", "2")
    assert (small.model.depth, small.model.width, small.model.num_heads) == (2, 64, 2)
    assert small.init_from == "" and small.train.steps == 400
    assert refiner.init_from == f"{tmp_path}/refiner/3" and refiner.train.steps == 200
    assert drafter.init_from == f"{tmp_path}/drafter/3" and drafter.model == base.model
    assert (drafter.loss.from_scale, drafter.loss.upto) == (0, 2)
    assert (refiner.loss.from_scale, refiner.loss.upto) == (2, 0)
    assert config("refiner", "all").loss == base.loss


def test_tables_of_what_was_computed():
    names = list_systems(3, [2, 1], KINDS)
    assert list(names)[:4] == ["drafter", "refiner", "drafter, tuned", "refiner, tuned"]
    assert names["2 drafted, specialized"] == ("2", 2) and len(names) == 10
    run = {key: 0.5 for _, key, *_ in report.SAMPLE_COLUMNS}
    quality = {name: {"1": run, "2": run} for name in names}
    speed = {name: {"seconds_1": 0.5, "seconds_64": 0.25} for name in names}
    cost = {name: {key: 2.0**30 for _, key, *_ in report.COST_COLUMNS} for name in ("d30", "8 drafted")}
    tables = report.format_tables({"cost": cost, "quality": quality, "speed": speed})
    assert "| 2 drafted, specialized | 0.0 | 0 | 0.500 ± 0.000 | 50.0% ± 0.0% |" in tables
    assert "| refiner | 500.00 | 250.00 |" in tables
    assert "| 8 drafted | 0.00 | 1.00 | 1024 |" in tables
