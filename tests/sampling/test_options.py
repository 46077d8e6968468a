import jax.numpy as jnp
import numpy as np
import pytest

from var_jax.sampling.options import SamplingOptions
from var_jax.scales import SCALES_256, Scales

SCALES = Scales((1, 2, 3, 4))


def test_one_value_holds_at_every_scale_and_guidance_is_a_ramp():
    per_scale = SamplingOptions(guidance=3.0, top_k=7, top_p=0.5).per_scale(SCALES, num_codes=16)
    np.testing.assert_allclose(per_scale.guidance_scale, [0, 1, 2, 3], rtol=1e-6)
    assert per_scale.top_k == (7,) * 4 and per_scale.top_p.tolist() == [0.5] * 4
    assert per_scale.temperature.tolist() == [1.0] * 4 and per_scale.smooth == (False,) * 4
    assert per_scale.num_guided_scales == per_scale.num_maps == 4 and per_scale.use_top_p == (True,) * 4


def test_lists_are_taken_as_they_are():
    options = SamplingOptions(
        guidance=[2, 0.5, 1, 0], top_k=[0, 4, 16, 2], top_p=[0, 1, 0.9, 0], smooth=[True, False, False, True]
    )
    per_scale = options.per_scale(SCALES, num_codes=16)
    assert per_scale.guidance_scale.tolist() == [2, 0.5, 1, 0]
    assert per_scale.num_guided_scales == 3  # nothing to guide at the last scale
    assert per_scale.top_k == (0, 4, 0, 2)  # all 16 is no filter
    assert per_scale.use_top_p == (False, True, True, False)
    assert per_scale.smooth == (True, False, False, True)


def test_guidance_can_be_constant_end_early_or_be_absent():
    constant = SamplingOptions(guidance=2.0, guidance_schedule="constant", guidance_until=3)
    assert constant.per_scale(SCALES, 999).guidance_scale.tolist() == [2, 2, 2, 0]
    assert constant.per_scale(SCALES, 999).num_guided_scales == 3
    assert SamplingOptions(guidance=0.0).per_scale(SCALES, 999).num_guided_scales == 0
    assert SamplingOptions(guidance_until=0).per_scale(SCALES, 999).num_guided_scales == 0
    assert SamplingOptions(guidance_until=7).per_scale(Scales(SCALES_256), 4096).num_guided_scales == 7


def test_the_published_top_k_fits_every_codebook_but_no_other_may_be_larger():
    assert SamplingOptions().per_scale(SCALES, num_codes=64).top_k == (0,) * 4
    with pytest.raises(ValueError, match="top_k must be at most the 64 codes of the codebook.*got 65"):
        SamplingOptions(top_k=65).per_scale(SCALES, num_codes=64)
    with pytest.raises(ValueError, match="got 900"):
        SamplingOptions(top_k=[900, 1, 1, 1]).per_scale(SCALES, num_codes=64)


def test_numbers_of_numpy_and_jax_are_numbers():
    options = SamplingOptions(
        guidance=jnp.linspace(0, 3, 4), top_k=np.int64(7), top_p=np.float32(0.5), smooth=np.zeros(4, bool)
    )
    assert options == SamplingOptions(guidance=[0, 1, 2, 3], top_k=7, top_p=0.5, smooth=[False] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be a whole number.*got -1"),
        ({"top_k": [1, 2.5, 1, 1]}, "top_k must be a whole number.*got 2.5"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"guidance_schedule": "cosine"}, "must be ramp or constant, got 'cosine'"),
        (
            {"guidance": [1, 2, 3, 4], "guidance_schedule": "constant"},
            r"guidance_schedule=constant needs a single guidance strength, got one per scale: \(1, 2, 3, 4\)",
        ),
        ({"guidance": [1, 2]}, r"guidance must be one value or one for each of the 4 scales \(1, 2, 3, 4\)"),
        ({"guidance_until": 5}, r"guidance_until must be a whole number in 0 .. 4, got 5"),
        ({"upto": 0}, r"upto must be a whole number of at least 1, got 0"),
        ({"upto": 5}, r"upto must be a whole number in 1 .. 4, got 5"),
        ({"upto": 2.0}, r"upto must be a whole number of at least 1, got 2.0"),
        ({"guidance_until": True}, r"guidance_until must be a whole number of at least 0, got True"),
        ({"guidance": "4"}, "guidance must be a finite number, got '4'"),
        ({"guidance": [0, 1, True, 1]}, "guidance must be a finite number, got True"),
        ({"guidance": None}, "guidance must be a finite number, got None"),
        ({"top_p": None}, r"top_p must be in \[0, 1\], 0 for all codes, got None"),
        ({"top_p": float("nan")}, r"top_p must be in \[0, 1\], 0 for all codes, got nan"),
        ({"top_k": None}, "top_k must be a whole number.*got None"),
        ({"top_k": True}, "top_k must be a whole number.*got True"),
        ({"temperature": "1"}, "temperature must be above 0, got '1'"),
        ({"temperature": float("inf")}, "temperature must be above 0, got inf"),
        ({"smooth": "false"}, "smooth must be True or False, got 'false'"),
        ({"smooth": [True, 0, True, True]}, "smooth must be True or False, got 0"),
        ({"smooth": None}, "smooth must be True or False, got None"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options).per_scale(SCALES, num_codes=16)
