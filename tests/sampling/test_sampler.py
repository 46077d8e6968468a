import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers.arrays import all_tokens, close
from var_jax.images import denormalize_to_uint8
from var_jax.sampling import sampler
from var_jax.sampling.options import SamplingOptions, guidance_per_scale, guide
from var_jax.sampling.sampler import (
    KnownTokens,
    Networks,
    generate,
    generate_in_chunks,
    image_keys,
    smooth_codes,
)
from var_jax.scales import Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import generation_flops
from var_jax.transformer.next_scale import NextScale

CHUNK_ARGUMENTS = ("known", "start", "sharding", "postprocess")


def draw(tiny_tokenizer, tiny_var, labels, seed=0, chunk=4, **options):
    networks = Networks(tiny_tokenizer[0], tiny_var[0], tiny_tokenizer[1], tiny_var[1])
    arguments = {name: options.pop(name) for name in CHUNK_ARGUMENTS if name in options}
    options = SamplingOptions(**options)
    parts = list(generate_in_chunks(networks, np.array(labels), seed, options, chunk, **arguments))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_golden_greedy_generation(golden_var, guidance):
    model, arrays = golden_var
    options = dict(guidance=guidance, top_k=1, top_p=0.0, return_tokens=True)
    images, tokens = model.generate(arrays["label"], **options)
    np.testing.assert_array_equal(tokens, all_tokens(arrays, f"cfg{guidance}_tokens"))
    close(images, arrays[f"cfg{guidance}_image"].transpose(0, 2, 3, 1))


def test_golden_logits_after_guidance(golden_var, golden_tokenizer):
    model, arrays = golden_var
    tokens, scales = all_tokens(arrays, "cfg4.0_tokens"), model.module.config.schedule
    labels = arrays["label"]
    conditional = model.logits(tokens, labels)
    unconditional = model.logits(tokens, np.full_like(labels, model.num_classes))
    for k, (start, end) in enumerate(zip(scales.starts, scales.ends, strict=True)):
        both = np.stack([conditional, unconditional], 1).reshape(-1, *conditional.shape[1:])[:, start:end]
        close(guide(both, guidance_per_scale(4.0, "ramp", scales)[k]), arrays[f"cfg4.0_logits_{k}"])


def test_same_seed_same_images(tiny_tokenizer, tiny_var):
    images, tokens = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=3)
    again, _ = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=3)
    _, other = draw(tiny_tokenizer, tiny_var, [0, 1, 2, 3], seed=4)
    np.testing.assert_array_equal(images, again)
    assert (tokens != other).mean() > 0.3
    assert images.min() >= 0 and images.max() <= 1 and images.shape == (4, 8, 8, 3)


def test_an_image_does_not_depend_on_its_chunk_and_the_last_chunk_compiles_nothing(tiny_tokenizer, tiny_var):
    labels = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    _, whole = draw(tiny_tokenizer, tiny_var, labels, chunk=10)
    draw(tiny_tokenizer, tiny_var, labels[:4], chunk=4)
    compiled = generate._cache_size()
    images, tokens = draw(tiny_tokenizer, tiny_var, labels, chunk=4)  # 4, 4 and 2
    assert generate._cache_size() == compiled
    assert len(images) == 10
    np.testing.assert_array_equal(tokens, whole)


def test_strength_and_top_p_change_without_compiling(tiny_tokenizer, tiny_var):
    draw(tiny_tokenizer, tiny_var, [0], guidance=1.0, top_p=0.9)
    compiled = generate._cache_size()
    draw(tiny_tokenizer, tiny_var, [0], guidance=2.0, top_p=0.5)
    assert generate._cache_size() == compiled


def test_samples_follow_the_probabilities(tiny_tokenizer, tiny_var):
    """Compare the distribution of the first token of many images with its logits."""
    n = 4000
    _, tokens = draw(tiny_tokenizer, tiny_var, [2] * n, chunk=1000, guidance=0.0, top_k=0, top_p=0.0)
    logits = tiny_var[0].apply({"params": tiny_var[1]}, jnp.array([2]), jnp.zeros((1, 20, 4)))[0, 0]
    shares = np.bincount(tokens[:, 0], minlength=16) / n
    want = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(shares, want, atol=4 * np.sqrt(want.max() / n))
    assert (shares > 0).sum() > 5


def test_guidance_ramp():
    np.testing.assert_allclose(guidance_per_scale(3.0, "ramp", Scales((1, 2, 3, 4))), [0, 1, 2, 3], rtol=1e-6)
    np.testing.assert_array_equal(guidance_per_scale(3.0, "ramp", Scales((4,))), [3])
    np.testing.assert_array_equal(guidance_per_scale(3.0, "constant", Scales((1, 2))), [3, 3])


def test_smooth_codes_go_from_mixtures_to_single_codes():
    logits = jnp.array([[[2.0, 1.0, 0.0]]])
    codes, noise = jnp.eye(3), jnp.zeros((1, 1, 3))
    early = smooth_codes(logits, noise, codes, 0.0)[0, 0]
    np.testing.assert_allclose(early, jax.nn.softmax(logits[0, 0] / 0.27), rtol=1e-5)
    late = smooth_codes(logits, noise, codes, 1.0)[0, 0]
    np.testing.assert_allclose(late, jax.nn.softmax(2 * logits[0, 0] / 0.0135), atol=1e-6)
    assert early.max() < 0.98 < late.max()


def test_smooth_generation_is_seeded_too(tiny_tokenizer, tiny_var):
    images, tokens = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1, smooth=True)
    again, _ = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1, smooth=True)
    sharp, _ = draw(tiny_tokenizer, tiny_var, [0, 1], seed=1)
    np.testing.assert_array_equal(images, again)
    assert np.abs(images - sharp).max() > 1e-3 and tokens.shape == (2, 21)


def test_keys_depend_on_seed_and_index_alone():
    data = lambda seed, *indices: jax.random.key_data(image_keys(seed, np.array(indices)))
    np.testing.assert_array_equal(data(0, 3, 7)[1], data(0, 7)[0])
    assert (data(0, 7) != data(1, 7)).any()
    assert (data(2**32 - 1, 7) != data(0, 7)).any()  # the largest seed


def test_all_seeds_share_one_program():
    before = sampler._image_keys._cache_size()
    for seed in (0, 7, 2**31, 2**32 - 1):
        expected = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 6))
        keys = image_keys(seed, np.arange(77))  # a shape of this test alone
        np.testing.assert_array_equal(jax.random.key_data(keys)[6], expected)
    assert sampler._image_keys._cache_size() == before + 1


def test_guidance_that_ends_is_guidance_of_strength_zero(tiny_tokenizer, tiny_var):
    """Dropping the unconditional half saves work and changes no token."""
    _, ended = draw(tiny_tokenizer, tiny_var, [0, 1, 2], guidance=[3.0, 3.0, 0.0])
    _, kept = draw(tiny_tokenizer, tiny_var, [0, 1, 2], guidance=[3.0, 3.0, 1e-20])
    np.testing.assert_array_equal(ended, kept)
    _, guided = draw(tiny_tokenizer, tiny_var, [0, 1, 2], guidance=[3.0, 3.0, 3.0])
    np.testing.assert_array_equal(ended[:, :5], guided[:, :5])
    assert (ended[:, 5:] != guided[:, 5:]).any()


def test_flops_fall_where_guidance_ends(tiny_tokenizer):
    """From the third-last scale of five on: 41 percent less, and so in the compiled program (one block)."""
    config = NextScaleConfig(
        depth=1, width=64, num_heads=4, num_classes=5, num_codes=64, code_dim=4, scales=(1, 2, 3, 4, 8)
    )
    model = NextScale(config)
    tokenizer = Tokenizer(
        TokenizerConfig(
            scales=config.scales, num_codes=64, code_dim=4, ch=8, ch_mult=(1,), num_blocks=1, norm_groups=4
        )
    )
    key, n = jax.random.key(0), config.schedule.length - 1
    shapes = lambda net, *x: nn.meta.unbox(jax.eval_shape(net.init, key, *x))["params"]
    params = shapes(model, jnp.zeros(1, jnp.int32), jnp.zeros((1, n, 4)))
    networks = Networks(tokenizer, model, shapes(tokenizer, jnp.zeros((1, 8, 8, 3))), params)
    batch = (jnp.zeros(2, jnp.int32), image_keys(0, jnp.arange(2)))

    def flops(until):
        per_scale = SamplingOptions(guidance_until=until).per_scale(config.schedule, 64)
        compiled = generate.lower(networks, *batch, per_scale).compile()
        return compiled.cost_analysis()["flops"] / 2, generation_flops(config, per_scale.num_guided_scales)

    (all_guided, expected_all), (ended, expected_ended) = flops(None), flops(2)
    assert expected_ended / expected_all == pytest.approx(0.526, abs=0.001)
    assert (all_guided - ended) / (expected_all - expected_ended) == pytest.approx(1, abs=0.1)


def test_unconditional_images_are_drawn_without_a_second_half(tiny_tokenizer, tiny_var):
    none = tiny_var[0].config.num_classes
    _, plain = draw(tiny_tokenizer, tiny_var, [none] * 3, guidance=0.0)
    _, guided = draw(tiny_tokenizer, tiny_var, [none] * 3, guidance=4.0)
    np.testing.assert_array_equal(plain, guided)


def test_a_coarse_preview_has_the_first_maps_of_the_image(tiny_tokenizer, tiny_var):
    _, whole = draw(tiny_tokenizer, tiny_var, [0, 1])
    images, tokens = draw(tiny_tokenizer, tiny_var, [0, 1], upto=2)
    np.testing.assert_array_equal(tokens, whole[:, :5])
    decoded = tiny_tokenizer[0].apply({"params": tiny_tokenizer[1]}, whole[:, :5], method="decode")
    np.testing.assert_allclose(images, decoded / 2 + 0.5, atol=1e-5)


def test_a_low_temperature_is_greedy_at_that_scale_alone(tiny_tokenizer, tiny_var):
    _, cold = draw(tiny_tokenizer, tiny_var, [1] * 6, temperature=[1e-4, 1.0, 1.0])
    _, greedy = draw(tiny_tokenizer, tiny_var, [1] * 6, top_k=[1, 0, 0])
    assert len(set(cold[:, 0].tolist())) == 1 and len({tuple(row) for row in cold}) > 1
    np.testing.assert_array_equal(cold[:, 0], greedy[:, 0])


def test_known_tokens_stay_and_the_others_are_predicted_from_them(tiny_tokenizer, tiny_var):
    _, tokens = draw(tiny_tokenizer, tiny_var, [0, 1, 2])
    resample = np.zeros(tokens.shape, bool)
    resample[:, 9:] = True
    _, result = draw(tiny_tokenizer, tiny_var, [0, 1, 2], seed=5, known=KnownTokens(tokens, resample))
    np.testing.assert_array_equal(result[:, :9], tokens[:, :9])
    assert (result[:, 9:] != tokens[:, 9:]).mean() > 0.3
    # The seed of the image itself gives the same tokens.
    _, result = draw(tiny_tokenizer, tiny_var, [0, 1, 2], known=KnownTokens(tokens, resample))
    np.testing.assert_array_equal(result, tokens)


def test_eight_devices_draw_what_one_does(tiny_tokenizer, tiny_var):
    labels = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    images, tokens = draw(tiny_tokenizer, tiny_var, labels, chunk=5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    networks = [(module, jax.device_put(params, replicated)) for module, params in (tiny_tokenizer, tiny_var)]
    arguments = dict(sharding=NamedSharding(mesh, PartitionSpec("data")), postprocess=denormalize_to_uint8)
    sharded, sharded_tokens = draw(*networks, labels, chunk=5, **arguments)
    np.testing.assert_array_equal(sharded_tokens, tokens)
    assert sharded.dtype == np.uint8 and np.abs(sharded - images * 255).max() <= 0.51


def test_images_before_the_start_are_not_made(tiny_tokenizer, tiny_var):
    images, tokens = draw(tiny_tokenizer, tiny_var, list(range(5)) * 2)
    rest, rest_tokens = draw(tiny_tokenizer, tiny_var, list(range(5)) * 2, start=4)
    np.testing.assert_array_equal(rest, images[4:])
    np.testing.assert_array_equal(rest_tokens, tokens[4:])
