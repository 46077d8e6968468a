"""Power laws L(x) = (a x)^b + c: fitting, intervals, and the frontier of many training curves.

The form and the use of it are those of Kaplan et al. 2020 and Tian et al. 2024 (section 4.2); c, what no size
and no compute takes away, is fitted with the rest (Henighan et al. 2020, equation 1.1).
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
      b: exponent; negative where L falls.
      c: irreducible part, in units of L.
      pearson: correlation of log(L - c) with log x over the points fitted, -1 for a perfect falling law.
    """

    a: float
    b: float
    c: float
    pearson: float

    def reducible(self, x: np.ndarray) -> np.ndarray:
        """(a x)^b, of the shape of x."""
        return (self.a * np.asarray(x)) ** self.b

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.reducible(x) + self.c


def fit_power_law(x: np.ndarray, y: np.ndarray, floor: bool = True) -> PowerLaw:
    """Least squares of log y: every point counts by its relative error.

    Args:
      x: [n], positive; parameters or compute.
      y: [n], positive; a loss or an error rate.
      floor: fit c, in 0 <= c < min(y); without it c = 0.

    Raises:
      ValueError: where there are fewer distinct x than parameters to fit, or values that are not positive.
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
    centre = log_x.mean()  # k and b are then nearly independent
    z = log_x - centre
    k, b, c = _fit_with_floor(z, y, log_y) if floor else (*np.polyfit(z, log_y, 1)[::-1], 0.0)
    k -= b * centre  # (a x)^b = exp(k + b log x)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        pearson = np.corrcoef(log_x, np.log(y - c))[0, 1]
        return PowerLaw(float(np.exp(np.divide(k, b))), float(b), float(c), float(pearson))


def _fit_with_floor(z: np.ndarray, y: np.ndarray, log_y: np.ndarray) -> tuple[float, float, float]:
    """k, b and c of y = exp(k + b z) + c."""
    most = y.min() * (1 - 1e-6)
    floor = lambda u: most * expit(u)  # noqa: E731  (keeps c inside, whatever u)

    def residuals(p):
        return np.log(np.exp(p[0] + p[1] * z) + floor(p[2])) - log_y

    def jacobian(p):
        power, c = np.exp(p[0] + p[1] * z), floor(p[2])
        slopes = [power, z * power, np.full_like(z, c * (1 - c / most))]
        return np.stack(slopes, axis=1) / (power + c)[:, None]

    # For each c the rest is a straight line: the best of some c is near enough to start from.
    starts = []
    for share in (0.01, 0.3, 0.6, 0.8, 0.9, 0.97):
        b, k = np.polyfit(z, np.log(y - share * most), 1)
        starts.append((k, b, np.log(share / (1 - share))))
    start = min(starts, key=lambda p: np.sum(residuals(p) ** 2))
    k, b, u = least_squares(residuals, start, jacobian, method="lm", max_nfev=200).x
    alone = np.polyfit(z, log_y, 1)
    if np.sum((np.polyval(alone, z) - log_y) ** 2) <= np.sum(residuals((k, b, u)) ** 2):
        return alone[1], alone[0], 0.0  # u would go to minus infinity
    return k, b, floor(u)


def bootstrap(
    fit: Callable[[np.ndarray], PowerLaw], runs: int, draws: int = 500, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Intervals by the bootstrap over training runs: as many are drawn with replacement, and fitted anew.

    Points of one run are not independent of each other, so whole runs are drawn.  Draws with too few
    different x for a fit are drawn again.

    Args:
      fit: indices of runs, int [runs], to what is fitted to them; ValueError where they are too few.
      runs: how many there are.
      draws: number of fits.
      level: share of the fits between the ends of an interval, equally many beyond either.
      seed: of the draws.

    Returns:
      Ends of the intervals of a, b and c.

    Raises:
      ValueError: where hardly a draw can be fitted.
    """
    rng, result = np.random.default_rng(seed), []
    for _ in range(20 * draws):
        if len(result) == draws:
            break
        try:
            result.append(fit(rng.integers(0, runs, runs)))
        except ValueError:
            continue
    if len(result) < draws:
        raise ValueError(
            f"{runs} runs are too few for a bootstrap: {len(result)} of {20 * draws} draws fitted"
        )
    ends = [(1 - level) / 2, (1 + level) / 2]
    with np.errstate(invalid="ignore"):  # a is infinite where b is nearly 0
        return {
            name: tuple(np.quantile([getattr(law, name) for law in result], ends).tolist()) for name in "abc"
        }


def frontier(x: np.ndarray, y: np.ndarray, per_decade: int = 10) -> np.ndarray:
    """Which points make the lower envelope: no point of less or equal x has less y.

    Args:
      x: [n], positive; compute spent.
      y: [n]; the loss reached with it.
      per_decade: equal steps in log x that a factor of ten is cut into; of the points in one step the last is
        kept, so that a stretch where many were logged does not outweigh the others.

    Returns:
      int [m], indices by ascending x.
    """
    order = np.lexsort((y, x))
    least = np.minimum.accumulate(y[order])
    best = order[np.concatenate([[True], least[1:] < least[:-1]])]
    step = np.floor(np.log10(x[best]) * per_decade)
    return best[np.concatenate([step[1:] != step[:-1], [True]])]
