"""Codebook statistics and updates: code usage, restarts of dead codes, moving means, k-means.

Statistics are over the global batch: under `jit`, counts and sums of a sharded batch are summed over all
devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Num, PRNGKeyArray

from var_jax.scales import Scales
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.tokenizer.resize import area_resize

KMEANS_ROUNDS = 10  # rounds of assignment and averaging per training step


# ---------------------------------------------------------------------- usage of the codes


def count_codes(
    tokens: Int[Array, "B L"],
    scales: Scales,
    num_codes: int,
    weights: Num[Array, " B"] | None = None,
) -> Float32[Array, "K V"]:
    """Count the uses of each code at each scale.

    Args:
      tokens: tokens of the images.
      scales: the schedule.
      num_codes: V.
      weights: 1 for images that count and 0 for padding; all count by default.
    """
    cells = jnp.asarray(scales.levels) * num_codes + tokens
    weights = jnp.ones(tokens.shape[0]) if weights is None else weights
    weights = jnp.broadcast_to(weights[:, None], tokens.shape).astype(jnp.float32)
    counts = jnp.zeros(len(scales) * num_codes).at[cells.ravel()].add(weights.ravel())
    return counts.reshape(len(scales), num_codes)


def codebook_use(
    counts: Num[Array, "K V"], sides: tuple[int, ...], num_images: int | float | Num[Array, ""]
) -> dict[str, Array]:
    """Compute metrics of codebook usage from the counts of codes.

    A batch of B images uses at most B s_k^2 codes at scale k, so compare a number of distinct codes with the
    maximum for as many images, and measure over many images.

    Args:
      counts: uses of each code at each scale.
      sides: of the K maps.
      num_images: number of images that were counted.

    Returns:
      Scalars: for scale k `perplexity_k` (exponential of the entropy of the usage), `distinct_k` (number of
      codes used) and `most_k` (maximum of `distinct_k` for this number of images); and the same over all
      scales, without the suffix.
    """
    use = {}
    rows = [(f"_{k}", counts[k], side * side) for k, side in enumerate(sides)]
    rows.append(("", counts.sum(0), sum(side * side for side in sides)))
    for suffix, row, positions in rows:
        shares = row / jnp.maximum(row.sum(), 1)
        entropy = -jnp.sum(jnp.where(row > 0, shares * jnp.log(jnp.where(row > 0, shares, 1)), 0))
        use[f"perplexity{suffix}"] = jnp.exp(entropy)
        use[f"distinct{suffix}"] = jnp.sum(row > 0)
        use[f"most{suffix}"] = jnp.minimum(counts.shape[1], num_images * positions)
    return use


def dead_codes(hits: Float[Array, "K V"], threshold: float) -> Bool[Array, " V"]:
    """Find codes whose share of all hits is below `threshold` times a uniform share 1/V."""
    share = hits.sum(0) / jnp.maximum(hits.sum(), 1e-9)
    return share * hits.shape[1] < threshold


# ---------------------------------------------------------------------- updates of the codes


def draw_targets(
    targets: Float[Array, "B L C"], scales: Scales, count: int, key: PRNGKeyArray
) -> Float[Array, "count C"]:
    """Draw `count` random targets, with equal probability from every scale.

    Uniform positions would mostly come from the last map, but the codebook serves all scales.
    """
    image_key, scale_key, position_key = jax.random.split(key, 3)
    scale = jax.random.randint(scale_key, (count,), 0, len(scales))
    starts, ends = jnp.asarray(scales.starts)[scale], jnp.asarray(scales.ends)[scale]
    position = jax.random.randint(position_key, (count,), starts, ends)
    return targets[jax.random.randint(image_key, (count,), 0, targets.shape[0]), position]


def restart(
    codebook: Float[Array, "V C"],
    dead: Bool[Array, " V"],
    targets: Float[Array, "B L C"],
    scales: Scales,
    key: PRNGKeyArray,
) -> Float[Array, "V C"]:
    """Move dead codes onto random targets of this batch, pooled over all scales.

    A restarted code is thus at a residual that some scale has to quantize.  Source: Dhariwal et al. 2020,
    Jukebox.

    Args:
      codebook: the codes.
      dead: True for codes to move.
      targets: residuals that the tokens of this batch were chosen for.
      scales: the schedule.
      key: random key.
    """
    random_targets = draw_targets(targets, scales, codebook.shape[0], key)
    return jnp.where(dead[:, None], random_targets, codebook)


def sums_by_code(
    tokens: Int[Array, "B L"], targets: Float[Array, "B L C"], num_codes: int
) -> tuple[Float[Array, " V"], Float[Array, "V C"]]:
    """Count the uses of each code and sum its targets."""
    uses = jnp.zeros(num_codes).at[tokens.ravel()].add(1.0)
    sums = (
        jnp.zeros((num_codes, targets.shape[-1]))
        .at[tokens.ravel()]
        .add(targets.reshape(-1, targets.shape[-1]))
    )
    return uses, sums


def moving_mean(
    codebook: Float[Array, "V C"],
    uses: Float[Array, " V"],
    tokens: Int[Array, "B L"],
    targets: Float[Array, "B L C"],
    decay: float,
) -> tuple[Float[Array, "V C"], Float[Array, " V"]]:
    """Update each code to the exponential moving mean of its targets.

    The moving sum of the targets is not stored: it is the code times its moving number of uses.  The first
    targets of a code with 0 uses replace it by their mean; a code without targets does not change.  Source:
    van den Oord et al. 2017, appendix A.1.

    Args:
      codebook: the codes.
      uses: moving number of uses of each code, the weight of its present value.
      tokens: of this batch.
      targets: of this batch.
      decay: of the moving sums.

    Returns:
      New codebook and uses.
    """
    new_uses, sums = sums_by_code(tokens, targets, codebook.shape[0])
    weight = decay * uses
    total = (weight + new_uses)[:, None]
    mean = (weight[:, None] * codebook + sums) / jnp.where(total > 0, total, 1)
    return jnp.where(new_uses[:, None] > 0, mean, codebook), weight + new_uses


def kmeans(
    quantizer: Quantizer, features: Float[Array, "B h w C"], key: PRNGKeyArray, resample: Bool[Array, ""]
) -> Float[Array, "V C"]:
    """Fit a codebook to features by k-means, jointly for all scales.

    The targets of scale k depend on the codes at coarser scales, so every round quantizes again before it
    averages.  A code without targets moves to a random target.

    Args:
      quantizer: its codebook is the initial value.
      features: of this batch.
      key: random key.
      resample: True to start from random features instead of the quantizer's codes.
    """
    b, *_, c = features.shape
    num_codes, scales = quantizer.codebook.shape[0], quantizer.scales
    draw = lambda targets, key: draw_targets(targets, scales, num_codes, key)

    def fit(i, codebook):
        quantized = quantizer.replace(codebook=codebook)(features)
        uses, sums = sums_by_code(quantized.tokens, quantized.targets, num_codes)
        random_targets = draw(quantized.targets, jax.random.fold_in(key, i + 1))
        return jnp.where(uses[:, None] > 0, sums / jnp.maximum(uses, 1)[:, None], random_targets)

    pools = [area_resize(features, side).reshape(b, -1, c) for side in scales.sides]
    random_features = draw(jnp.concatenate(pools, axis=1), key)
    init = jnp.where(resample, random_features, quantizer.codebook)
    return jax.lax.fori_loop(0, KMEANS_ROUNDS, fit, init)
