"""Multi-scale residual quantizer (Tian et al. 2024, algorithms 1 and 2).

A `Quantizer` is a pytree with pure methods: a codebook, the shared convolutions phi and the schedule of
scales.  It serves training (loss, straight-through gradient), tokenization, the teacher-forced inputs of the
transformer, and the step-by-step sum of generation.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from var_jax.scales import Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.resize import area_resize, bicubic_resize

COMMITMENT = 0.25  # weight of the commitment loss, whose gradient moves features towards f_hat
PHI_SHARE = 0.5  # phi(h) = (1 - PHI_SHARE) h + PHI_SHARE conv(h)


@flax.struct.dataclass
class Quantized:
    """Output of the quantizer for training.

    Attributes:
      tokens: tokens of all maps.
      f_hat: sum of the maps; its gradient passes to the features (see `TokenizerConfig.vq_gradient`).
      loss: codebook and commitment loss of each image.
      targets: residual that each token was chosen for; differentiable with respect to the features.
    """

    tokens: Int32[Array, "B L"]
    f_hat: Float32[Array, "B h w C"]
    loss: Float32[Array, " B"]
    targets: Float32[Array, "B L C"]


def _phi_index(k: int, num_scales: int, num_phis: int) -> int:
    """Return the index of the phi of scale k: the tick nearest to its progress k / (K - 1).

    The ticks are those of the published code, which spaces four of them otherwise than other numbers.
    """
    margin = 1 / (3 * num_phis) if num_phis == 4 else 1 / (2 * num_phis)
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


@flax.struct.dataclass
class Quantizer:
    """Codebook, convolutions phi and schedule of scales.

    All products have precision HIGHEST: rounding a residual, as platforms do by default, changes tokens.

    Attributes:
      codebook: parameters of the codes; see `codes` for the vectors.
      phi_kernel: kernels of the convolutions phi; None without.
      phi_bias: their biases.
      scales: the schedule.
      l2_normalized: match codes by direction and use them as unit vectors.
      vq_gradient: "straight_through" or "rotation", the gradient through the quantizer.
    """

    codebook: Float[Array, "V C"]
    phi_kernel: Float[Array, "phis 3 3 C C"] | None
    phi_bias: Float[Array, "phis C"] | None
    scales: Scales = flax.struct.field(pytree_node=False)
    l2_normalized: bool = flax.struct.field(pytree_node=False, default=False)
    vq_gradient: str = flax.struct.field(pytree_node=False, default="straight_through")

    @classmethod
    def create(cls, params: dict, config: TokenizerConfig) -> "Quantizer":
        """Create the quantizer of a tokenizer from its config and its parameters `params["quantizer"]`."""
        return cls(
            jnp.asarray(params["codebook"]),  # traced tokens cannot index a numpy array
            params.get("phi_kernel"),
            params.get("phi_bias"),
            config.schedule,
            config.l2_normalized,
            config.vq_gradient,
        )

    @property
    def codes(self) -> Float[Array, "V C"]:
        """Code vector of each token."""
        return _unit(self.codebook) if self.l2_normalized else self.codebook

    def nearest(self, z: Float[Array, "*dims C"]) -> Int32[Array, "*dims"]:
        """Find the code at the smallest squared distance to each vector."""
        codes = self.codes
        dots = jnp.einsum("...c,vc->...v", z, codes, precision=jax.lax.Precision.HIGHEST)
        if self.l2_normalized:  # all codes have length 1, so the nearest has the largest dot product
            return dots.argmax(-1).astype(jnp.int32)
        return (jnp.sum(codes**2, -1) - 2 * dots).argmin(-1).astype(jnp.int32)

    def upsample_and_smooth(self, k: int, codes: Float[Array, "B n C"]) -> Float[Array, "B h w C"]:
        """Compute the contribution of map k to f_hat: upsample its n = s_k^2 codes and apply phi."""
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

    def next_scale_input(self, k: int, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B n C"]:
        """Compute the transformer's input at scale k > 0: f_hat of the coarser maps, resized to n = s_k^2."""
        resized = area_resize(f_hat, self.scales.sides[k])
        return resized.reshape(resized.shape[0], -1, resized.shape[-1])

    def split(self, tokens: Int[Array, "B n"]) -> list[Int[Array, "B _"]]:
        """Split the tokens of all maps, or of the first few, into maps [B, s_k^2]."""
        bounds = zip(self.scales.starts, self.scales.ends, strict=True)
        return [tokens[:, start:end] for start, end in bounds if end <= tokens.shape[1]]

    def partial_sums(self, tokens: Int[Array, "B n"]) -> list[Float[Array, "B h w C"]]:
        """Compute f_hat after 1, 2, ... maps from the tokens of all maps, or of the first few."""
        sums, f_hat = [], 0.0
        for k, token_map in enumerate(self.split(tokens)):
            f_hat = f_hat + self.upsample_and_smooth(k, self.codes[token_map])
            sums.append(f_hat)
        return sums

    def transformer_inputs(self, sums: Sequence[Float[Array, "B h w C"]]) -> Float[Array, "B n C"]:
        """Compute the transformer's inputs at all scales k > 0, n = L - s_0^2, from all partial sums."""
        inputs = [self.next_scale_input(k, sums[k - 1]) for k in range(1, len(self.scales))]
        b, *_, c = sums[0].shape
        return jnp.concatenate([jnp.zeros((b, 0, c), sums[0].dtype), *inputs], axis=1)

    def tokenize(self, features: Float[Array, "B h w C"]) -> Int32[Array, "B L"]:
        """Quantize features to tokens."""
        return self(features).tokens

    def __call__(
        self,
        features: Float[Array, "B h w {self.codebook.shape[1]}"],
        keep: Int[Array, " B"] | None = None,
    ) -> Quantized:
        """Quantize features, coarse to fine; each map quantizes the residual of the maps before it.

        Args:
          features: of the encoder.
          keep: number of maps of each image in the returned `f_hat` (quantizer dropout); all by default.
            Tokens and loss are always of all maps.

        Raises:
          ValueError: if the last map does not have the size of the features.
        """
        self.scales.check_feature_side(features.shape[1])
        self.scales.check_feature_side(features.shape[2])
        f = residual = features.astype(jnp.float32)
        f_no_gradient = jax.lax.stop_gradient(f)
        f_hat = kept = jnp.zeros_like(f)
        loss = 0.0
        tokens, targets = [], []
        for k, side in enumerate(self.scales.sides):
            target = area_resize(residual, side).reshape(f.shape[0], side * side, -1)
            token_map = self.nearest(jax.lax.stop_gradient(target))
            h = self.upsample_and_smooth(k, self.codes[token_map])
            f_hat = f_hat + h
            kept = f_hat if keep is None else jnp.where((keep > k)[:, None, None, None], f_hat, kept)
            residual = residual - jax.lax.stop_gradient(h)
            loss += COMMITMENT * jnp.mean((jax.lax.stop_gradient(f_hat) - f) ** 2, axis=(1, 2, 3))
            loss += jnp.mean((f_hat - f_no_gradient) ** 2, axis=(1, 2, 3))
            tokens.append(token_map)
            targets.append(target)
        estimator = rotation_trick if self.vq_gradient == "rotation" else straight_through
        return Quantized(
            tokens=jnp.concatenate(tokens, axis=1),
            f_hat=estimator(f, jax.lax.stop_gradient(kept)),
            loss=loss / len(self.scales),
            targets=jnp.concatenate(targets, axis=1),
        )


def straight_through(f: Float[Array, "*dims C"], f_hat: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
    """Return `f_hat`; its gradient passes to `f` unchanged (straight-through estimator).

    Source: Bengio et al. 2013.
    """
    return f + jax.lax.stop_gradient(f_hat - f)


def rotation_trick(f: Float[Array, "*dims C"], f_hat: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
    """Return `f_hat`; its gradient passes to `f` rotated and scaled as `f` is to `f_hat`.

    `f_hat` is written as a rotation and a scaling of `f`, both constants for the gradient.  Source: Fifty et
    al. 2024, "Restructuring vector quantization with the rotation trick", section 4.
    """
    f_no_gradient = jax.lax.stop_gradient(f)
    lengths = [jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12) for x in (f_no_gradient, f_hat)]
    u, v = f_no_gradient / lengths[0], f_hat / lengths[1]
    r = _unit(u + v)
    dot = lambda x, y: jnp.sum(x * y, -1, keepdims=True)
    rotated = lengths[1] / lengths[0] * (f - 2 * r * dot(r, f) + 2 * v * dot(u, f))
    return rotated + jax.lax.stop_gradient(f_hat - rotated)  # corrects rounding, so the value is f_hat


def _unit(x: jax.Array) -> jax.Array:
    """Scale vectors [..., C] to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)
