"""Evaluate a digits run independently: classifier accuracy, diversity, Frechet distance, nearest neighbors.

    python -m var_jax.tools.judge_digits runs/digits

Reads scikit-learn's digits and the samples of the run; reconstructions and edits come from the public API.
Prints one JSON line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import var_jax


def to_8x8(images: np.ndarray) -> np.ndarray:
    """Downsample images uint8 [N, H, W, 3] to digits [N, 64] in 0 .. 16, by area averaging."""
    n, factor = len(images), images.shape[1] // 8
    small = images.astype(np.float64).mean(-1).reshape(n, 8, factor, 8, factor).mean((2, 4))
    return small.reshape(n, 64) * (16 / 255)


def split_off(labels: np.ndarray) -> np.ndarray:
    """Return the mask bool [N] of held-out digits: every fifth of each class."""
    number_in_class = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    return number_in_class % 5 == 4


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Frechet distance of Gaussians fitted to two sets of vectors [N, D] and [M, D]."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the square root by eigenvalues: the product is singular, since some pixels are always 0.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots.sum())


def mean_class_std(images: np.ndarray, labels: np.ndarray) -> float:
    """Compute the standard deviation within a class, averaged over classes and pixels."""
    return float(np.mean([images[labels == c].std(0) for c in range(10)]))


def evaluate_samples(images: np.ndarray, labels: np.ndarray) -> dict:
    """Compute the metrics of samples uint8 [N, H, W, 3] of the classes `labels` [N]."""
    digits = load_digits()
    test = split_off(digits.target)
    train, held_out, train_labels = digits.data[~test], digits.data[test], digits.target[~test]
    samples = to_8x8(images)
    classifier = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    nearest = lambda x: np.median(cdist(x, train).min(1))
    return {
        "samples": len(samples),
        "called_right": float((classifier.predict(samples) == labels).mean()),
        "spread": mean_class_std(samples, labels) / mean_class_std(train, train_labels),
        "spread_held_out": mean_class_std(held_out, digits.target[test])
        / mean_class_std(train, train_labels),
        "frechet": frechet(samples, train),
        "frechet_halves": frechet(*np.array_split(np.random.default_rng(0).permutation(digits.data), 2)),
        "nearest": float(nearest(samples) / nearest(held_out)),
    }


def as_images(digits: np.ndarray, factor: int) -> np.ndarray:
    """Convert digits [N, 8, 8] in 0 .. 16 to images float32 [N, 8 factor, 8 factor, 3] in [0, 1]."""
    pixels = np.round(digits * (255 / 16)).astype(np.uint8).repeat(factor, 1).repeat(factor, 2)
    return pixels[..., None].repeat(3, -1).astype(np.float32) / 255


def quantize_to_8x8(images: np.ndarray) -> np.ndarray:
    """Downsample images float32 [N, H, W, 3] in [0, 1] to digits [N, 64], after rounding to uint8."""
    return to_8x8(np.round(images * 255).astype(np.uint8))


def evaluate_editing(run: Path) -> dict:
    """Compute the metrics of held-out digits whose lower half is resampled, given their class."""
    digits = load_digits()
    test = split_off(digits.target)
    classifier = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    tokenizer = var_jax.load_tokenizer(run)
    model = var_jax.load_var(run, tokenizer=tokenizer)
    images = as_images(digits.images[test], tokenizer.image_size // 8)
    labels = digits.target[test]
    mask = np.zeros(images.shape[1:3], bool)
    mask[len(mask) // 2 :] = True
    edited = model.inpaint(images, mask, labels, **vars(model.options))
    pasted = model.inpaint(images, mask, labels, paste_back=True, **vars(model.options))
    decoded = tokenizer.decode(tokenizer.encode(images))
    accuracy = lambda x: float((classifier.predict(quantize_to_8x8(x)) == labels).mean())
    change = np.abs(edited - decoded).mean((0, 2, 3)).reshape(8, -1).mean(1)
    return {
        "edited_right": accuracy(edited),
        "edited_right_pasted": accuracy(pasted),
        "edited_change_by_row": np.round(change, 4).tolist(),  # against the reconstruction, in [0, 1]
        "pasted_pixels_changed_outside": int((pasted != images)[:, ~mask].sum()),
    }


def evaluate_reconstructions(run: Path) -> dict:
    """Compute the metrics of the tokenizer's reconstructions of held-out digits."""
    digits = load_digits()
    test = split_off(digits.target)
    fit_on_all = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    fit_on_train = SVC(gamma=0.001, C=10).fit(digits.data[~test], digits.target[~test])
    accuracy = lambda classifier, x: float((classifier.predict(x) == digits.target[test]).mean())
    tokenizer = var_jax.load_tokenizer(run)
    images = as_images(digits.images[test], tokenizer.image_size // 8)
    recon = quantize_to_8x8(tokenizer.decode(tokenizer.encode(images)))
    return {
        "reconstructions_right": accuracy(fit_on_all, recon),
        "reconstructions_right_unseen": accuracy(fit_on_train, recon),
        "real_right_unseen": accuracy(fit_on_train, digits.data[test]),
        "reconstruction_frechet": frechet(recon, digits.data[test]),
        "reconstruction_mse_0_16": float(((recon - digits.data[test]) ** 2).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run, with samples.npz")
    run = parser.parse_args().run
    with np.load(run / "samples.npz") as samples:
        metrics = evaluate_samples(samples["arr_0"], samples["arr_1"])
    print(json.dumps(metrics | evaluate_reconstructions(run) | evaluate_editing(run)))


if __name__ == "__main__":
    main()
