"""Judges a digits run from outside the code base: classifier, diversity, Frechet distance, copies.

    python -m var_jax.tools.judge_digits runs/digits

Uses scikit-learn's digits and the files of the run only, but for reconstructions and edits, which it asks the
public API for.  Prints one JSON line.
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
    """uint8 [N, H, W, 3] -> [N, 64] in 0 .. 16, by area averaging."""
    n, side = len(images), images.shape[1] // 8
    small = images.astype(np.float64).mean(-1).reshape(n, 8, side, 8, side).mean((2, 4))
    return small.reshape(n, 64) * (16 / 255)


def split_off(labels: np.ndarray) -> np.ndarray:
    """bool [N]: every fifth digit of each class."""
    seen = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    return seen % 5 == 4


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of vectors, as Gaussians."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Trace of the square root of the product, by its eigenvalues: some pixels are always 0.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * roots.sum())


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes and pixels of the standard deviation within a class."""
    return float(np.mean([images[labels == c].std(0) for c in range(10)]))


def judge(images: np.ndarray, labels: np.ndarray) -> dict:
    """Figures of samples uint8 [N, H, W, 3] asked for as labels [N]."""
    digits = load_digits()
    test = split_off(digits.target)
    train, held_out, train_labels = digits.data[~test], digits.data[test], digits.target[~test]
    made = to_8x8(images)
    classifier = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    nearest = lambda x: np.median(cdist(x, train).min(1))  # noqa: E731
    return {
        "samples": len(made),
        "called_right": float((classifier.predict(made) == labels).mean()),
        "spread": spread(made, labels) / spread(train, train_labels),
        "spread_held_out": spread(held_out, digits.target[test]) / spread(train, train_labels),
        "frechet": frechet(made, train),
        "frechet_halves": frechet(*np.array_split(np.random.default_rng(0).permutation(digits.data), 2)),
        "nearest": float(nearest(made) / nearest(held_out)),
    }


def as_images(digits: np.ndarray, side: int) -> np.ndarray:
    """[N, 8, 8] in 0 .. 16 -> float32 [N, 8 side, 8 side, 3] in [0, 1], as the data set has them."""
    pixels = np.round(digits * (255 / 16)).astype(np.uint8).repeat(side, 1).repeat(side, 2)
    return pixels[..., None].repeat(3, -1).astype(np.float32) / 255


def to_files_and_8x8(images: np.ndarray) -> np.ndarray:
    return to_8x8(np.round(images * 255).astype(np.uint8))


def judge_editing(run: Path) -> dict:
    """Held-out digits whose lower half is made anew, told their class."""
    digits = load_digits()
    test = split_off(digits.target)
    classifier = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    tokenizer = var_jax.load_tokenizer(run)
    model = var_jax.load_var(run, tokenizer=tokenizer)
    images = as_images(digits.images[test], tokenizer.module.config.image_size // 8)
    labels, mask = digits.target[test], np.zeros(images.shape[1:3], bool)
    mask[len(mask) // 2 :] = True
    made = model.inpaint(images, mask, labels, **vars(model.options))
    pasted = model.inpaint(images, mask, labels, paste_back=True, **vars(model.options))
    decoded = tokenizer.decode(tokenizer.encode(images))
    right = lambda x: float((classifier.predict(to_files_and_8x8(x)) == labels).mean())  # noqa: E731
    changed = np.abs(made - decoded).mean((0, 2, 3)).reshape(8, -1).mean(1)
    return {
        "edited_right": right(made),
        "edited_right_pasted": right(pasted),
        "edited_change_by_row": np.round(changed, 4).tolist(),  # of 1, against what the tokenizer makes of it
        "pasted_pixels_changed_outside": int((pasted != images)[:, ~mask].sum()),
    }


def judge_reconstructions(run: Path) -> dict:
    """How held-out digits fare through the tokenizer."""
    digits = load_digits()
    test = split_off(digits.target)
    knows_all = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    never_saw = SVC(gamma=0.001, C=10).fit(digits.data[~test], digits.target[~test])
    right = lambda classifier, x: float((classifier.predict(x) == digits.target[test]).mean())  # noqa: E731
    tokenizer = var_jax.load_tokenizer(run)
    real = as_images(digits.images[test], tokenizer.module.config.image_size // 8)
    again = to_files_and_8x8(tokenizer.decode(tokenizer.encode(real)))
    return {
        "reconstructions_right": right(knows_all, again),
        "reconstructions_right_unseen": right(never_saw, again),
        "real_right_unseen": right(never_saw, digits.data[test]),
        "reconstruction_frechet": frechet(again, digits.data[test]),
        "reconstruction_mse_0_16": float(((again - digits.data[test]) ** 2).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    with np.load(run / "samples.npz") as samples:
        figures = judge(samples["arr_0"], samples["arr_1"])
    print(json.dumps(figures | judge_reconstructions(run) | judge_editing(run)))


if __name__ == "__main__":
    main()
