import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.arrays import randomized
from var_jax.tokenizer.discriminator import FeatureHeads, PatchDiscriminator, hinge, lecam


def test_a_logit_for_every_place_whatever_other_images_there_are():
    module = PatchDiscriminator(channels=8, layers=2)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = randomized(module.init(jax.random.key(1), images)["params"])
    logits_of = jax.jit(lambda x: module.apply({"params": params}, x))
    logits = logits_of(images)
    assert logits.shape == (3, 16)  # one logit per 4 x 4 pixels
    np.testing.assert_allclose(logits_of(images[1:2]), logits[1:2], atol=1e-5)
    assert np.ptp(logits) > 0.1


def test_heads_judge_every_layer_at_every_place():
    module = FeatureHeads(channels=8)
    features = [jax.random.normal(jax.random.key(i), (2, side, side, 5)) for i, side in enumerate((4, 3))]
    params = module.init(jax.random.key(1), features)["params"]
    assert module.apply({"params": params}, features).shape == (2, 16 + 9)
    assert set(params) >= {"head0_in", "head1_judge"}


def test_hinge_and_lecam_by_hand():
    real, fake = jnp.array([[2.0, 0.5], [-1.0, 1.0]]), jnp.array([[-3.0, 0.0], [1.0, -0.5]])
    want = 0.5 * (np.mean([0, 0.5, 2, 0]) + np.mean([0, 1, 2, 0.5]))
    np.testing.assert_allclose(hinge(real, fake), want)
    want = np.mean((np.asarray(real) + 0.5) ** 2) + np.mean((np.asarray(fake) - 1) ** 2)
    np.testing.assert_allclose(lecam(real, fake, jnp.array([1.0, -0.5])), want)
