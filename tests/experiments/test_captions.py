"""The judge of captioned shapes reads what was drawn, and the table averages over seeds."""

import numpy as np

from examples.captioned_shapes import UNSEEN
from experiments.captions.judge import (
    ATTRIBUTES,
    AttributeJudge,
    color_names,
    describe,
    drawn_examples,
    shape_colors,
    shape_masks,
)
from experiments.captions.run import ask, attributes_table


def test_the_judge_reads_attributes_of_images_it_has_not_seen():
    judge = AttributeJudge(side=32, count=500)
    images, asked = drawn_examples(100, side=32, seed=5)
    shares = judge.shares(images, asked)
    assert shares["background"] == shares["color"] == 1 and shares["shape"] > 0.8
    assert judge.shares(images[::-1], asked)["all"] < 0.1


def test_an_image_without_a_shape_shows_no_color():
    images = np.full((1, 32, 32, 3), 255, np.uint8)
    masks = shape_masks(images / 255)
    assert color_names(shape_colors(images / 255, masks)) == [""] and not masks.any()
    assert np.isfinite(describe(masks)).all()


def test_prompts_ask_for_seen_or_unseen_pairs():
    for unseen in (False, True):
        asked, prompts = ask(30, unseen)
        assert {(a.shape, a.color) in UNSEEN for a in asked} == {unseen}
        assert all(a.shape in prompt and a.color in prompt for a, prompt in zip(asked, prompts, strict=True))


def test_the_table_has_means_and_deviations_over_the_seeds():
    shares = lambda value: dict.fromkeys((*ATTRIBUTES, "all"), value)
    seeds = {str(i): {"seen pairs, guidance 0": shares(value)} for i, value in enumerate((0.5, 0.7))}
    table = attributes_table({"limits": {"drawn images": shares(0.9)}, "seeds": seeds})
    assert "| drawn images | 90.0%" in table and "| seen pairs, guidance 0 | 60.0% ± 14.1%" in table
