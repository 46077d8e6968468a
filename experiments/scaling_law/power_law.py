"""Power laws L(x) = (a x)^b + c: fits, intervals, and the frontier of many training curves.

Source: Kaplan et al. 2020 and Tian et al. 2024 (section 4.2).  The irreducible part c is fitted too (Henighan
et al. 2020, equation 1.1).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(x) = (a x)^b + c.

    Attributes:
      a: scale, in units of 1 / x.
      b: exponent; negative if L falls.
      c: irreducible part, in units of L.
      pearson: correlation of log(L - c) with log x over the fitted points; -1 for a perfect falling law.
    """

    a: float
    b: float
    c: float
    pearson: float

    def reducible(self, x: np.ndarray) -> np.ndarray:
        """Compute (a x)^b, of the shape of x."""
        return (self.a * np.asarray(x)) ** self.b

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.reducible(x) + self.c


def fit_power_law(x: np.ndarray, y: np.ndarray, floor: bool = True) -> PowerLaw:
    """Fit a power law by least squares of log y, so that every point counts by its relative error.

    Args:
      x: [n], positive; parameters or compute.
      y: [n], positive; a loss or an error rate.
      floor: fit c with 0 <= c < min(y); False: c = 0.

    Raises:
      ValueError: if there are fewer distinct x than parameters to fit, or values that are not positive.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a power law is fitted to x and y of one shape [n], got {x.shape} and {y.shape}")
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError("a power law is fitted to positive, finite x and y")
    need, have = 3 if floor else 2, len(np.unique(x))
    if have < need:
        raise ValueError(f"a power law with {need} parameters needs at least {need} different x, got {have}")
    log_x, log_y = np.log(x), np.log(y)
    center = log_x.mean()  # centering makes k and b nearly independent
    z = log_x - center
    k, b, c = _fit_with_floor(z, y, log_y) if floor else (*np.polyfit(z, log_y, 1)[::-1], 0.0)
    k -= b * center  # (a x)^b = exp(k + b log x)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        pearson = np.corrcoef(log_x, np.log(y - c))[0, 1]
        return PowerLaw(float(np.exp(np.divide(k, b))), float(b), float(c), float(pearson))


def _fit_with_floor(z: np.ndarray, y: np.ndarray, log_y: np.ndarray) -> tuple[float, float, float]:
    """Fit k, b and c of y = exp(k + b z) + c by least squares of log y."""
    max_floor = y.min() * (1 - 1e-6)
    floor = lambda u: max_floor * expit(u)  # keeps c in range for every u

    def residuals(p):
        return np.log(np.exp(p[0] + p[1] * z) + floor(p[2])) - log_y

    def jacobian(p):
        power, c = np.exp(p[0] + p[1] * z), floor(p[2])
        slopes = [power, z * power, np.full_like(z, c * (1 - c / max_floor))]
        return np.stack(slopes, axis=1) / (power + c)[:, None]

    # For a fixed c, the rest is a linear fit; start from the best of a few values of c.
    starts = []
    for share in (0.01, 0.3, 0.6, 0.8, 0.9, 0.97):
        b, k = np.polyfit(z, np.log(y - share * max_floor), 1)
        starts.append((k, b, np.log(share / (1 - share))))
    start = min(starts, key=lambda p: np.sum(residuals(p) ** 2))
    k, b, u = least_squares(residuals, start, jacobian, method="lm", max_nfev=200).x
    without_floor = np.polyfit(z, log_y, 1)
    if np.sum((np.polyval(without_floor, z) - log_y) ** 2) <= np.sum(residuals((k, b, u)) ** 2):
        return without_floor[1], without_floor[0], 0.0  # u would diverge to minus infinity
    return k, b, floor(u)


def bootstrap(
    fit: Callable[[np.ndarray], PowerLaw], runs: int, draws: int = 500, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Estimate confidence intervals by the bootstrap over training runs.

    Points of one run are not independent, so whole runs are drawn with replacement.  Draws with too few
    distinct x for a fit are drawn again.

    Args:
      fit: function from indices of runs, int [runs], to the law fitted to them; raises ValueError if they are
        too few.
      runs: number of runs.
      draws: number of fits.
      level: share of the fits inside an interval; the others are split equally between both sides.
      seed: of the draws.

    Returns:
      Ends of the intervals of a, b and c.

    Raises:
      ValueError: if fewer than one in 20 draws can be fitted.
    """
    rng, laws = np.random.default_rng(seed), []
    for _ in range(20 * draws):
        if len(laws) == draws:
            break
        try:
            laws.append(fit(rng.integers(0, runs, runs)))
        except ValueError:
            continue
    if len(laws) < draws:
        raise ValueError(f"{runs} runs are too few for a bootstrap: {len(laws)} of {20 * draws} draws fitted")
    ends = [(1 - level) / 2, (1 + level) / 2]
    with np.errstate(invalid="ignore"):  # a is infinite if b is nearly 0
        return {
            name: tuple(np.quantile([getattr(law, name) for law in laws], ends).tolist()) for name in "abc"
        }


def frontier(x: np.ndarray, y: np.ndarray, per_decade: int = 10) -> np.ndarray:
    """Find the points of the lower envelope: those for which no point with at most their x has less y.

    Args:
      x: [n], positive; compute.
      y: [n]; the loss at that compute.
      per_decade: number of bins in log x per factor of ten; only the last point of a bin is kept, so that
        densely logged ranges do not outweigh the others.

    Returns:
      int [m], indices by ascending x.
    """
    order = np.lexsort((y, x))
    minimum = np.minimum.accumulate(y[order])
    best = order[np.concatenate([[True], minimum[1:] < minimum[:-1]])]
    bins = np.floor(np.log10(x[best]) * per_decade)
    return best[np.concatenate([bins[1:] != bins[:-1], [True]])]
