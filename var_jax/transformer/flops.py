"""Analytic matrix FLOPs of the transformer; a multiply-add is two FLOPs.

Captions and embeddings count with their maximum length, padding included.

XLA's cost analysis counts the body of a scan once and a Pallas or cuDNN kernel as zero, so it cannot be used.
"""

from var_jax.transformer.config import TransformerConfig


def _adaln_flops(cfg: TransformerConfig) -> int:
    """Count the FLOPs of the adaLN vectors of one label: six per block, and two of the head."""
    return (12 * (1 if cfg.shared_adaln else cfg.depth) + 4) * cfg.width**2


def matrix_parameters(cfg: TransformerConfig) -> int:
    """Count the entries of all matrices, nearly all of the parameters."""
    embeddings = cfg.width * (cfg.num_codes + cfg.num_classes)
    if cfg.condition != "label":
        inputs = len(cfg.vocabulary) if cfg.condition == "caption" else cfg.condition_width
        text = 12 * cfg.text_depth if cfg.condition == "caption" else 0
        embeddings = cfg.width * (cfg.num_codes + inputs + (text + 4 * cfg.depth + 1) * cfg.width)
    return 12 * cfg.depth * cfg.width**2 + _adaln_flops(cfg) // 2 + embeddings


def _condition_flops(cfg: TransformerConfig) -> int:
    """Count the FLOPs of what is computed once per image: encoder, keys of cross-attention, adaLN vectors."""
    d, rows = cfg.width, cfg.condition_length
    if cfg.condition == "label":
        return _adaln_flops(cfg)
    if cfg.condition == "caption":
        encoder = cfg.text_depth * (24 * rows * d * d + 4 * rows**2 * d)
    else:
        encoder = 2 * rows * cfg.condition_width * d
    return _adaln_flops(cfg) + encoder + 2 * d * d + 4 * cfg.depth * rows * d * d


def _sequence_flops(cfg: TransformerConfig, queries: int, pairs: int) -> int:
    """Count the FLOPs of `queries` positions, from codes to logits, with `pairs` of a query and a key."""
    d = cfg.width
    blocks = cfg.depth * (24 * queries * d * d + 4 * pairs * d)
    if cfg.condition != "label":  # cross-attention
        blocks += cfg.depth * (4 * queries * d * d + 4 * queries * cfg.condition_length * d)
    return blocks + 2 * queries * d * (cfg.num_codes + cfg.code_dim)


def training_flops(cfg: TransformerConfig) -> int:
    """Count the FLOPs of the forward and backward pass of one image.

    Attention is counted as dense; under a block-diagonal mask, as dense within each map.
    """
    pairs = cfg.length**2 if cfg.uses_cache else sum((end - start) ** 2 for start, end in cfg.steps)
    return 3 * (_sequence_flops(cfg, cfg.length, pairs) + _condition_flops(cfg))


def generation_flops(
    cfg: TransformerConfig, num_guided_scales: int, steps: int | None = None, cached: bool = True
) -> int:
    """Count the FLOPs of generating one image, each step attending to the positions so far.

    Under a block-diagonal mask, a step attends to its own map alone, and there is nothing to cache.

    The scan of next-token generation attends to the full cache under a mask, which doubles the products of
    attention; this is not counted.

    Args:
      cfg: the architecture.
      num_guided_scales: number of first steps that are computed with and without the condition.
      steps: number of steps (token maps, or tokens); None for all.
      cached: whether keys and values are cached; otherwise every step recomputes all positions so far.
    """
    total = _condition_flops(cfg) * (2 if num_guided_scales else 1)
    for i, (start, end) in enumerate(cfg.steps[:steps]):
        first = 0 if cfg.uses_cache else start
        queries = end - (start if cached else first)
        total += _sequence_flops(cfg, queries, queries * (end - first)) * (2 if i < num_guided_scales else 1)
    return total
