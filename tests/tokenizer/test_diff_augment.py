import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from var_jax.tokenizer.discriminator import diff_augment

B, SIDE = 64, 16
augment = jax.jit(diff_augment, static_argnames="policies")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (B, SIDE, SIDE, 3)).astype(np.float32)


def test_translation_shifts_by_up_to_an_eighth_with_zeros_moving_in(images):
    result, shifts = np.asarray(augment(images, KEY, ("translation",))), []
    for before, after in zip(images, result, strict=True):
        fits = []
        for dy, dx in np.ndindex(5, 5):  # every shift of -2 to 2
            padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
            if np.array_equal(after, padded[dy : dy + SIDE, dx : dx + SIDE]):
                fits.append((dy - 2, dx - 2))
        assert len(fits) == 1
        shifts += fits
    rows, columns = zip(*shifts, strict=True)
    assert set(rows) == set(columns) == {-2, -1, 0, 1, 2}
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.4


@pytest.mark.parametrize("side", [16, 10], ids=["even hole", "odd hole"])
def test_cutout_zeros_a_rectangle_of_half_the_sides_around_a_point_inside(images, side):
    crops, hole = images[:, :side, :side], side // 2
    result = np.asarray(augment(crops, KEY, ("cutout",)))
    cut, touched = (result == 0).all(-1), [set(), set()]
    np.testing.assert_array_equal(result, np.where(cut[..., None], 0, crops))
    for one in cut:
        for axis in (0, 1):
            lines = np.flatnonzero(one.any(1 - axis))
            assert len(lines) == lines[-1] - lines[0] + 1 and hole // 2 <= len(lines) <= hole
            if len(lines) < hole:  # only a hole that extends over the border
                assert lines[0] == 0 or lines[-1] == side - 1
            touched[axis] |= set(lines)
        assert one.sum() == one.any(0).sum() * one.any(1).sum()
    assert touched == [set(range(side))] * 2
    # Centers are uniform: a hole keeps about 7/8 of each of its sides.
    assert cut.mean() == pytest.approx((7 / 16) ** 2, abs=0.025)


def test_color_is_a_brightness_a_saturation_and_a_contrast(images):
    result = np.asarray(augment(images, KEY, ("color",)))
    brightness = result.mean((1, 2, 3)) - images.mean((1, 2, 3))  # the other two keep the mean
    gray, before = result.mean(3), images.mean(3)
    center = lambda x: x - x.mean((1, 2), keepdims=True)
    contrast = center(gray).std((1, 2)) / center(before).std((1, 2))
    np.testing.assert_allclose(center(gray), contrast[:, None, None] * center(before), atol=1e-5)
    tint, before = result - result.mean(3, keepdims=True), images - images.mean(3, keepdims=True)
    both = tint.std((1, 2, 3)) / before.std((1, 2, 3))
    np.testing.assert_allclose(tint, both[:, None, None, None] * before, atol=1e-5)
    factors = [(brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (both / contrast, 0, 2)]
    for values, low, high in factors:
        assert low - 1e-4 <= values.min() < low + 0.2 and high - 0.2 < values.max() <= high + 1e-4
    correlations = np.corrcoef([values for values, _, _ in factors])
    assert np.abs(correlations - np.eye(3)).max() < 0.4


def test_a_key_decides_and_images_differ(images):
    same = np.repeat(images[:1], B, axis=0)
    result = np.asarray(augment(same, KEY))
    np.testing.assert_array_equal(result, augment(same, KEY))
    assert not np.array_equal(result, augment(same, jax.random.key(1)))
    assert len({image.tobytes() for image in result}) == B


def test_gradients_are_those_of_the_augmentation(images):
    gradient = jax.grad(lambda x: augment(x, KEY, ("cutout",)).sum())(images)
    np.testing.assert_array_equal(gradient, np.asarray(augment(images, KEY, ("cutout",))) != 0)
    # All of it is affine in an image, y = A x + b: the gradient of y^2 along a step is 2 y A step.
    step, y = images[::-1], np.asarray(augment(images, KEY))
    moved = augment(images + step, KEY) - y
    gradient = jax.grad(lambda x: (augment(x, KEY) ** 2).sum())(images)
    np.testing.assert_allclose((gradient * step).sum(), 2 * (y * moved).sum(), rtol=1e-4)


def test_eight_devices_do_what_one_does_without_a_word_between_them(images):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def both(x):
        augmented, vjp = jax.vjp(lambda x: diff_augment(x, KEY), x)
        return augmented, vjp(augmented)[0]

    sharded = jax.device_put(images, sharding)
    compiled = jax.jit(both, out_shardings=sharding).lower(sharded).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    for result, expected in zip(compiled(sharded), jax.jit(both)(images), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_policies_are_named(images):
    np.testing.assert_array_equal(diff_augment(images, KEY, ()), images)
    with pytest.raises(
        ValueError, match="unknown augmentation blur; must be among color, translation, cutout"
    ):
        diff_augment(images, KEY, ("color", "blur"))
