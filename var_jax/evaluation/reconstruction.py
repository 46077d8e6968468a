"""Evaluate the reconstructions of a tokenizer on held-out images: PSNR, SSIM, LPIPS, rFID, codebook use."""

import dataclasses
from collections.abc import Callable, Iterable

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from var_jax.evaluation.frechet import Moments, frechet_distance
from var_jax.images import denormalize, denormalize_to_uint8, normalize
from var_jax.tokenizer.codebook_updates import codebook_use, count_codes
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.lpips import perceptual_distance
from var_jax.tokenizer.model import Tokenizer

NUM_EXTREMES = 8  # images shown of the best and of the worst
SSIM_WINDOW = 11  # pixels of the standard Gaussian window; at most the size of the image


@dataclasses.dataclass
class Extremes:
    """Images and reconstructions uint8 [n, H, W, 3] of lowest (or highest) PSNR, sorted by it."""

    psnr: np.ndarray
    images: np.ndarray
    recon: np.ndarray

    def merge(self, psnr: np.ndarray, images: np.ndarray, recon: np.ndarray, sign: int) -> "Extremes":
        """Merge a batch and keep NUM_EXTREMES images of lowest PSNR; with `sign` = -1, of highest PSNR."""
        psnr = np.concatenate([self.psnr, psnr])
        order = np.argsort(sign * psnr, kind="stable")[:NUM_EXTREMES]
        images, recon = np.concatenate([self.images, images]), np.concatenate([self.recon, recon])
        return Extremes(psnr[order], images[order], recon[order])


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    params: dict,
    batches: Iterable[dict],
    images: int,
    vgg: dict | None = None,
    features: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[dict[str, float], Extremes, Extremes]:
    """Compute the reconstruction metrics of a tokenizer in one pass over a held-out set.

    Args:
      tokenizer, params: the network and its parameters.
      batches: batches {"image": uint8 [b, H, W, 3], "valid": [b]}.
      images: number of images, for the progress bar.
      vgg: parameters of the perceptual distance; None omits LPIPS.
      features: function of images float32 [b, H, W, 3] in [-1, 1] that returns features [b, D] for a Frechet
        distance; with Inception's pooled features, it is rFID.  None omits it.

    Returns:
      Metrics: `psnr` in dB and `ssim`, means over the images; `l2` of values in [-1, 1]; `lpips` and `rfid`
      unless omitted; codes used per scale and their maximum (`codebook_use`); `bits_per_pixel`, of tokens
      stored as integers, and `bits_per_pixel_coded`, from the entropy of the codes at each scale.
      Then the worst and the best reconstructions.
    """
    config = tokenizer.config
    window = min(SSIM_WINDOW, config.image_size)

    @jax.jit
    def step(params, vgg, pixels, valid):
        real = normalize(pixels)
        tokens = tokenizer.apply({"params": params}, real, method="encode")
        recon = tokenizer.apply({"params": params}, tokens, method="decode")
        l2 = jnp.mean((recon - real) ** 2, axis=(1, 2, 3))
        metrics = {
            "l2": l2,
            "psnr": 10 * jnp.log10(4 / jnp.maximum(l2, 1e-10)),  # values span 2
            "ssim": dm_pix.ssim(denormalize(real), denormalize(recon), filter_size=window),
        }
        if vgg is not None:
            metrics["lpips"] = perceptual_distance(vgg, real, recon)
        counts = count_codes(tokens, config.schedule, config.num_codes, valid)
        recon_uint8 = denormalize_to_uint8(recon)
        # rFID is usually measured on 8-bit files, so features are of the rounded reconstructions.
        feature_pair = () if features is None else (features(real), features(normalize(recon_uint8)))
        return metrics, counts, recon_uint8, feature_pair

    parts = []
    counts = 0
    moments = (Moments(), Moments())
    no_images = np.zeros((0, config.image_size, config.image_size, 3), np.uint8)
    worst = best = Extremes(np.zeros(0), no_images, no_images)
    with tqdm(total=images, unit="image", desc="reconstructing", mininterval=1) as bar:
        for batch in batches:
            valid = batch["valid"] > 0
            outputs = step(params, vgg, batch["image"], batch["valid"])
            batch_metrics, batch_counts, recon, feature_pair = jax.device_get(outputs)
            for accumulator, values in zip(moments, feature_pair, strict=False):  # no pair without `features`
                accumulator.add(values[valid])
            parts.append({name: values[valid] for name, values in batch_metrics.items()})
            counts = counts + batch_counts
            candidates = (parts[-1]["psnr"], batch["image"][valid], recon[valid])
            worst = worst.merge(*candidates, sign=1)
            best = best.merge(*candidates, sign=-1)
            bar.update(int(valid.sum()))
    metrics = {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]}
    if features is not None:
        metrics["rfid"] = frechet_distance(*moments)
    use = codebook_use(counts, config.scales, sum(len(part["psnr"]) for part in parts))
    use = {name: float(value) for name, value in use.items()}
    return metrics | use | _bits_per_pixel(use, config), worst, best


def _bits_per_pixel(use: dict, config: TokenizerConfig) -> dict[str, float]:
    """Compute the bits per pixel of the tokens, as plain integers and entropy-coded per scale."""
    pixels = config.image_size**2
    coded = sum(side**2 * np.log2(use[f"perplexity_{k}"]) for k, side in enumerate(config.scales))
    plain = config.schedule.length * np.log2(config.num_codes)
    return {"bits_per_pixel": float(plain / pixels), "bits_per_pixel_coded": float(coded / pixels)}
