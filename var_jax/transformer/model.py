"""Autoregressive transformer with adaLN blocks, the base of the next-scale and next-token models.

The initialization is the published one (Tian et al. 2024).
"""

from functools import partial
from operator import itemgetter

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from var_jax.sharding import constrain, replicate
from var_jax.transformer import positions
from var_jax.transformer.block import (
    AttentionContext,
    Block,
    CrossKeys,
    CrossProjection,
    KVCache,
    Modulation,
    dense,
    normal_init,
)
from var_jax.transformer.condition import ENCODERS, Conditions
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.elementwise import modulate
from var_jax.transformer.head import Head
from var_jax.transformer.layer_params import stack_layers, unstack_layers
from var_jax.transformer.remat import rematerialized

Cache = KVCache | tuple[KVCache, ...]  # of all layers, if they are scanned, or one for each

LOGITS_CHUNK = 1024  # maximum number of positions whose logits exist at once in training: all at 256px


@flax.struct.dataclass
class Condition:
    """Conditioning on the label, the caption or the embedding, computed once per image.

    Attributes:
      vector: input of the first positions: the class embedding, or that of the whole sequence.
      blocks: adaLN vectors of every block.
      head: scale and shift before the head.
      cross: keys and values of cross-attention in every block; None with labels.
    """

    vector: Float32[Array, "B D"]
    blocks: Float32[Array, "layers B 6 D"]
    head: Float32[Array, "B 2 D"]
    cross: CrossKeys | None = None

    def conditional(self) -> "Condition":
        """Return the condition of the conditional sequences, the even ones of the guided batch."""
        cross = jax.tree.map(lambda x: x[:, ::2], self.cross)
        return Condition(self.vector[::2], self.blocks[:, ::2], self.head[::2], cross)


class Blocks(nn.Module):
    """All blocks: scanned over a leading axis of their parameters, or unrolled.

    Attributes:
      config: the architecture.
      dtype: of the matrix products.
      attention: the implementation (see `attend`).
      remat: rematerialization policy (see `transformer/remat.py`).
      scan_layers: see `ARTransformer`.
    """

    config: TransformerConfig
    dtype: DTypeLike
    attention: str
    remat: str
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float32[Array, "B n D"],
        modulations: Float32[Array, "layers B 6 D"],
        cross: CrossKeys | None = None,
        context: AttentionContext = AttentionContext(),  # noqa: B008  (immutable)
        cache: Cache | None = None,
        start: int = 0,
        train: bool = False,
    ) -> tuple[Float32[Array, "B n D"], Cache | None]:
        """Apply all blocks.

        Args:
          x: residual stream.
          modulations: adaLN vectors of every block.
          cross: keys and values of cross-attention in every block; None for none.
          context: positional terms of attention.
          cache: keys and values of earlier positions; generation only.
          start: first position of x in the cache, unless the context has a `cache_index`.
          train: apply dropout and stochastic depth.

        Returns:
          The residual stream and the cache.
        """
        cfg = self.config
        block = rematerialized(Block, self.remat if train else "none", self.scan_layers)
        fields = (cfg, self.dtype, self.attention, start)
        rates = np.linspace(0.0, cfg.drop_path, cfg.depth, dtype=np.float32)
        keys = None
        if train and (cfg.dropout or cfg.drop_path):
            keys = jax.random.split(self.make_rng("dropout"), cfg.depth)
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=cfg.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(*fields, name="layers")
            scanned = (jnp.arange(cfg.depth), modulations, cross, rates, keys)
            (x, cache), _ = stack((x, cache), scanned, context)
            return x, cache
        caches = [None] * cfg.depth if cache is None else list(cache)
        for i in range(cfg.depth):
            own_cross = jax.tree.map(itemgetter(i), cross)
            scanned = (i, modulations[i], own_cross, rates[i], None if keys is None else keys[i])
            (x, caches[i]), _ = block(*fields, name=f"layers_{i}")((x, caches[i]), scanned, context)
        return x, None if cache is None else tuple(caches)


def drop_conditions(
    config: TransformerConfig, labels: Conditions, is_dropped: Bool[Array, " B"]
) -> Conditions:
    """Replace the conditions of some images by "no condition"."""
    is_dropped = is_dropped.reshape(-1, *(1,) * (labels.ndim - 1))
    return jnp.where(is_dropped, config.null_condition, labels)


def choose_scan(scan_layers: str, platform: str, sampling: bool = False) -> bool:
    """Resolve `config.transformer.scan_layers`: `auto` scans on a TPU, and on a CPU in training.

    A scan compiles one block instead of all, and gathers the weights of one at a time (FSDP), but it copies
    each layer's weights and saved activations from and to stacks.  On a CPU a training step was faster with
    it all the same (docs/performance.md), and XLA recomputes nothing there for remat outside a scan.

    Raises:
      ValueError: if it is not `auto`, `true` or `false`.
    """
    choices = {
        "auto": platform == "tpu" or (platform == "cpu" and not sampling),
        "true": True,
        "false": False,
    }
    if scan_layers not in choices:
        raise ValueError(f"transformer.scan_layers must be auto, true or false; got {scan_layers!r}")
    return choices[scan_layers]


class ARTransformer(nn.Module):
    """Transformer that predicts every token from the condition and the tokens before it in prediction order.

    Attributes:
      config: the architecture.
      dtype: of the matrix products; norms, embeddings, residual stream and logits are float32.
      attention: the implementation (see `attend`).
      remat: rematerialization policy of the blocks (see `transformer/remat.py`).
      scan_layers: scan the blocks, whose parameters then have a leading axis of layers, as in checkpoints.
        Otherwise they are unrolled, and each has parameters of its own (see `layer_params.py`).
    """

    config: TransformerConfig
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    def setup(self):
        cfg = self.config
        d = cfg.width
        init = nn.with_logical_partitioning(normal_init(d), (None, "embed"))
        if cfg.condition == "label":
            self.class_embedding = self.param("class_embedding", init, (cfg.num_classes + 1, d))
        else:
            self.encoder = ENCODERS[cfg.condition](cfg, self.dtype)
            self.cross = self._each_layer(CrossProjection)
        self.start_embedding = self.param("start_embedding", init, (cfg.num_start_tokens, d))
        if cfg.levels is not None:
            self.level_embedding = self.param("level_embedding", init, (len(cfg.scales), d))
        self._setup_positions(init)
        self.code_embedding = dense(d, (None, "embed"), normal_init(d), jnp.float32, None)  # as published
        if cfg.shared_adaln:
            self.shared_adaln = dense(6 * d, ("embed", "mlp"), normal_init(d), self.dtype, None)
            offset_init = lambda key, shape: (  # std D^-1/2, gates small, the rest halved
                jax.random.normal(key, shape) * d**-0.5 * np.array([cfg.gamma_init] * 2 + [0.5] * 4)[:, None]
            )
            offset_init = nn.with_logical_partitioning(offset_init, ("layers", None, "embed"))
            self.adaln_offset = self.param("adaln_offset", offset_init, (cfg.depth, 6, d))
        else:
            self.adaln = self._each_layer(Modulation)
        self.blocks = Blocks(cfg, self.dtype, self.attention, self.remat, self.scan_layers)
        self.head_adaln = dense(2 * d, ("embed", "mlp"), normal_init(d, 0.5), self.dtype, None)
        self.head = Head(cfg.num_codes, normal_init(d, 0.02), self.dtype)

    def _each_layer(self, module: type[nn.Module]) -> nn.Module | list[nn.Module]:
        """Create a projection of the condition for each block: scanned, or a list."""
        cfg = self.config
        if not self.scan_layers:
            return [module(cfg, self.dtype) for _ in range(cfg.depth)]
        return nn.scan(
            module,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype)

    def _project_condition(self, projections: nn.Module | list[nn.Module], inputs):
        """Apply the projections of `_each_layer`; results have a leading axis of layers."""
        if self.scan_layers:
            return projections(inputs, None)[1]
        layers = [projection(inputs, None)[1] for projection in projections]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def _setup_positions(self, init):
        """Create the parameters of positions: tables of width D, or a bias per distance bucket and head."""
        cfg = self.config
        if cfg.absolute == "learned_1d":
            self.position_embedding = self.param("position_embedding", init, (cfg.length, cfg.width))
        if cfg.absolute == "learned_2d":
            self.row_embedding = self.param("row_embedding", init, (cfg.coords.side, cfg.width))
            self.column_embedding = self.param("column_embedding", init, (cfg.coords.side, cfg.width))
        if cfg.relative == "relative_2d":
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "heads"))
            self.distance_bias = self.param("distance_bias", bias_init, (positions.BUCKETS, cfg.num_heads))

    def __call__(
        self, labels: Conditions, inputs: Float[Array, "B n C"], train: bool = False
    ) -> Float32[Array, "B L V"]:
        """Compute teacher-forced logits.

        Args:
          labels: condition of each image: its class, where num_classes means "no class"; or the words of its
            caption, or its embedding, as in `var_jax/conditions.py`.
          inputs: inputs of all positions but the start tokens, n = L - num_start_tokens (see
            `sampling/teacher_forcing.py`).
          train: drop conditions, and apply dropout and stochastic depth; needs the rng stream "dropout".
        """
        x, condition = self._apply_blocks(labels, inputs, train)
        return self.logits(x, condition.head)

    def losses(
        self,
        labels: Conditions,
        inputs: Float[Array, "B n C"],
        tokens: Int[Array, "B L"],
        train: bool = False,
    ) -> tuple[Float32[Array, "B L"], Bool[Array, "B L"]]:
        """Compute the cross-entropy of every token, with logits of at most `LOGITS_CHUNK` positions at once.

        Args:
          labels: see `__call__`.
          inputs: see `__call__`.
          tokens: the true tokens, in prediction order.
          train: see `__call__`.

        Returns:
          Losses in nats, and whether the true token has the largest logit.
        """
        x, condition = self._apply_blocks(labels, inputs, train)
        length = tokens.shape[1]
        chunks = -(-length // LOGITS_CHUNK)
        size = -(-length // chunks)

        def loss(module, x, tokens, head):
            logits = module.logits(x, head)
            # A sum instead of indexing, and no argmax: if codes are sharded, neither gathers the logits.
            is_true_code = jnp.arange(logits.shape[-1]) == tokens[..., None]
            true_logits = jnp.sum(jnp.where(is_true_code, logits, 0.0), -1)
            return jax.nn.logsumexp(logits, -1) - true_logits, true_logits >= logits.max(-1)

        loss = nn.remat(loss)
        chunk_results = []
        for start in range(0, length, size):
            part = slice(start, start + size)
            chunk_results.append(loss(self, x[:, part], tokens[:, part], condition.head))
        return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*chunk_results, strict=True))

    def _apply_blocks(self, labels, inputs, train):
        """Compute the residual stream float32 [B, L, D] after all blocks, and the condition."""
        cfg = self.config
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), cfg.class_dropout_prob, labels.shape[:1])
            labels = drop_conditions(cfg, labels, dropped)
        condition = self.condition(labels)
        x = constrain(self.embed(condition, inputs))
        tables = cfg.position_tables.at(0, cfg.length, cfg.length)
        # `SelfAttention` takes a single mask from the config: remat would trace an argument.
        context = self.attention_context(tables, masked=len(cfg.masks) > 1)
        x, _ = self.blocks(x, condition.blocks, condition.cross, context, train=train)
        return x, condition

    def own_layout(self, params: dict) -> dict:
        """Convert parameters from the layout of checkpoints to that of this model."""
        return params if self.scan_layers else unstack_layers(params)

    def checkpoint_layout(self, params: dict) -> dict:
        """Invert `own_layout`; parameters of unrolled layers are copied to the host."""
        return params if self.scan_layers else stack_layers(params)

    def condition(self, labels: Conditions) -> Condition:
        """Compute the vectors of the conditions, all adaLN vectors, and the keys of cross-attention.

        Raises:
          ValueError: on conditions of another kind than those of the config.
        """
        cfg, cross = self.config, None
        cfg.check_conditions(labels)
        if cfg.condition == "label":
            vector = constrain(replicate(self.class_embedding)[labels])
        else:
            vector, *rows = self.encoder(labels)
            cross = self._project_condition(self.cross, tuple(rows))
        active = nn.silu(vector)
        if cfg.shared_adaln:
            vectors = constrain(self.shared_adaln(active).reshape(-1, 6, cfg.width)).astype(jnp.float32)
            blocks = self.adaln_offset[:, None] + vectors
        else:
            blocks = self._project_condition(self.adaln, active)
        head = constrain(self.head_adaln(active).reshape(-1, 2, cfg.width)).astype(jnp.float32)
        return Condition(vector, blocks, head, cross)

    def empty_cache(self, batch: int) -> Cache | None:
        """Create a cache for `batch` sequences of L positions; None if no step reads earlier ones."""
        cfg = self.config
        if not cfg.uses_cache:
            return None
        layers = cfg.depth if self.scan_layers else 1
        cache = KVCache.zeros(layers, batch, cfg.length, cfg.num_heads, cfg.head_dim, self.dtype)
        return cache if self.scan_layers else (cache,) * cfg.depth

    def embed(
        self,
        condition: Condition,
        inputs: Float[Array, "B inputs C"] | None,
        start: int | Int[Array, ""] = 0,
    ) -> Float32[Array, "B n D"]:
        """Compute the residual stream before the first block, with position embeddings.

        Args:
          condition: of the images.
          inputs: of the positions from `start` on, without the start tokens; None for the start tokens only.
          start: first position.  If it is traced, there is one position, whose input is ignored at start 0.
        """
        start_tokens = condition.vector[:, None] + self.start_embedding
        if inputs is None:
            x = start_tokens
        elif not isinstance(start, int):
            x = jnp.where(start == 0, start_tokens, self.code_embedding(inputs))
        elif start == 0:
            x = jnp.concatenate([start_tokens, self.code_embedding(inputs)], axis=1)
        else:
            x = self.code_embedding(inputs)
        return self._add_positions(x, start)

    def _add_positions(self, x: jax.Array, start: int | jax.Array) -> jax.Array:
        """Add level and absolute position embeddings to x [B, n, D], of the positions from `start` on."""
        cfg = self.config
        size = x.shape[1]
        tables = cfg.position_tables.at(start, size, cfg.length)
        if tables.levels is not None:
            x = x + replicate(self.level_embedding)[tables.levels]
        if cfg.absolute == "learned_1d":
            return x + positions.slice_rows(self.position_embedding, start, size)
        if cfg.absolute == "learned_2d":
            product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            x = x + product(tables.row_weights, self.row_embedding)
            return x + product(tables.column_weights, self.column_embedding)
        return x if tables.added is None else x + tables.added

    def attention_context(self, tables: positions.PositionTables, masked: bool) -> AttentionContext:
        """Compute the positional terms of attention.

        Args:
          tables: rows of the queries, and columns of the keys.
          masked: pass the masks of the tables.  Otherwise the mask is that of the architecture, or, with a
            cache, none.
        """
        bias = None
        if tables.distance_buckets is not None:
            bias = jnp.moveaxis(replicate(self.distance_bias)[tables.distance_buckets], -1, 0)
        masks = jnp.asarray(tables.masks) if masked else None
        return AttentionContext(masks=masks, bias=bias, rope_angles=tables.rope_angles)

    def logits(
        self, x: Float32[Array, "B n D"], head_modulation: Float32[Array, "B 2 D"]
    ) -> Float32[Array, "B n V"]:
        """Compute logits from the residual stream after the blocks and the adaLN vectors of the head."""
        normed = modulate(x, head_modulation[:, 0], head_modulation[:, 1], self.dtype)
        return constrain(self.head(normed), tensor_axis=2)
