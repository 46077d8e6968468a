import numpy as np
import pytest

from experiments.scaling_law.power_law import PowerLaw, bootstrap, fit_power_law, frontier

LAW = PowerLaw(a=2000.0, b=-0.3, c=1.5, pearson=-1.0)
X = np.geomspace(1e-5, 1e-2, 8)


def test_a_law_without_noise_is_recovered():
    result = fit_power_law(X, LAW(X))
    assert (result.a, result.b, result.c) == pytest.approx((LAW.a, LAW.b, LAW.c), rel=1e-4)
    assert result.pearson == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(result(X), LAW(X), rtol=1e-6)
    np.testing.assert_allclose(result.reducible(X), LAW(X) - LAW.c, rtol=1e-3)


@pytest.mark.parametrize("published", [(2.0, -0.23), (490.0, -0.016), (2.2e-5, -0.13)])
def test_published_laws_without_a_floor_are_recovered(published):
    law = PowerLaw(*published, c=0.0, pearson=-1.0)
    x = np.geomspace(0.0185, 2, 12) / law.a
    without = fit_power_law(x, law(x), floor=False)
    assert (without.a, without.b, without.c) == (pytest.approx(law.a), pytest.approx(law.b), 0)
    free = fit_power_law(x, law(x))
    assert free.b == pytest.approx(law.b, rel=0.02) and 0 <= free.c < 0.02


def test_three_points_are_met_exactly():
    result = fit_power_law(X[::3], LAW(X[::3]))
    np.testing.assert_allclose(result(X), LAW(X), rtol=1e-3)


def test_the_floor_stays_between_zero_and_the_lowest_loss():
    flat = fit_power_law(X, np.array([3.0, 2.5, 2.2, 2.1, 2.0, 2.0, 2.0, 2.0]))
    assert 1.5 < flat.c < 2.0
    concave = fit_power_law(X, 3 - X / X.max())  # falls faster than any law with a floor
    assert 0 <= concave.c < 1e-3


@pytest.mark.parametrize(
    ("x", "y", "floor", "message"),
    [
        ([1, 2], [2, 1], True, "3 parameters needs at least 3 different x, got 2"),
        ([1, 1, 2, 2], [2, 2, 1, 1], True, "3 parameters needs at least 3 different x, got 2"),
        ([1], [2], False, "2 parameters needs at least 2 different x, got 1"),
        ([1, 2, 3], [2, 1, 0], True, "positive, finite"),
        ([1, 2, 3], [2, 1, np.nan], True, "positive, finite"),
        ([1, 2, 3], [2, 1], True, r"one shape \[n\], got \(3,\) and \(2,\)"),
    ],
)
def test_invalid_points_are_refused(x, y, floor, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(np.array(x), np.array(y), floor)


def test_intervals_cover_the_truth_at_about_their_level():
    x, hits, widths = np.geomspace(1e-5, 1e-2, 10), 0, []
    for seed in range(20):
        y = LAW(x) * np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(x)))
        ends = bootstrap(lambda i, y=y: fit_power_law(x[i], y[i]), len(x), draws=80)
        hits += ends["b"][0] <= LAW.b <= ends["b"][1]
        widths.append(ends["b"][1] - ends["b"][0])
        assert ends["c"][0] < fit_power_law(x, y).c < ends["c"][1]
    assert hits >= 16 and 0.005 < np.median(widths) < 0.1


def test_a_bootstrap_of_too_few_runs_is_refused():
    with pytest.raises(ValueError, match="2 runs are too few for a bootstrap: 0 of 100 draws"):
        bootstrap(lambda i: fit_power_law(X[i], LAW(X)[i]), 2, draws=5)


def test_no_cheaper_point_beats_the_frontier():
    x = np.array([1.0, 2.0, 4.0, 2.0, 8.0, 1.0, 16.0])
    y = np.array([5.0, 4.0, 4.5, 3.0, 2.0, 6.0, 2.0])
    assert frontier(x, y).tolist() == [0, 3, 4]  # the last is no better than the one before


def test_the_frontier_is_thinned_to_even_steps_of_compute():
    x = np.linspace(1, 999, 999)
    kept = frontier(x, 1 / x, per_decade=4)
    assert len(kept) == 12 and kept[-1] == 998 and (np.diff(kept) > 0).all()
    assert np.diff(np.log10(x[kept]))[2:].max() < 0.5


def test_the_frontier_of_curves_of_many_sizes_is_the_law_of_the_best_sizes():
    # Of size n, loss n^-0.3 + (x / n^2)^-0.5: the best size for x gives an exponent of -0.5 * 0.3 / 1.3.
    n, x = np.geomspace(1, 1e4, 40)[:, None], np.geomspace(1, 1e10, 200)[None]
    y = n**-0.3 + (x / n**2) ** -0.5
    x, y = np.broadcast_to(x, y.shape).ravel(), y.ravel()
    kept = frontier(x, y)
    kept = kept[(x[kept] > 1e2) & (x[kept] < 1e6)]
    assert fit_power_law(x[kept], y[kept]).b == pytest.approx(-0.15 / 1.3, abs=0.003)
