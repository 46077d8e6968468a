import numpy as np
import pytest

from tests.helpers.arrays import close
from var_jax.tokenizer.resize import area_matrix, area_resize, bicubic_matrix, bicubic_resize, bilinear_resize


@pytest.mark.parametrize("kind", ["area", "bicubic"])
def test_golden(golden, kind):
    arrays = golden("resize")
    cases = [name.removesuffix("_x") for name in arrays if name.startswith(kind) and name.endswith("_x")]
    assert len(cases) >= 8
    resize = {"area": area_resize, "bicubic": bicubic_resize}[kind]
    for case in cases:
        target = int(case.split("_")[2])
        close(resize(arrays[f"{case}_x"], target), arrays[f"{case}_y"])


def test_rows_add_up_to_one():
    for source, target in ((16, 5), (4, 3), (13, 13)):
        np.testing.assert_allclose(area_matrix(source, target).sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(bicubic_matrix(target, source).sum(1), 1, rtol=1e-6)


def test_same_side_is_left_alone():
    x = np.ones((1, 3, 3, 2), np.float32)
    assert area_resize(x, 3) is x and bicubic_resize(x, 3) is x and bilinear_resize(x, 3) is x
