"""What next-scale and next-token transformers share: everything but the order of prediction.

Label and positions in, adaLN blocks, logits out, with the published initialisation (Tian et al. 2024).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.dtypes import product_precision
from var_jax.sharding import constrain, replicate
from var_jax.transformer import positions
from var_jax.transformer.block import AttentionContext, Block, KVCache, Modulation, dense, modulate, normal
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.remat import rematerialized

LOGITS_CHUNK = 1024  # positions whose logits live at once in training: all at 256px, a part at 512px


@flax.struct.dataclass
class Condition:
    """All that a label decides, worked out once an image: float32.

    Attributes:
      class_embedding: [B, D], input of the first positions.
      blocks: [layers, B, 6, D], adaLN vectors of every block.
      head: [B, 2, D], scale and shift before the head.
    """

    class_embedding: jax.Array
    blocks: jax.Array
    head: jax.Array

    def conditional(self) -> "Condition":
        """Of every other label, from the first on: what is left when guidance ends."""
        return Condition(self.class_embedding[::2], self.blocks[:, ::2], self.head[::2])


class Blocks(nn.Module):
    """All blocks, scanned over a leading axis of their parameters."""

    config: TransformerConfig
    dtype: jnp.dtype
    attention: str
    remat: str

    @nn.compact
    def __call__(self, x, modulations, context=AttentionContext(), cache=None, start=0, train=False):  # noqa: B008
        """Apply all blocks.

        Args:
          x: residual stream, float32 [B, n, D].
          modulations: adaLN vectors of every block, float32 [depth, B, 6, D].
          context: positional terms of attention.
          cache, start: KV cache, and first position of x where that is static; generation only.
          train: drop paths and activations.

        Returns:
          x and the cache.
        """
        cfg = self.config
        stack = nn.scan(
            rematerialized(Block, self.remat if train else "none"),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=cfg.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype, self.attention, start, train, name="layers")
        rates = jnp.linspace(0.0, cfg.drop_path, cfg.depth)
        (x, cache), _ = stack((x, cache), (jnp.arange(cfg.depth), modulations, rates), context)
        return x, cache


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, n, D] times kernel [D, V] -> float32 [B, n, V], summed up in float32 and not rounded after that.

    In the backward pass the gradient of the logits is rounded to the dtype of x and kernel: a product of
    float32 and bfloat16 would run in float32.
    """
    return _product(x, kernel, preferred_element_type=jnp.float32)


def _project_forward(x, kernel):
    return _project(x, kernel), (x, kernel)


def _project_backward(factors, gradient):
    x, kernel = factors
    gradient = gradient.astype(x.dtype)
    (x_gradient,) = jax.linear_transpose(lambda x: _product(x, kernel), x)(gradient)
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: _product(x, kernel), kernel)(gradient)
    return x_gradient, kernel_gradient


_project.defvjp(_project_forward, _project_backward)


def _product(x, kernel, **how):
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, precision=product_precision(x.dtype), **how)


class Head(nn.Module):
    """Linear D -> V; the product of operands of `dtype`, the logits float32."""

    num_codes: int
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(self.kernel_init, ("embed", "codes"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("codes",))
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.num_codes))
        bias = self.param("bias", bias_init, (self.num_codes,))
        return _project(x.astype(self.dtype), kernel.astype(self.dtype)) + bias


class ARTransformer(nn.Module):
    """Logits of every token given those before it in the order of prediction, and a label.

    Attributes:
      config: the architecture.
      dtype: of the matrix products; norms, embeddings, residual stream and logits are float32.
      attention: its implementation (see `attend`).
      remat: what a block keeps for its backward pass (see `transformer/remat.py`).
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    def setup(self):
        cfg = self.config
        d, init = cfg.width, nn.with_logical_partitioning(normal(cfg.width), (None, "embed"))
        self.class_embedding = self.param("class_embedding", init, (cfg.num_classes + 1, d))
        self.start_embedding = self.param("start_embedding", init, (cfg.num_start_tokens, d))
        if cfg.levels is not None:
            self.level_embedding = self.param("level_embedding", init, (len(cfg.scales), d))
        self._setup_positions(init)
        self.code_embedding = dense(d, (None, "embed"), normal(d), jnp.float32, None)  # as published
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
        self.head = Head(cfg.num_codes, normal(d, 0.02), self.dtype)

    def _setup_positions(self, init):
        """The parameters of positions, float32: tables of width D, or a bias of each bucket and head."""
        cfg = self.config
        if cfg.absolute == "learned_1d":
            self.position_embedding = self.param("position_embedding", init, (cfg.length, cfg.width))
        if cfg.absolute == "learned_2d":
            self.row_embedding = self.param("row_embedding", init, (cfg.coords.side, cfg.width))
            self.column_embedding = self.param("column_embedding", init, (cfg.coords.side, cfg.width))
        if cfg.relative == "relative_2d":
            none = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "heads"))
            self.distance_bias = self.param("distance_bias", none, (positions.BUCKETS, cfg.num_heads))

    def __call__(self, labels: jax.Array, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Teacher-forced logits.

        Args:
          labels: int32 [B]; num_classes means "no class".
          inputs: float32 [B, L - num_start_tokens, C], what each position but the first ones is given
            (`sampling/teacher_forcing.py`).
          train: drop labels, paths and activations; needs the rng stream "dropout".

        Returns:
          float32 [B, L, V].
        """
        x, condition = self._body(labels, inputs, train)
        return self.logits(x, condition.head)

    def losses(self, labels: jax.Array, inputs: jax.Array, tokens: jax.Array, train: bool = False):
        """Cross-entropy of every token; no more than `LOGITS_CHUNK` positions' logits live at once.

        Args:
          labels, inputs, train: as for `__call__`.
          tokens: int32 [B, L], the true ones, in the order of prediction.

        Returns:
          Losses float32 [B, L] in nats; bool [B, L], whether no code has a larger logit than the true one.
        """
        x, condition = self._body(labels, inputs, train)
        length = tokens.shape[1]
        chunks = -(-length // LOGITS_CHUNK)
        size = -(-length // chunks)

        def loss(module, x, tokens, head):
            logits = module.logits(x, head)
            # A sum in place of a lookup, and no argmax: of codes split over devices, neither gathers logits.
            true = jnp.arange(logits.shape[-1]) == tokens[..., None]
            wanted = jnp.sum(jnp.where(true, logits, 0.0), -1)
            return jax.nn.logsumexp(logits, -1) - wanted, wanted >= logits.max(-1)

        loss, result = nn.remat(loss), []
        for start in range(0, length, size):
            part = slice(start, start + size)
            result.append(loss(self, x[:, part], tokens[:, part], condition.head))
        return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*result, strict=True))

    def _body(self, labels, inputs, train):
        """The residual stream float32 [B, L, D] after all blocks, and the condition."""
        cfg = self.config
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), cfg.class_dropout_prob, labels.shape)
            labels = jnp.where(dropped, cfg.num_classes, labels)
        condition = self.condition(labels)
        x = constrain(self.embed(condition, inputs))
        tables = cfg.position_tables.at(0, cfg.length, cfg.length)
        context = self.attention_context(tables, masked=len(cfg.masks) > 1)
        x, _ = self.blocks(x, condition.blocks, context, train=train)
        return x, condition

    def condition(self, labels: jax.Array) -> Condition:
        """Labels int32 [B] -> all adaLN vectors."""
        cfg, embedded = self.config, constrain(replicate(self.class_embedding)[labels])
        active = nn.silu(embedded)
        if cfg.shared_adaln:
            six = constrain(self.shared_adaln(active).reshape(-1, 6, cfg.width)).astype(jnp.float32)
            blocks = self.adaln_offset[:, None] + six
        else:
            _, blocks = self.adaln(active, None)
        head = constrain(self.head_adaln(active).reshape(-1, 2, cfg.width)).astype(jnp.float32)
        return Condition(embedded, blocks, head)

    def empty_cache(self, batch: int) -> KVCache:
        """A cache for `batch` sequences of L positions."""
        cfg = self.config
        return KVCache.zeros(cfg.depth, batch, cfg.length, cfg.num_heads, cfg.head_dim, self.dtype)

    def embed(self, condition: Condition, inputs: jax.Array | None, start: int | jax.Array = 0) -> jax.Array:
        """Compute the residual stream that enters the blocks, positions added.

        Args:
          condition: of the labels [B].
          inputs: float32 [B, n, C] of the positions from `start` on, without those whose input is the label
            alone; None for these alone.
          start: first position, an int; or an int32 scalar known only at run time, then of one position,
            whose input is not looked at where it is the first.

        Returns:
          float32 [B, n, D].
        """
        first = condition.class_embedding[:, None] + self.start_embedding
        if inputs is None:
            x = first
        elif not isinstance(start, int):
            x = jnp.where(start == 0, first, self.code_embedding(inputs))
        elif start == 0:
            x = jnp.concatenate([first, self.code_embedding(inputs)], axis=1)
        else:
            x = self.code_embedding(inputs)
        return self._add_positions(x, start)

    def _add_positions(self, x: jax.Array, start: int | jax.Array) -> jax.Array:
        """Add level and absolute position embeddings to x [B, n, D], of the positions from `start` on."""
        cfg, size = self.config, x.shape[1]
        tables = cfg.position_tables.at(start, size, cfg.length)
        if tables.levels is not None:
            x = x + replicate(self.level_embedding)[tables.levels]
        if cfg.absolute == "learned_1d":
            return x + positions.rows(self.position_embedding, start, size)
        if cfg.absolute == "learned_2d":
            product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            x = x + product(tables.row_weights, self.row_embedding)
            return x + product(tables.column_weights, self.column_embedding)
        return x if tables.added is None else x + tables.added

    def attention_context(self, tables: positions.PositionTables, masked: bool) -> AttentionContext:
        """Compute the positional terms of attention.

        Args:
          tables: of the positions that attend, and the keys that they see.
          masked: whether to pass their masks; otherwise they see all keys, or, without a cache, as the
            architecture says.
        """
        bias = None
        if tables.distance_buckets is not None:
            bias = jnp.moveaxis(replicate(self.distance_bias)[tables.distance_buckets], -1, 0)
        masks = jnp.asarray(tables.masks) if masked else None
        return AttentionContext(masks=masks, bias=bias, rope_angles=tables.rope_angles)

    def logits(self, x: jax.Array, head_modulation: jax.Array) -> jax.Array:
        """Compute logits float32 [B, n, V] from x [B, n, D] after the blocks; adaLN vectors [B, 2, D]."""
        normed = modulate(x, head_modulation[:, 0], head_modulation[:, 1])
        return constrain(self.head(normed), tensor=2)
