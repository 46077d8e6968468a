"""The multi-scale residual quantizer (Tian et al. 2024, algorithms 1 and 2).

Plain functions of arrays, gathered on one pytree: a codebook, the shared convolutions phi and the
schedule of scales.  The same object serves training (losses, straight-through), tokenizing, the
teacher-forcing input of the transformer, and the step-by-step sum of generation.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from var_jax.scales import Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.resize import area_resize, bicubic_resize

COMMITMENT = 0.25  # weight of the term that pulls features to codes
PHI_SHARE = 0.5  # phi(h) = (1 - share) h + share conv(h)


@flax.struct.dataclass
class Quantized:
    """What training needs of one pass through the quantizer.

    Attributes:
      tokens: int32 [B, L].
      f_hat: [B, h, w, C], the value of the sum of the maps with the gradient of the features.
      loss: [B], codebook loss of each image.
      targets: [B, L, C], the residual that each token was chosen for, with the gradient of the features.
    """

    tokens: jax.Array
    f_hat: jax.Array
    loss: jax.Array
    targets: jax.Array


def _phi_index(k: int, num_scales: int, num_phis: int) -> int:
    """The convolution that scale k shares: the tick nearest to its progress k / (K - 1)."""
    margin = 1 / (3 * num_phis) if num_phis == 4 else 1 / (2 * num_phis)
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


@flax.struct.dataclass
class Quantizer:
    """Codebook [V, C], phi kernels [n, 3, 3, C, C] and biases [n, C] (None: no phi); all float32.

    All products are of precision HIGHEST: a residual rounded by the platform leads to other tokens.
    """

    codebook: jax.Array
    phi_kernel: jax.Array | None
    phi_bias: jax.Array | None
    scales: Scales = flax.struct.field(pytree_node=False)
    l2_normalized: bool = flax.struct.field(pytree_node=False, default=False)
    vq_gradient: str = flax.struct.field(pytree_node=False, default="straight_through")

    @classmethod
    def create(cls, params: dict, config: TokenizerConfig) -> "Quantizer":
        """From the parameters `params["quantizer"]` of a tokenizer of this configuration."""
        return cls(
            jnp.asarray(params["codebook"]),  # a numpy array could not be indexed by traced tokens
            params.get("phi_kernel"),
            params.get("phi_bias"),
            config.schedule,
            config.l2_normalized,
            config.vq_gradient,
        )

    @property
    def codes(self) -> jax.Array:
        """[V, C]: the vectors that tokens stand for."""
        return _unit(self.codebook) if self.l2_normalized else self.codebook

    def nearest(self, z: jax.Array) -> jax.Array:
        """Vectors [..., C] -> int32 [...], the code at the least squared distance (or angle)."""
        codes = self.codes
        dots = jnp.einsum("...c,vc->...v", z, codes, precision=jax.lax.Precision.HIGHEST)
        if self.l2_normalized:  # all codes are equally long: the angle decides
            return dots.argmax(-1).astype(jnp.int32)
        return (jnp.sum(codes**2, -1) - 2 * dots).argmin(-1).astype(jnp.int32)

    def upsample_and_smooth(self, k: int, codes: jax.Array) -> jax.Array:
        """What map k adds to f_hat: codes [B, s_k^2, C] -> [B, h, w, C]."""
        side = self.scales.sides[k]
        h = bicubic_resize(codes.reshape(codes.shape[0], side, side, -1), self.scales.side)
        if self.phi_kernel is None:
            return h
        i = _phi_index(k, len(self.scales), self.phi_kernel.shape[0])
        conv = jax.lax.conv_general_dilated(
            h,
            self.phi_kernel[i],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (1 - PHI_SHARE) * h + PHI_SHARE * (conv + self.phi_bias[i])

    def next_scale_input(self, k: int, f_hat: jax.Array) -> jax.Array:
        """What the transformer sees at scale k > 0: f_hat of the maps before k -> [B, s_k^2, C]."""
        small = area_resize(f_hat, self.scales.sides[k])
        return small.reshape(small.shape[0], -1, small.shape[-1])

    def split(self, tokens: jax.Array) -> list[jax.Array]:
        """Tokens [B, L] (or whole maps of them) -> one [B, s_k^2] a scale."""
        bounds = zip(self.scales.starts, self.scales.ends, strict=True)
        return [tokens[:, start:end] for start, end in bounds if end <= tokens.shape[1]]

    def partial_sums(self, tokens: jax.Array) -> list[jax.Array]:
        """Tokens of the first n maps -> f_hat [B, h, w, C] after 1, 2, ... n maps."""
        sums, f_hat = [], 0.0
        for k, token_map in enumerate(self.split(tokens)):
            f_hat = f_hat + self.upsample_and_smooth(k, self.codes[token_map])
            sums.append(f_hat)
        return sums

    def transformer_inputs(self, sums: Sequence[jax.Array]) -> jax.Array:
        """All partial sums -> [B, L - s_0^2, C]: what the transformer sees at the scales k > 0."""
        inputs = [self.next_scale_input(k, sums[k - 1]) for k in range(1, len(self.scales))]
        b, *_, c = sums[0].shape
        return jnp.concatenate([jnp.zeros((b, 0, c), sums[0].dtype), *inputs], axis=1)

    def tokenize(self, features: jax.Array) -> jax.Array:
        """Features [B, h, w, C] -> tokens int32 [B, L]."""
        return self(features).tokens

    def __call__(self, features: jax.Array, keep: jax.Array | None = None) -> Quantized:
        """Quantizes features [B, h, w, C], coarse to fine, each map taking what is left.

        Args:
          features: [B, h, w, C].
          keep: int [B], maps of each image that go into the `f_hat` returned (quantizer dropout); all of
            them by default.  Tokens and loss are always of all maps.

        Raises:
          ValueError: where the last map is not as large as the features.
        """
        self.scales.check_feature_side(features.shape[1])
        self.scales.check_feature_side(features.shape[2])
        f = residual = features.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(f)
        f_hat = kept = jnp.zeros_like(f)
        loss, tokens, targets = 0.0, [], []
        for k, side in enumerate(self.scales.sides):
            target = area_resize(residual, side).reshape(f.shape[0], side * side, -1)
            token_map = self.nearest(jax.lax.stop_gradient(target))
            h = self.upsample_and_smooth(k, self.codes[token_map])
            f_hat = f_hat + h
            kept = f_hat if keep is None else jnp.where((keep > k)[:, None, None, None], f_hat, kept)
            residual = residual - jax.lax.stop_gradient(h)
            loss += COMMITMENT * jnp.mean((jax.lax.stop_gradient(f_hat) - f) ** 2, axis=(1, 2, 3))
            loss += jnp.mean((f_hat - fixed) ** 2, axis=(1, 2, 3))
            tokens.append(token_map)
            targets.append(target)
        through = rotated if self.vq_gradient == "rotation" else straight_through
        return Quantized(
            tokens=jnp.concatenate(tokens, axis=1),
            f_hat=through(f, jax.lax.stop_gradient(kept)),
            loss=loss / len(self.scales),
            targets=jnp.concatenate(targets, axis=1),
        )


def straight_through(f: jax.Array, f_hat: jax.Array) -> jax.Array:
    """`f_hat` in value; its gradient goes to f as it is (Bengio et al. 2013)."""
    return f + jax.lax.stop_gradient(f_hat - f)


def rotated(f: jax.Array, f_hat: jax.Array) -> jax.Array:
    """`f_hat` in value, as the rotation and scaling of f that take it there, which are held fixed.

    The gradient that reaches f is turned and scaled with them (Fifty et al. 2024, "Restructuring vector
    quantization with the rotation trick", section 4).  All [..., C].
    """
    fixed = jax.lax.stop_gradient(f)
    lengths = [jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12) for x in (fixed, f_hat)]
    u, v = fixed / lengths[0], f_hat / lengths[1]
    r = _unit(u + v)
    dot = lambda x, y: jnp.sum(x * y, -1, keepdims=True)  # noqa: E731
    turned = lengths[1] / lengths[0] * (f - 2 * r * dot(r, f) + 2 * v * dot(u, f))
    return turned + jax.lax.stop_gradient(f_hat - turned)  # 0 but for rounding


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)
