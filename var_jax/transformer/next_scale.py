"""The VAR transformer: predicts each whole token map from all the coarser ones (Tian et al. 2024)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.partition import gathered, split
from var_jax.transformer.block import Block, Modulation, dense, modulate, normal
from var_jax.transformer.cache import KVCache
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.remat import rematerialized

MOST_LOGITS = 1024  # positions whose logits live at once in training: all at 256px, a part at 512px


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
    attention: str
    remat: str

    @nn.compact
    def __call__(self, x, modulations, cache=None, start=0, train=False):
        cfg = self.config
        stack = nn.scan(
            rematerialized(Block, self.remat if train else "none"),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=0,
            length=cfg.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype, self.attention, start, train, name="layers")
        rates = jnp.linspace(0.0, cfg.drop_path, cfg.depth)
        (x, cache), _ = stack((x, cache), (jnp.arange(cfg.depth), modulations, rates))
        return x, cache


class NextScale(nn.Module):
    """Logits of every token map given the coarser ones and a label.

    Attributes:
      config: the architecture.
      dtype: of the matrix products; norms, residual stream and logits are float32.
      attention: its implementation (see `attend`).
      remat: what a block keeps for its backward pass (see `transformer/remat.py`).
    """

    config: NextScaleConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"

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
        self.blocks = Blocks(cfg, self.dtype, self.attention, self.remat)
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
        x, condition = self._body(labels, inputs, train)
        return self._logits(x, condition.head)

    def losses(self, labels: jax.Array, inputs: jax.Array, tokens: jax.Array, train: bool = False):
        """Cross-entropy of every token; no more than `MOST_LOGITS` positions' logits live at once.

        Args:
          labels, inputs, train: as for `__call__`.
          tokens: int32 [B, L], the true ones.

        Returns:
          Losses float32 [B, L] in nats; bool [B, L], whether no code has a larger logit than the true one.
        """
        x, condition = self._body(labels, inputs, train)
        length = tokens.shape[1]
        chunks = -(-length // MOST_LOGITS)
        size = -(-length // chunks)

        def loss(module, x, tokens, head):
            logits = module._logits(x, head)
            # A sum in place of a lookup, and no argmax: of codes split over devices, neither gathers logits.
            true = jnp.arange(logits.shape[-1]) == tokens[..., None]
            wanted = jnp.sum(jnp.where(true, logits, 0.0), -1)
            return jax.nn.logsumexp(logits, -1) - wanted, wanted >= logits.max(-1)

        loss, found = nn.remat(loss), []
        for start in range(0, length, size):
            part = slice(start, start + size)
            found.append(loss(self, x[:, part], tokens[:, part], condition.head))
        return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))

    def _body(self, labels, inputs, train):
        """The residual stream float32 [B, L, D] after all blocks, and the condition."""
        scales = self.config.schedule
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.config.label_drop, labels.shape)
            labels = jnp.where(dropped, self.config.num_classes, labels)
        condition = self.condition(labels)
        x = jnp.concatenate([self._start(condition), self._embed(inputs)], axis=1)
        x = split(x + gathered(self.level_embedding)[scales.levels] + self.position_embedding)
        x, _ = self.blocks(x, condition.blocks, train=train)
        return x, condition

    def condition(self, labels: jax.Array) -> Condition:
        """Labels int32 [B] -> all adaLN vectors."""
        cfg, embedded = self.config, split(gathered(self.class_embedding)[labels])
        active = nn.silu(embedded)
        if cfg.shared_adaln:
            six = split(self.shared_adaln(active).reshape(-1, 6, cfg.width)).astype(jnp.float32)
            blocks = self.adaln_offset[:, None] + six
        else:
            _, blocks = self.adaln(active, None)
        head = split(self.head_adaln(active).reshape(-1, 2, cfg.width)).astype(jnp.float32)
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
        x, cache = self.blocks(x, condition.blocks, cache, start)
        return self._logits(x, condition.head), cache

    def _start(self, condition: Condition) -> jax.Array:
        return condition.start[:, None] + self.start_embedding

    def _embed(self, inputs: jax.Array) -> jax.Array:
        return self.code_embedding(inputs).astype(jnp.float32)

    def _logits(self, x: jax.Array, scale_shift: jax.Array) -> jax.Array:
        x = modulate(x, scale_shift[:, 0], scale_shift[:, 1]).astype(self.dtype)
        return split(self.head(x), tensor=2).astype(jnp.float32)
