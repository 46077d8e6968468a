import numpy as np
import pytest

from var_jax.scales import SCALES_256, SCALES_512, Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig


def test_positions_of_the_published_schedules():
    scales = Scales(SCALES_256)
    assert (len(scales), scales.length, scales.side) == (10, 680, 16)
    assert scales.starts == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424)
    assert scales.ends[-1] == 680 and scales.ends[:-1] == scales.starts[1:]
    assert Scales(SCALES_512).length == 2240


def test_levels_and_mask():
    scales = Scales((1, 2))
    assert scales.levels.tolist() == [0, 1, 1, 1, 1]
    assert scales.mask[0].tolist() == [True, False, False, False, False]
    assert scales.mask[1:].all()


def test_constant_and_single_schedules():
    assert Scales((4, 4, 4)).length == 48
    assert Scales((16,)).progress(0) == 0
    assert [Scales((1, 2, 3)).progress(k) for k in range(3)] == [0, 0.5, 1]


def test_a_schedule_is_a_value():
    assert Scales([1, 2]) == Scales((1, 2)) and hash(Scales([1, 2])) == hash(Scales((1, 2)))
    with pytest.raises(AttributeError):
        Scales((1,)).sides = (2,)
    assert Scales(np.array([1, 2])).sides == (1, 2)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((), "empty schedule"),
        ((0, 1), "at least 1, got 0"),
        ((1, 3, 2), r"2 follows 3 in \(1, 3, 2\)"),
        ((1, 2.5), "whole numbers"),
        (7, "whole numbers"),
    ],
)
def test_nonsense_is_an_error_that_says_so(sides, message):
    with pytest.raises(ValueError, match=message):
        Scales(sides)


def test_last_side_must_be_the_feature_side():
    with pytest.raises(ValueError, match="got 4, the features are 8 x 8"):
        Scales((1, 4)).check_feature_side(8)


@pytest.mark.parametrize("config", [NextScaleConfig(), TokenizerConfig()])
def test_the_tables_of_a_config_are_built_once(config):
    assert config.schedule is config.schedule and config.schedule.mask is config.schedule.mask
