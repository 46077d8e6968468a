"""Matrix FLOPs of the transformer, worked out on paper (a multiplication and an addition are two).

XLA's own count takes the body of a scan once and a kernel as nothing, so it cannot be used here.
"""

from var_jax.transformer.config import TransformerConfig


def _adaln(cfg: TransformerConfig) -> int:
    """Of one label: the six vectors of every block, and the two of the head."""
    return (12 * (1 if cfg.shared_adaln else cfg.depth) + 4) * cfg.width**2


def matrix_parameters(cfg: TransformerConfig) -> int:
    """Entries of all matrices: nearly all parameters."""
    return 12 * cfg.depth * cfg.width**2 + _adaln(cfg) // 2 + cfg.width * (cfg.num_codes + cfg.num_classes)


def _maps(cfg: TransformerConfig, queries: int, keys: int) -> int:
    """Of `queries` positions that attend to `keys`, from codes to logits."""
    d = cfg.width
    blocks = cfg.depth * (24 * queries * d * d + 4 * queries * keys * d)
    return blocks + 2 * queries * d * (cfg.num_codes + cfg.code_dim)


def training_flops(cfg: TransformerConfig) -> int:
    """Of forward and backward of one image; attention counted as if dense."""
    length = cfg.length
    return 3 * (_maps(cfg, length, length) + _adaln(cfg))


def generation_flops(
    cfg: TransformerConfig, num_guided_scales: int, steps: int | None = None, cached: bool = True
) -> int:
    """Of one image drawn step by step: token maps, or tokens, in turn; attention to the keys so far.

    (The scan over tokens multiplies by the whole cache, under a mask: twice the products of attention.)

    Args:
      num_guided_scales: the first so many steps are computed with and without class.
      steps: how many are made; None for all.
      cached: keys and values are kept; without, every step computes all positions so far anew.
    """
    total = _adaln(cfg) * (2 if num_guided_scales else 1)
    for i, (start, end) in enumerate(cfg.steps[:steps]):
        total += _maps(cfg, end - start if cached else end, end) * (2 if i < num_guided_scales else 1)
    return total
