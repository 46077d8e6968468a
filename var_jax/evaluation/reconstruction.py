"""How well a tokenizer gives back images that it has not seen."""

import dataclasses
from collections.abc import Callable, Iterable

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from var_jax.evaluation.frechet import Moments, frechet_distance
from var_jax.images import normalize
from var_jax.tokenizer.codebook_updates import codebook_use, count_codes
from var_jax.tokenizer.lpips import perceptual_distance
from var_jax.tokenizer.model import Tokenizer

NUM_EXTREMES = 8  # of the best and of the worst
SSIM_WINDOW = 11  # pixels, of the usual Gaussian; smaller images take their own size


@dataclasses.dataclass
class Extremes:
    """Images and reconstructions uint8 [n, H, W, 3] of the least PSNR, the worst first."""

    psnr: np.ndarray
    images: np.ndarray
    recon: np.ndarray

    def with_more(self, psnr: np.ndarray, images: np.ndarray, recon: np.ndarray, sign: int) -> "Extremes":
        """Keeps NUM_EXTREMES of the old and the new; sign -1 keeps those of the greatest PSNR instead."""
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
    """Goes through a held-out set once.

    Args:
      tokenizer, params: the network and its parameters.
      batches: of {"image": uint8 [b, H, W, 3], "valid": [b]}.
      images: how many there are, for the progress bar.
      vgg: parameters of the perceptual distance; None leaves LPIPS out.
      features: images float32 [b, H, W, 3] in [-1, 1] -> [b, D], to take a Frechet distance in: rFID with
        Inception's pooled ones.  None leaves it out.

    Returns:
      Metrics: `psnr` in dB and `ssim`, means over the images; `l2` of values in [-1, 1]; `lpips` and `rfid`
      where asked for; use of the codes per scale beside the most possible (`codebook_use`);
      `bits_per_pixel`, of tokens as plain numbers, and `bits_per_pixel_coded`, by the entropy of the codes
      at each scale.  Then the worst and the best.
    """
    config = tokenizer.config
    window = min(SSIM_WINDOW, config.image_size)

    @jax.jit
    def step(params, vgg, pixels, valid):
        real = normalize(pixels)
        tokens = tokenizer.apply({"params": params}, real, method="encode")
        recon = tokenizer.apply({"params": params}, tokens, method="decode")
        l2 = jnp.mean((recon - real) ** 2, axis=(1, 2, 3))
        result = {
            "l2": l2,
            "psnr": 10 * jnp.log10(4 / jnp.maximum(l2, 1e-10)),  # values span 2
            "ssim": dm_pix.ssim(real / 2 + 0.5, recon / 2 + 0.5, filter_size=window),
        }
        if vgg is not None:
            result["lpips"] = perceptual_distance(vgg, real, recon)
        counts = count_codes(tokens, config.schedule, config.num_codes, valid)
        written = ((recon / 2 + 0.5) * 255 + 0.5).astype(jnp.uint8)
        # Of files' values, as others measure it.
        seen = () if features is None else (features(real), features(normalize(written)))
        return result, counts, written, seen

    parts, counts, moments = [], 0, (Moments(), Moments())
    nothing = np.zeros((0, config.image_size, config.image_size, 3), np.uint8)
    worst = best = Extremes(np.zeros(0), nothing, nothing)
    with tqdm(total=images, unit="image", desc="reconstructing", mininterval=1) as bar:
        for batch in batches:
            valid = batch["valid"] > 0
            done = step(params, vgg, batch["image"], batch["valid"])
            result, counted, recon, seen = jax.device_get(done)
            for side, values in zip(moments, seen, strict=False):  # none without features
                side.add(values[valid])
            parts.append({name: values[valid] for name, values in result.items()})
            counts = counts + counted
            shown = (parts[-1]["psnr"], batch["image"][valid], recon[valid])
            worst, best = worst.with_more(*shown, sign=1), best.with_more(*shown, sign=-1)
            bar.update(int(valid.sum()))
    metrics = {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]}
    if features is not None:
        metrics["rfid"] = frechet_distance(*moments)
    use = codebook_use(counts, config.scales, sum(len(part["psnr"]) for part in parts))
    use = {name: float(value) for name, value in use.items()}
    return metrics | use | _rate(use, config), worst, best


def _rate(use: dict, config) -> dict[str, float]:
    """Bits a pixel of the tokens."""
    pixels = config.image_size**2
    coded = sum(side**2 * np.log2(use[f"perplexity_{k}"]) for k, side in enumerate(config.scales))
    plain = config.schedule.length * np.log2(config.num_codes)
    return {"bits_per_pixel": float(plain / pixels), "bits_per_pixel_coded": float(coded / pixels)}
