import numpy as np
import pytest

from var_jax.training.optimizer import learning_rate, weight_decay

KINDS = ("cos", "lin", "lin0", "lin00", "lin0.3", "exp")


@pytest.mark.parametrize("kind", KINDS)
def test_golden(golden, kind):
    want = golden("schedule")[kind]
    steps = np.arange(200)
    rate = learning_rate(kind, 3e-4, 200, 20, warmup_start=0.005, end=0.01)(steps)
    np.testing.assert_allclose(rate, want[:, 0], atol=3e-4 * 1e-4)
    np.testing.assert_allclose(weight_decay(0.05, 0.01, 200)(steps), want[:, 1], atol=0.05 * 1e-4)


def test_constant_and_no_warm_up():
    rate = learning_rate("constant", 2.0, 10, 0)
    assert [float(rate(step)) for step in (0, 5, 9)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["sqrt", "lin2", "linear"])
def test_unknown_kinds_are_named(kind):
    with pytest.raises(ValueError, match=f"train.lr_schedule must be one of cos, .*got '{kind}'"):
        learning_rate(kind, 1.0, 10, 1)
