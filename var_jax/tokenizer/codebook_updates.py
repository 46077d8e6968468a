"""Keeping a codebook alive: which codes are used, where new ones should be, and where unused ones should go.

Statistics are taken over the whole global batch: under `jit` the counts and sums of a sharded batch are
summed over all devices.
"""

import jax
import jax.numpy as jnp

from var_jax.scales import Scales
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.tokenizer.resize import area_resize

KMEANS_ROUNDS = 10  # of assigning and averaging, a step


# ---------------------------------------------------------------------- how codes are used


def count_codes(tokens: jax.Array, scales: Scales, num_codes: int, weights: jax.Array | None = None):
    """How often each code is used at each scale.

    Args:
      tokens: int32 [B, L].
      scales: the schedule.
      num_codes: V.
      weights: [B], 1 for images that count and 0 for padding; all count by default.

    Returns:
      float32 [K, V].
    """
    cells = jnp.asarray(scales.levels) * num_codes + tokens
    weights = jnp.ones(tokens.shape[0]) if weights is None else weights
    weights = jnp.broadcast_to(weights[:, None], tokens.shape).astype(jnp.float32)
    counts = jnp.zeros(len(scales) * num_codes).at[cells.ravel()].add(weights.ravel())
    return counts.reshape(len(scales), num_codes)


def codebook_use(counts: jax.Array, sides: tuple[int, ...], num_images: jax.Array) -> dict[str, jax.Array]:
    """Use of the codes, from how often each was chosen.

    One batch of B images can hit at most B s_k^2 codes at scale k, so use is only meaningful over many
    images and beside the most that they could have used.

    Args:
      counts: [K, V], times that each code was chosen at each scale.
      sides: of the K maps.
      num_images: that the counts are over.

    Returns:
      Scalars: for scale k `perplexity_k` (exponential of the entropy of the shares), `distinct_k` (codes
      used at all) and `most_k` (the most codes that so many images could have used), and the three over
      all scales, without a number.
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


def dead_codes(hits: jax.Array, threshold: float) -> jax.Array:
    """bool [V]: codes whose share of all hits [K, V] is below `threshold` times an even share 1/V."""
    share = hits.sum(0) / jnp.maximum(hits.sum(), 1e-9)
    return share * hits.shape[1] < threshold


# ---------------------------------------------------------------------- where codes should be


def draw_targets(targets: jax.Array, scales: Scales, count: int, key: jax.Array) -> jax.Array:
    """Targets [B, L, C] -> `count` random ones [count, C].

    They come from all scales alike: the last map has most of the positions, but a code serves all.
    """
    image_key, scale_key, position_key = jax.random.split(key, 3)
    scale = jax.random.randint(scale_key, (count,), 0, len(scales))
    starts, ends = jnp.asarray(scales.starts)[scale], jnp.asarray(scales.ends)[scale]
    position = jax.random.randint(position_key, (count,), starts, ends)
    return targets[jax.random.randint(image_key, (count,), 0, targets.shape[0]), position]


def restart(
    codebook: jax.Array, dead: jax.Array, targets: jax.Array, scales: Scales, key: jax.Array
) -> jax.Array:
    """Moves dead codes onto random targets.

    Targets are what the tokens of this batch were chosen for, pooled over all scales, so that a new
    code lands where some scale needs one (the restart of Dhariwal et al. 2020, Jukebox).

    Args:
      codebook: [V, C].
      dead: bool [V].
      targets: [B, L, C].
      scales: the schedule.
      key: random key.

    Returns:
      [V, C].
    """
    fresh = draw_targets(targets, scales, codebook.shape[0], key)
    return jnp.where(dead[:, None], fresh, codebook)


def sums_by_code(tokens: jax.Array, targets: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B, L] and targets [B, L, C] -> uses [V] of each code and sums [V, C] of its targets."""
    uses = jnp.zeros(num_codes).at[tokens.ravel()].add(1.0)
    sums = (
        jnp.zeros((num_codes, targets.shape[-1]))
        .at[tokens.ravel()]
        .add(targets.reshape(-1, targets.shape[-1]))
    )
    return uses, sums


def moving_mean(
    codebook: jax.Array, uses: jax.Array, tokens: jax.Array, targets: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """Each code becomes a moving mean of its targets (van den Oord et al. 2017, appendix A.1).

    The moving sum of the targets is not kept: it is the code times its moving number of uses.  A code with 0
    uses so far goes to the mean of its first targets; one without any stays.

    Args:
      codebook: [V, C].
      uses: [V], moving number of uses: how much weight the present codes have.
      tokens, targets: int32 [B, L] and [B, L, C], of this batch.
      decay: of the moving sums.

    Returns:
      New codebook and uses.
    """
    new_uses, sums = sums_by_code(tokens, targets, codebook.shape[0])
    weight = decay * uses
    total = (weight + new_uses)[:, None]
    mean = (weight[:, None] * codebook + sums) / jnp.where(total > 0, total, 1)
    return jnp.where(new_uses[:, None] > 0, mean, codebook), weight + new_uses


def kmeans(quantizer: Quantizer, features: jax.Array, key: jax.Array, resample: jax.Array) -> jax.Array:
    """A codebook fitted to features, all scales together.

    The targets of scale k depend on the codes of the scales before it, so that every round quantises anew
    before it averages.  A code without targets goes to a random one.

    Args:
      quantizer: where it starts.
      features: [B, h, w, C].
      key: random key.
      resample: bool scalar; start from random features in place of the quantizer's codes.

    Returns:
      Codebook [V, C].
    """
    b, *_, c = features.shape
    num_codes, scales = quantizer.codebook.shape[0], quantizer.scales
    draw = lambda targets, key: draw_targets(targets, scales, num_codes, key)  # noqa: E731

    def fit(i, codebook):
        quantized = quantizer.replace(codebook=codebook)(features)
        uses, sums = sums_by_code(quantized.tokens, quantized.targets, num_codes)
        fresh = draw(quantized.targets, jax.random.fold_in(key, i + 1))
        return jnp.where(uses[:, None] > 0, sums / jnp.maximum(uses, 1)[:, None], fresh)

    pools = [area_resize(features, side).reshape(b, -1, c) for side in scales.sides]
    first = draw(jnp.concatenate(pools, axis=1), key)
    return jax.lax.fori_loop(0, KMEANS_ROUNDS, fit, jnp.where(resample, first, quantizer.codebook))
