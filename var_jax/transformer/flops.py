"""Matrix FLOPs of the transformer, worked out on paper (a multiplication and an addition are two).

XLA's own count takes the body of a scan once and a kernel as nothing, so it cannot be used here.
"""

from var_jax.transformer.config import NextScaleConfig


def _adaln(cfg: NextScaleConfig) -> int:
    """Of one label: the six vectors of every block, and the two of the head."""
    return (12 * (1 if cfg.shared_adaln else cfg.depth) + 4) * cfg.width**2


def matrix_parameters(cfg: NextScaleConfig) -> int:
    """Entries of all matrices: nearly all parameters."""
    return 12 * cfg.depth * cfg.width**2 + _adaln(cfg) // 2 + cfg.width * (cfg.num_codes + cfg.num_classes)


def _maps(cfg: NextScaleConfig, queries: int, keys: int) -> int:
    """Of `queries` positions that attend to `keys`, from codes to logits."""
    d = cfg.width
    blocks = cfg.depth * (24 * queries * d * d + 4 * queries * keys * d)
    return blocks + 2 * queries * d * (cfg.num_codes + cfg.code_dim)


def training_flops(cfg: NextScaleConfig) -> int:
    """Of forward and backward of one image; attention counted as if dense."""
    length = cfg.schedule.length
    return 3 * (_maps(cfg, length, length) + _adaln(cfg))


def generation_flops(cfg: NextScaleConfig, guided: int, scales: int | None = None) -> int:
    """Of one image drawn with a cache.

    Args:
      guided: the first so many scales are computed with and without class.
      scales: how many are drawn; None for all.
    """
    schedule, total = cfg.schedule, _adaln(cfg) * (2 if guided else 1)
    for k in range(len(schedule) if scales is None else scales):
        start, end = schedule.starts[k], schedule.ends[k]
        total += _maps(cfg, end - start, end) * (2 if k < guided else 1)
    return total
