"""The VAR transformer: predicts each whole token map from all the coarser ones (Tian et al. 2024)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.transformer.attention import KVCache
from var_jax.transformer.block import SAVED_NAMES, Block, Modulation, dense, modulate, normal
from var_jax.transformer.config import NextScaleConfig


@flax.struct.dataclass
class Condition:
    """All that a label decides, worked out once an image: float32.

    Attributes:
      start: [B, D], the class embedding, input of the first scale.
      blocks: [layers, B, 6, D], adaLN vectors of every block.
      head: [B, 2, D], scale and shift before the head.
    """

    start: jax.Array
    blocks: jax.Array
    head: jax.Array

    def conditional(self) -> "Condition":
        """Of every other label, from the first on: what is left when guidance ends."""
        return Condition(self.start[::2], self.blocks[:, ::2], self.head[::2])


class Blocks(nn.Module):
    """All blocks, scanned over a leading axis of their parameters."""

    config: NextScaleConfig
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, x, modulations, mask, cache=None, start=0, train=False):
        cfg, block = self.config, Block
        if self.remat and train:
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=cfg.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype, start, train, name="layers")
        rates = jnp.linspace(0.0, cfg.drop_path, cfg.depth)
        (x, cache), _ = stack((x, cache), (jnp.arange(cfg.depth), modulations, rates), mask)
        return x, cache


class NextScale(nn.Module):
    """Logits of every token map given the coarser ones and a label.

    Attributes:
      config: the architecture.
      dtype: of the matrix products; norms, residual stream and logits are float32.
      remat: keep only qkv and attention outputs for the backward pass of a block.
    """

    config: NextScaleConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        cfg, scales = self.config, self.config.schedule
        d, init = cfg.width, nn.with_logical_partitioning(normal(cfg.width), (None, "embed"))
        self.class_embedding = self.param("class_embedding", init, (cfg.num_classes + 1, d))
        self.start_embedding = self.param("start_embedding", init, (scales.ends[0], d))
        self.level_embedding = self.param("level_embedding", init, (len(scales), d))
        self.position_embedding = self.param("position_embedding", init, (scales.length, d))
        self.code_embedding = dense(d, (None, "embed"), normal(d), self.dtype, None)
        if cfg.shared_adaln:
            self.shared_adaln = dense(6 * d, ("embed", "mlp"), normal(d), self.dtype, None)
            offset = lambda key, shape: (  # noqa: E731  (std D^-1/2, gates small, the rest halved)
                jax.random.normal(key, shape) * d**-0.5 * np.array([cfg.gamma_init] * 2 + [0.5] * 4)[:, None]
            )
            offset = nn.with_logical_partitioning(offset, ("layers", None, "embed"))
            self.adaln_offset = self.param("adaln_offset", offset, (cfg.depth, 6, d))
        else:
            self.adaln = nn.scan(
                Modulation,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=cfg.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(cfg, self.dtype)
        self.blocks = Blocks(cfg, self.dtype, self.remat)
        self.head_adaln = dense(2 * d, ("embed", "mlp"), normal(d, 0.5), self.dtype, None)
        self.head = dense(cfg.num_codes, ("embed", "codes"), normal(d, 0.02), self.dtype, None)

    def __call__(self, labels: jax.Array, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Teacher-forced logits.

        Args:
          labels: int32 [B]; num_classes means "no class".
          inputs: float32 [B, L - s_0^2, C], resized f_hat of the scales k > 0
            (`Quantizer.teacher_input`).
          train: drop labels, paths and activations; needs the rng stream "dropout".

        Returns:
          float32 [B, L, V].
        """
        scales = self.config.schedule
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.config.label_drop, labels.shape)
            labels = jnp.where(dropped, self.config.num_classes, labels)
        condition = self.condition(labels)
        x = jnp.concatenate([self._start(condition), self._embed(inputs)], axis=1)
        x = x + self.level_embedding[scales.levels] + self.position_embedding
        x, _ = self.blocks(x, condition.blocks, scales.mask, train=train)
        return self._logits(x, condition)

    def condition(self, labels: jax.Array) -> Condition:
        """Labels int32 [B] -> all adaLN vectors."""
        cfg, embedded = self.config, self.class_embedding[labels]
        active = nn.silu(embedded)
        if cfg.shared_adaln:
            six = self.shared_adaln(active).reshape(-1, 6, cfg.width).astype(jnp.float32)
            blocks = self.adaln_offset[:, None] + six
        else:
            _, blocks = self.adaln(active, None)
        head = self.head_adaln(active).reshape(-1, 2, cfg.width).astype(jnp.float32)
        return Condition(embedded, blocks, head)

    def empty_cache(self, batch: int) -> KVCache:
        """A cache for `batch` sequences of L positions."""
        cfg = self.config
        return KVCache.zeros(cfg.depth, batch, cfg.schedule.length, cfg.num_heads, cfg.head_dim, self.dtype)

    def step(self, k: int, inputs: jax.Array | None, condition: Condition, cache: KVCache):
        """One scale of generation: logits of map k given a cache that holds the maps before it.

        Args:
          k: the scale, known at compile time.
          inputs: float32 [B, s_k^2, C], the resized f_hat; None at k = 0.
          condition: of the labels [B].
          cache: keys and values of the scales before k.

        Returns:
          Logits float32 [B, s_k^2, V] and the cache with scale k in it.
        """
        start, end = self.config.schedule.starts[k], self.config.schedule.ends[k]
        x = self._start(condition) if k == 0 else self._embed(inputs)
        x = x + self.level_embedding[k] + self.position_embedding[start:end]
        x, cache = self.blocks(x, condition.blocks, None, cache, start)
        return self._logits(x, condition), cache

    def _start(self, condition: Condition) -> jax.Array:
        return condition.start[:, None] + self.start_embedding

    def _embed(self, inputs: jax.Array) -> jax.Array:
        return self.code_embedding(inputs).astype(jnp.float32)

    def _logits(self, x: jax.Array, condition: Condition) -> jax.Array:
        x = modulate(x, condition.head[:, 0], condition.head[:, 1]).astype(self.dtype)
        return self.head(x).astype(jnp.float32)
