import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import GOLDEN_SCALES, all_tokens, close
from var_jax.scales import Scales
from var_jax.tokenizer.quantizer import Quantizer, _phi_index


@pytest.fixture(scope="module")
def quantizer(golden_tokenizer) -> Quantizer:
    return Quantizer.create(golden_tokenizer.params["quantizer"], golden_tokenizer.module.config)


def random_quantizer(sides, num_phis=4, l2_normalized=False, num_codes=32, dim=8) -> Quantizer:
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[0], (num_phis, 3, 3, dim, dim)) / 9 if num_phis else None
    bias = jnp.full((num_phis, dim), 0.01) if num_phis else None
    codebook = jax.random.normal(keys[1], (num_codes, dim))
    return Quantizer(codebook, kernel, bias, Scales(sides), l2_normalized)


def test_golden_tokens_and_partial_sums(golden, quantizer):
    arrays = golden("vae")
    tokens = quantizer.tokenize(arrays["features"])
    np.testing.assert_array_equal(tokens, all_tokens(arrays))
    for k, f_hat in enumerate(quantizer.partial_sums(tokens)):
        close(f_hat, arrays[f"fhat_{k}"])


def test_golden_teacher_input(golden, quantizer):
    arrays = golden("vae")
    close(quantizer.transformer_inputs(quantizer.partial_sums(all_tokens(arrays))), arrays["var_input"])


def test_golden_loss_and_gradients(golden, quantizer):
    arrays = golden("vae")

    def objective(codebook, features):
        output = dataclasses.replace(quantizer, codebook=codebook)(features)
        return jnp.sum(output.f_hat * arrays["probe"]) + 100 * output.loss.mean(), output

    grads, output = jax.grad(objective, (0, 1), has_aux=True)(quantizer.codebook, arrays["features"])
    close(output.f_hat, arrays["st_fhat"])
    close(output.loss.mean(), arrays["vq_loss"])
    close(grads[0], arrays["grad_codebook"], 1e-3)
    close(grads[1], arrays["grad_features"], 1e-3)


def test_the_step_by_step_sum_of_generation_is_the_partial_sums(quantizer):
    tokens = jax.random.randint(jax.random.key(0), (2, 30), 0, 128)
    f_hat, inputs = 0.0, []
    for k, token_map in enumerate(quantizer.split(tokens)):
        f_hat = f_hat + quantizer.upsample_and_smooth(k, quantizer.codes[token_map])
        if k + 1 < len(GOLDEN_SCALES):
            inputs.append(quantizer.next_scale_input(k + 1, f_hat))
    sums = quantizer.partial_sums(tokens)
    np.testing.assert_array_equal(f_hat, sums[-1])
    np.testing.assert_array_equal(np.concatenate(inputs, 1), quantizer.transformer_inputs(sums))


def test_published_choice_of_phi():
    # Scales 2 and 7 of ten are half-way between two ticks, so rounding as in the published code decides.
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    want = [int(np.argmin(np.abs(ticks - k / 9))) for k in range(10)]
    assert [_phi_index(k, 10, 4) for k in range(10)] == want
    assert [_phi_index(k, 4, 4) for k in range(4)] == [0, 1, 2, 3]
    assert [_phi_index(k, 4, 1) for k in range(4)] == [0] * 4


@pytest.mark.parametrize("sides", [(4,), (4, 4, 4), (1, 2, 4)])
@pytest.mark.parametrize("num_phis", [0, 4])
def test_every_further_map_brings_the_sum_closer(sides, num_phis):
    quantizer = random_quantizer(sides, num_phis, num_codes=512)
    if num_phis:  # phi as the identity
        identity = np.zeros(quantizer.phi_kernel.shape, np.float32)
        identity[:, 1, 1] = np.eye(8)
        quantizer = dataclasses.replace(quantizer, phi_kernel=identity, phi_bias=jnp.zeros((4, 8)))
    features = jax.random.normal(jax.random.key(1), (8, 4, 4, 8))
    sums = quantizer.partial_sums(quantizer.tokenize(features))
    assert len(sums) == len(sides)
    errors = [float(jnp.mean((f_hat - features) ** 2)) for f_hat in sums]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * float(jnp.mean(features**2))


def test_the_single_scale_is_an_ordinary_vq():
    quantizer = random_quantizer((4,), num_phis=0)
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    distances = ((np.asarray(features).reshape(2, 16, 1, 8) - np.asarray(quantizer.codebook)) ** 2).sum(-1)
    quantized = quantizer(features)
    np.testing.assert_array_equal(quantized.tokens, distances.argmin(-1))
    codes = np.asarray(quantizer.codebook)[distances.argmin(-1)].reshape(2, 4, 4, 8)
    np.testing.assert_allclose(quantized.f_hat, codes, atol=1e-6)
    np.testing.assert_allclose(quantized.loss, 1.25 * distances.min(-1).mean(1) / 8, rtol=1e-5)
    # Quantizer dropout cannot drop the only map, and the gradient of f_hat passes to the features unchanged.
    np.testing.assert_array_equal(quantizer(features, jnp.array([1, 1])).f_hat, quantized.f_hat)
    probe = jax.random.normal(jax.random.key(2), features.shape)
    gradients = jax.grad(
        lambda f, codebook: jnp.vdot(dataclasses.replace(quantizer, codebook=codebook)(f).f_hat, probe),
        (0, 1),
    )(features, quantizer.codebook)
    np.testing.assert_array_equal(gradients[0], probe)
    assert not gradients[1].any()
    assert quantizer.transformer_inputs(quantizer.partial_sums(quantized.tokens)).shape == (2, 0, 8)


def test_equal_maps_are_a_residual_vq():
    quantizer = random_quantizer((4, 4, 4), num_phis=0, num_codes=256)
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    quantized, codebook = quantizer(features), np.asarray(quantizer.codebook)
    residual, errors = np.asarray(features).reshape(2, 16, 8), []
    for token_map in quantizer.split(quantized.tokens):
        nearest = ((residual[:, :, None] - codebook) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(token_map, nearest)
        residual = residual - codebook[nearest]
        errors.append((residual**2).mean())
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_allclose(quantized.f_hat, features - residual.reshape(2, 4, 4, 8), atol=1e-5)
    np.testing.assert_allclose(quantized.loss.mean(), 1.25 * np.mean(errors), rtol=1e-5)
    # The transformer's input at a position is the sum of the codes of its earlier tokens.
    sums = quantizer.partial_sums(quantized.tokens)
    want = np.concatenate([f_hat.reshape(2, 16, 8) for f_hat in sums[:2]], axis=1)
    np.testing.assert_array_equal(quantizer.transformer_inputs(sums), want)


def test_normalised_codes_are_matched_by_direction_and_used_as_unit_vectors():
    quantizer = random_quantizer((4,), num_phis=0, l2_normalized=True)
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    tokens = np.asarray(quantizer.tokenize(features))
    np.testing.assert_array_equal(quantizer.tokenize(features * 7), tokens)
    unit = np.asarray(quantizer.codebook) / np.linalg.norm(quantizer.codebook, axis=-1, keepdims=True)
    np.testing.assert_array_equal((np.asarray(features) @ unit.T).argmax(-1).reshape(2, 16), tokens)
    np.testing.assert_allclose(quantizer.partial_sums(tokens)[0].reshape(2, 16, 8), unit[tokens], atol=1e-5)


def test_quantizer_dropout_keeps_the_first_maps_and_leaves_tokens_and_loss_alone():
    quantizer = random_quantizer((1, 2, 4))
    features = jax.random.normal(jax.random.key(1), (3, 4, 4, 8))
    full, dropped = quantizer(features), quantizer(features, jnp.array([1, 2, 3]))
    np.testing.assert_array_equal(dropped.tokens, full.tokens)
    np.testing.assert_array_equal(dropped.loss, full.loss)
    sums = quantizer.partial_sums(full.tokens)
    for i in range(3):
        np.testing.assert_allclose(dropped.f_hat[i], sums[i][i], atol=1e-5)


def test_rotation_gives_the_sum_its_value_and_turns_the_gradient_with_it():
    quantizer = random_quantizer((1, 2, 4))
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    rotating = dataclasses.replace(quantizer, vq_gradient="rotation")
    f_hat, backward = jax.vjp(lambda f: rotating(f).f_hat, features)
    np.testing.assert_allclose(f_hat, quantizer(features).f_hat, atol=1e-5)
    along, across = backward(features / jnp.linalg.norm(features, axis=-1, keepdims=True))[0], f_hat
    # A gradient parallel to f_hat becomes parallel to the features, scaled by the ratio of lengths.
    arrived = backward(across)[0]
    cosine = jnp.sum(arrived * features, -1) / jnp.linalg.norm(arrived, axis=-1)
    np.testing.assert_allclose(cosine / jnp.linalg.norm(features, axis=-1), 1, atol=1e-5)
    lengths = [np.linalg.norm(x, axis=-1) for x in (arrived, across, f_hat, features)]
    np.testing.assert_allclose(lengths[0] / lengths[1], lengths[2] / lengths[3], rtol=1e-4)
    # A rotation preserves the angle between two gradients.
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    before = jnp.sum(unit(across) * unit(features), -1)
    np.testing.assert_allclose(jnp.sum(unit(arrived) * unit(along), -1), before, atol=1e-4)
    assert float(jnp.abs(before - 1).max()) > 0.1


def test_targets_are_what_is_left_and_pass_the_gradient_of_the_features():
    quantizer = random_quantizer((1, 4))
    features = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    quantized = quantizer(features)
    np.testing.assert_allclose(quantized.targets[:, 0], features.mean((1, 2)), atol=1e-6)
    residual = features - quantizer.partial_sums(quantized.tokens)[0]
    np.testing.assert_allclose(quantized.targets[:, 1:].reshape(2, 4, 4, 8), residual, atol=1e-5)
    gradient = jax.grad(lambda f: quantizer(f).targets.sum())(features)
    np.testing.assert_allclose(gradient, 1 + 1 / 16, rtol=1e-5)


def test_features_of_another_side_are_refused():
    with pytest.raises(ValueError, match="got 4, the features are 8 x 8"):
        random_quantizer((1, 4))(jnp.zeros((1, 8, 8, 8)))
