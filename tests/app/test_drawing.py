"""Settings, streams of images, and the inside of an image, without a page."""

import dataclasses

import jax
import numpy as np
import pytest

import var_jax
from var_jax.app import drawing
from var_jax.app.device import Device
from var_jax.app.drawing import Picture
from var_jax.errors import UserError
from var_jax.images import to_uint8

VALUES, TEXTS = (1.5, 1.0, 0, 0.0), ("", "", "", "")  # guidance, temperature, top-k, top-p


@pytest.fixture(scope="module")
def model(tiny_run):
    return var_jax.load_var(tiny_run)


@pytest.fixture(scope="module")
def settings(model):
    return drawing.read_settings(model, 3, 7.0, 3, VALUES, TEXTS, 8)


@pytest.fixture(scope="module")
def picture(model):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return drawing.encode(Device(), model, image, "an image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": 11}, "class must be a whole number in 0 .. 10, got 11"),
        ({"seed": 0.5}, "seed must be a whole number in 0 .. 4294967295, got 0.5"),
        ({"seed": None}, "seed must be a whole number"),
        ({"count": 9}, "number of images must be a whole number in 1 .. 8, got 9"),
        ({"values": (1.5, 0.0, 0, 0.0)}, "temperature must be above 0, got 0.0"),
        ({"values": (1.5, 1.0, 17, 0.0)}, "top_k must be at most the 16 codes"),
        ({"per_map": ("1,2", "", "", "")}, "guidance must be one value or one for each of the 3 scales"),
        ({"per_map": ("", "", "1,x,2", "")}, "top_k for each map: invalid literal"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, change, message):
    fields = {"condition": 3, "seed": 0, "count": 1, "values": VALUES, "per_map": TEXTS, **change}
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        drawing.read_settings(model, max_images=8, **fields)


def test_values_for_each_map_replace_the_single_ones(model):
    settings = drawing.read_settings(model, 3, 0, 1, VALUES, ("0, 1,2", "", "", "0,0,.5"), 8)
    assert settings.options.guidance == (0, 1, 2) and settings.options.top_p == (0, 0, 0.5)
    assert settings.options.temperature == 1.0
    values, texts = drawing.option_values(settings.options)
    assert values == (2, 1.0, 0, 0.5) and texts == ("0,1,2", "", "", "0,0,0.5")


def test_drawn_images_are_those_of_sample(model, settings):
    results = list(drawing.draw(Device(), model, settings))
    images, tokens = model.sample([3] * 3, seed=7, return_tokens=True, **dataclasses.asdict(settings.options))
    assert [result.steps.shape for result in results] == [(3, n, 8, 8, 3) for n in (1, 2, 3)]
    np.testing.assert_array_equal(results[-1].tokens, tokens)
    np.testing.assert_allclose(results[-1].steps[:, -1].astype(int), to_uint8(images), atol=1)
    assert results[-1].picture(2, "third").tokens.tolist() == tokens[2].tolist()
    with pytest.raises(UserError, match="There is no image 4: 3 are drawn"):
        results[-1].picture(3, "fourth")


def test_edits_change_only_what_is_under_the_mask(model, settings, picture):
    mask = np.zeros((8, 8), bool)
    mask[:4, :4] = True
    *_, result = drawing.edit(Device(), model, picture, mask, settings, paste_back=True)
    last = result.tokens[:, 5:].reshape(3, 4, 4)
    np.testing.assert_array_equal(last[:, 2:], np.stack([picture.tokens[5:].reshape(4, 4)[2:]] * 3))
    is_changed = (result.steps != picture.pixels).any(axis=(0, 1, 4))
    np.testing.assert_array_equal(is_changed, mask)
    assert result.picture(-1, "") is picture
    with pytest.raises(UserError, match="mask must select a token"):
        next(drawing.edit(Device(), model, picture, np.zeros((8, 8), bool), settings, paste_back=False))


def test_variations_keep_the_first_maps_and_take_the_next_seed(model, settings, picture):
    *_, result = drawing.vary(Device(), model, picture, 2, settings)
    np.testing.assert_array_equal(result.tokens[:, :5], np.stack([picture.tokens[:5]] * 3))
    assert result.settings.seed == 8 and (result.tokens[:, 5:] != picture.tokens[5:]).any()
    with pytest.raises(UserError, match=r"from_scale must be a whole number in 0 .. 2, got 3"):
        drawing.vary(Device(), model, picture, 3, settings)


def test_attention_sums_to_one_over_the_maps_that_a_cell_sees(model, picture):
    weights = drawing.attention(Device(), model, picture, 3)
    assert weights.shape == (2, 4, 21)
    for layer, head in ((-1, -1), (0, -1), (-1, 1), (1, 3)):
        selected = drawing.select_attention(weights, layer, head)
        np.testing.assert_allclose(selected.sum(), 1, atol=1e-5)
        assert (selected[5:] == 0).all()
    np.testing.assert_array_equal(drawing.select_attention(weights, 1, 3), weights[1, 3])
    with pytest.raises(UserError, match="cell must be a whole number in 0 .. 20, got 21"):
        drawing.attention(Device(), model, picture, 21)


def test_decoded_steps_end_with_the_reconstruction(model, picture):
    steps = drawing.decode_steps(Device(), model, picture)
    np.testing.assert_allclose(
        steps[-1].astype(int), to_uint8(model.tokenizer.decode(picture.tokens[None])[0]), atol=1
    )


def test_a_picture_of_an_upload_has_no_class(model, picture):
    assert isinstance(picture, Picture) and picture.condition == model.num_classes == 10


def test_compiled_programs_are_dropped_before_there_are_too_many():
    double, device = jax.jit(lambda x: 2 * x), Device(max_programs=2)
    for size in (1, 2, 1):
        device.call(double, np.ones(size), program=size)
    assert double._cache_size() == 2
    device.call(double, np.ones(3), program=3)
    assert double._cache_size() == 1


def test_the_device_is_free_between_the_items_of_a_stream():
    device = Device()
    stream = device.stream(iter("abc"))
    assert next(stream) == "a" and device.call(str.upper, "x") == "X" and [*stream] == ["b", "c"]
