"""Inception Score (Salimans et al. 2016), as ADM's evaluator and as torch-fidelity compute it."""

import itertools

import numpy as np
from jaxtyping import Float

ADM_SPLIT = 5000  # images
TORCH_FIDELITY_SPLITS, TORCH_FIDELITY_SEED = 10, 2020


def inception_score(log_probs: Float[np.ndarray, "n classes"], split: int = ADM_SPLIT) -> float:
    """Compute the score by ADM's convention: the mean over consecutive splits; the last may be short.

    The order of the images matters: each split should hold images of all classes.

    Args:
      log_probs: logarithms of the classes' probabilities, without the bias of the last layer.
      split: number of images in a split.
    """
    return float(np.mean([_score(log_probs[i : i + split]) for i in range(0, len(log_probs), split)]))


def inception_score_torch_fidelity(
    log_probs: Float[np.ndarray, "n classes"],
    splits: int = TORCH_FIDELITY_SPLITS,
    shuffle: bool = True,
) -> tuple[float, float]:
    """Compute mean and standard deviation of the score over equal, shuffled splits, as torch-fidelity does.

    Args:
      log_probs: as for `inception_score`.
      splits: number of splits.
      shuffle: whether to shuffle the images first, with torch-fidelity's seed.
    """
    count = len(log_probs)
    order = np.random.RandomState(TORCH_FIDELITY_SEED).permutation(count) if shuffle else np.arange(count)
    edges = [i * count // splits for i in range(splits + 1)]
    scores = [_score(log_probs[order[a:b]]) for a, b in itertools.pairwise(edges)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(log_probs: Float[np.ndarray, "n classes"]) -> float:
    """Compute exp of the mean divergence of p(class | image) from p(class), in float64."""
    log_probs = np.asarray(log_probs, np.float64)
    probs = np.exp(log_probs)
    marginal = probs.mean(0)
    # A class that no image has adds nothing.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))
    return float(np.exp((probs * (log_probs - log_marginal)).sum(1).mean()))
