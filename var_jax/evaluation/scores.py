"""Score samples against reference images: the row that papers print, and the references themselves.

References are files in the layout of ADM's evaluator: images `arr_0` uint8 [M, H, W, 3], and the statistics
of the whole data set that they are of: `mu`, `sigma` of pooled features, `mu_s`, `sigma_s` of spatial ones.
"""

import dataclasses
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from var_jax.errors import ConfigError
from var_jax.evaluation.extractors import Extractor, FeatureSet, extract_features
from var_jax.evaluation.frechet import Gaussian, Moments, frechet_at_infinity, frechet_distance
from var_jax.evaluation.inception_score import inception_score
from var_jax.evaluation.kid import kernel_distance
from var_jax.evaluation.precision_recall import NEIGHBOR, authenticity, precision_and_recall
from var_jax.images import image_grid
from var_jax.sampling.sample_writer import memmap_member

REFERENCE_IMAGES = 10_000  # kept of a data set, as in ADM's files
STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))
NUM_NEAREST = 5  # reference images shown with a sample


@dataclasses.dataclass(frozen=True)
class Reference:
    """Reference images of samples, and their statistics.

    Attributes:
      images: some of the reference images.
      features: their features.
      pool: Gaussian of the pooled features of all reference images.
      spatial: that of the spatial features; None if the network has none.
    """

    images: UInt8[np.ndarray, "M h w 3"]
    features: FeatureSet
    pool: Gaussian
    spatial: Gaussian | None

    def save(self, path: Path) -> None:
        """Write the images and statistics in the layout of ADM's evaluator."""
        arrays = {"arr_0": self.images}
        for (mean, covariance), gaussian in zip(STATISTICS, (self.pool, self.spatial), strict=True):
            if gaussian is not None:
                arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
        np.savez(path, **arrays)


def read_images(path: str | Path) -> UInt8[np.ndarray, "N h w 3"]:
    """Read `arr_0` of a file of samples or references.

    Raises:
      ConfigError: if there is no such file, or it holds no 8-bit images.
    """
    return read_arrays(path)["arr_0"]


def read_labels(path: str | Path, count: int) -> Int[np.ndarray, " N"] | None:
    """Read `arr_1` of a file of samples; None if there is none, or not one integer for each of its images."""
    with np.load(path, allow_pickle=False) as file:
        labels = file["arr_1"] if "arr_1" in file.files else np.zeros(0)
    return labels if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer) else None


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read images and statistics of a file of samples or references; memory-map images if possible.

    Raises:
      ConfigError: if there is no such file, or it holds no 8-bit images, or statistics that do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in sum(STATISTICS, ()) if name in file.files}
            member = file.zip.NameToInfo.get("arr_0.npy")
            if member is not None:
                is_plain = member.compress_type == zipfile.ZIP_STORED
                arrays["arr_0"] = memmap_member(Path(path), member.filename) if is_plain else file["arr_0"]
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}") from error
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not an .npz file of images: {error}") from error
    images = arrays.get("arr_0", np.zeros(0))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ConfigError(
            f"{path}: arr_0 must be images uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    for mean, covariance in STATISTICS:
        if (mean in arrays) != (covariance in arrays):
            raise ConfigError(f"{path} must hold both {mean} and {covariance}, or neither")
        if mean in arrays and arrays[covariance].shape != 2 * arrays[mean].shape:
            shapes = f"{list(arrays[mean].shape)} and {list(arrays[covariance].shape)}"
            raise ConfigError(f"{path}: {mean} and {covariance} must be [D] and [D, D], got {shapes}")
    return arrays


def read_statistics(path: str | Path, size: int) -> Gaussian:
    """Read the statistics of pooled features of a reference file.

    Args:
      path: an .npz file as ADM's.
      size: number of features of the network.

    Raises:
      ConfigError: if it is no such file, or has no statistics, or those of another network.
    """
    arrays = read_arrays(path)
    if "mu" not in arrays or len(arrays["mu"]) != size:
        raise ConfigError(f"{path} has no statistics `mu`, `sigma` of {size} features")
    return Gaussian(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))


def read_reference(path: str | Path, extractor: Extractor, batch: int) -> Reference:
    """Read a reference file, and compute the features of its images.

    Args:
      path: an .npz file as ADM's; statistics that it lacks are those of its images.
      extractor: the network.
      batch: images at once.

    Raises:
      ConfigError: if it is no such file, or its statistics are of another network's features.
    """
    arrays = read_arrays(path)
    features = extract_features(extractor, arrays["arr_0"], batch, "reference")
    gaussians = []
    for (mean, covariance), moments in zip(STATISTICS, (features.pool, features.spatial), strict=True):
        gaussian = _gaussian(moments)
        if gaussian and mean in arrays:
            if arrays[mean].shape != gaussian.mean.shape:
                raise ConfigError(
                    f"{path}: {mean} is of {len(arrays[mean])} features, and the network has "
                    f"{len(gaussian.mean)}"
                )
            gaussian = Gaussian(*(arrays[name].astype(np.float64) for name in (mean, covariance)))
        gaussians.append(gaussian)
    return Reference(arrays["arr_0"], features, *gaussians)


def reference_of_data(
    batches: Iterable[dict], count: int, extractor: Extractor, max_images: int = REFERENCE_IMAGES
) -> Reference:
    """Compute the reference of a data set.

    Args:
      batches: {"image": uint8 [b, H, W, 3], "valid": [b]}.
      count: number of images.
      extractor: the network.
      max_images: number of images to keep, with their features.
    """
    kept = np.zeros(count, bool)
    kept[np.linspace(0, count - 1, min(count, max_images)).astype(int)] = True
    features, images, start = FeatureSet(), [], 0
    with tqdm(total=count, unit="image", desc="reference", mininterval=1) as progress:
        for batch in batches:
            part = batch["image"][batch["valid"] > 0]
            keep = kept[start : start + len(part)]
            features.add(extractor(part), keep)
            images.append(part[keep])
            start += len(part)
            progress.update(len(part))
    pool, spatial = (_gaussian(moments) for moments in (features.pool, features.spatial))
    return Reference(np.concatenate(images), features, pool, spatial)


def _gaussian(moments: Moments) -> Gaussian | None:
    return Gaussian(moments.mean, moments.covariance) if moments.count else None


def score(
    samples: FeatureSet,
    reference: Reference,
    labels: Int[np.ndarray, " N"] | None = None,
    adm_float16: bool = False,
    at_infinity: bool = False,
) -> dict[str, float]:
    """Compute the scores of samples.

    Args:
      samples: their features.
      reference: what they are compared with.
      labels: classes of the samples, if the network is a classifier of the same classes.
      adm_float16: see `precision_and_recall`.
      at_infinity: whether to extrapolate FID to infinitely many samples.

    Returns:
      fid, sfid (if the network has spatial features), inception_score (ADM's splits), precision, recall, kid
      and kid_std (torch-fidelity's subsets), authenticity, accuracy (with labels), fid_at_infinity if asked
      for, num_samples, num_reference.

    Raises:
      ConfigError: if there are too few samples or reference images.
    """
    vectors, references = samples.vectors, reference.features.vectors
    if min(len(vectors), len(references)) <= NEIGHBOR:
        raise ConfigError(
            f"scores need more than {NEIGHBOR} images on each side, got {len(vectors)} samples and "
            f"{len(references)} references"
        )
    precision, recall = precision_and_recall(vectors, references, adm_float16)
    kid, kid_std = kernel_distance(vectors, references)
    result = {"fid": frechet_distance(samples.pool, reference.pool)}
    if reference.spatial is not None and samples.spatial.count:
        result["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    result |= {
        "inception_score": inception_score(samples.log_probs),
        "precision": precision,
        "recall": recall,
        "kid": kid,
        "kid_std": kid_std,
        "authenticity": authenticity(vectors, references),
    }
    if labels is not None:
        result["accuracy"] = float((samples.log_probs.argmax(1) == labels).mean())
    if at_infinity:
        result["fid_at_infinity"] = frechet_at_infinity(vectors, reference.pool)
    return result | {"num_samples": len(vectors), "num_reference": len(references)}


def score_halves(reference: Reference) -> dict[str, float]:
    """Score every other reference image against the rest: what real images get, in sets of half the size."""
    halves = [reference.features.select(slice(i, None, 2)) for i in range(2)]
    other = Reference(reference.images[1::2], halves[1], _gaussian(halves[1].pool), None)
    return score(halves[0], other)


def format_scores(rows: dict[str, dict[str, float]]) -> str:
    """Format scores as a Markdown table with a row for each set of samples."""
    columns = {
        "FID": ("fid", "{:.3f}"),
        "sFID": ("sfid", "{:.3f}"),
        "IS": ("inception_score", "{:.2f}"),
        "precision": ("precision", "{:.3f}"),
        "recall": ("recall", "{:.3f}"),
        "KID": ("kid", "{:.5f}"),
        "authentic": ("authenticity", "{:.1%}"),
        "called right": ("accuracy", "{:.1%}"),
        "FID at infinity": ("fid_at_infinity", "{:.3f}"),
        "samples": ("num_samples", "{}"),
        "references": ("num_reference", "{}"),
    }
    used = {
        title: column for title, column in columns.items() if any(column[0] in row for row in rows.values())
    }
    lines = ["| | " + " | ".join(used) + " |", "| --- " * (1 + len(used)) + "|"]
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "" for key, form in used.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def nearest_references(
    images: UInt8[np.ndarray, "n h w 3"], vectors: Float[np.ndarray, "n D"], reference: Reference
) -> Image.Image:
    """Draw samples, each followed by the reference images that are nearest in the network's features."""
    rows, references = [], reference.features.vectors
    for image, vector in zip(images, vectors, strict=True):
        distances = ((references - vector) ** 2).sum(1)
        rows += [image, *reference.images[np.argsort(distances, kind="stable")[:NUM_NEAREST]]]
    return image_grid(np.stack(rows), columns=1 + min(NUM_NEAREST, len(reference.images)))


def plot_scores(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Plot FID against Inception Score, and precision against recall, of a grid of options.

    Args:
      rows: names `option value, option value, ...` to scores; a line joins rows of different first options.
      path: of the picture.
    """
    from matplotlib.figure import Figure  # imported here, since it takes half a second

    lines: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for name, row in rows.items():
        first, _, others = name.partition(", ")
        lines.setdefault(others, []).append((first, row))
    figure = Figure(figsize=(11, 5), layout="constrained")
    pairs = (
        (("inception_score", "Inception Score"), ("fid", "FID")),
        (("recall", "recall"), ("precision", "precision")),
    )
    for axes, (x, y) in zip(figure.subplots(1, 2), pairs, strict=True):
        for others, points in lines.items():
            axes.plot(
                [row[x[0]] for _, row in points], [row[y[0]] for _, row in points], "o-", label=others or None
            )
            for first, row in points:
                position = (row[x[0]], row[y[0]])
                axes.annotate(first, position, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel=x[1], ylabel=y[1])
        axes.margins(0.15)
        if len(lines) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)
