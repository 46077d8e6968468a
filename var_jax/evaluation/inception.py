"""Inception-v3 as of 2015-12-05 (Szegedy et al. 2016), in whose features FID and its kin are measured.

Its weights differ from those of torchvision's network of that name, and so do three layers: average pools
leave out the padding, the last block has a maximum pool, and there are 1008 classes.  Modules are named as in
`pt_inception-2015-12-05-6726825d.pth` (`interop/inception_weights.py`).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

SIDE = 299  # pixels of the network's input
POOL_SIZE = 2048  # features of a whole image
SPATIAL_CHANNELS = 7  # of the first branch of Mixed_6d, on 17 x 17 positions
NUM_CLASSES = 1008


@flax.struct.dataclass
class Features:
    """Features of images that the metrics need.

    Attributes:
      pool: features of whole images.
      spatial: features with positions, flattened as height, width, channel; None if the network has none.
      log_probs: logarithm of the probabilities of the network's classes.
    """

    pool: Float[Array | np.ndarray, "n D"]
    spatial: Float[Array | np.ndarray, "n S"] | None
    log_probs: Float[Array | np.ndarray, "n classes"]


def resize_tf1(images: Shaped[Array, "B h w 3"]) -> Float32[Array, "B 299 299 3"]:
    """Resize images as `tf.compat.v1.image.resize_bilinear`: no half-pixel shift, no antialiasing.

    Positions and weights are computed in float32 here: fused on a device they would move by up to 0.0013.
    """
    x = images.astype(jnp.float32)
    (top, bottom, down), (left, right, across) = (_neighbours(n) for n in images.shape[1:3])
    upper, lower = jnp.take(x, top, 1), jnp.take(x, bottom, 1)
    across, down = across[:, None], down[:, None, None]

    def blend(rows):
        a, b = jnp.take(rows, left, 2), jnp.take(rows, right, 2)
        return a + (b - a) * across

    upper, lower = blend(upper), blend(lower)
    return upper + (lower - upper) * down


def _neighbours(
    length: int,
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return the two pixels that each output pixel lies between, and the weight of the second."""
    position = np.arange(SIDE, dtype=np.float32) * (np.float32(length) / np.float32(SIDE))
    first = np.floor(position).astype(np.int32)
    return first, np.minimum(first + 1, length - 1), position - first.astype(np.float32)


class Unit(nn.Module):
    """Convolution without bias, batch normalization with fixed statistics, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        padding = [(n // 2, n // 2) if self.padded else (0, 0) for n in self.kernel]
        strides = (self.stride, self.stride)
        conv = nn.Conv(
            self.features,
            self.kernel,
            strides,
            padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(conv(x)))


UNIT_1X1 = partial(Unit, kernel=(1, 1))
UNIT_3X3 = partial(Unit, kernel=(3, 3))
UNIT_1X3 = partial(Unit, kernel=(1, 3))
UNIT_3X1 = partial(Unit, kernel=(3, 1))
UNIT_1X7 = partial(Unit, kernel=(1, 7))
UNIT_7X1 = partial(Unit, kernel=(7, 1))
halve_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
average_pool = partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
same_max_pool = partial(nn.max_pool, window_shape=(3, 3), padding="SAME")


def chain(x: jax.Array, *units: nn.Module) -> jax.Array:
    """Apply modules one after the other."""
    for unit in units:
        x = unit(x)
    return x


class BlockA(nn.Module):
    """Mixed_5b to 5d."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c2"]:
        name = "branch3x3dbl_{}".format
        branches = [
            UNIT_1X1(64, name="branch1x1")(x),
            chain(x, UNIT_1X1(48, name="branch5x5_1"), Unit(64, (5, 5), name="branch5x5_2")),
            chain(x, UNIT_1X1(64, name=name(1)), UNIT_3X3(96, name=name(2)), UNIT_3X3(96, name=name(3))),
            UNIT_1X1(self.pool_features, name="branch_pool")(average_pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class BlockB(nn.Module):
    """Mixed_6a, which halves the sides."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        name, halve = "branch3x3dbl_{}".format, partial(UNIT_3X3, stride=2, padded=False)
        branches = [
            halve(384, name="branch3x3")(x),
            chain(x, UNIT_1X1(64, name=name(1)), UNIT_3X3(96, name=name(2)), halve(96, name=name(3))),
            halve_pool(x),
        ]
        return jnp.concatenate(branches, -1)


class BlockC(nn.Module):
    """Mixed_6b to 6e; also returns its first branch."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> tuple[jax.Array, jax.Array]:
        c, name, double = self.features, "branch7x7_{}".format, "branch7x7dbl_{}".format
        first = UNIT_1X1(192, name="branch1x1")(x)
        branches = [
            first,
            chain(x, UNIT_1X1(c, name=name(1)), UNIT_1X7(c, name=name(2)), UNIT_7X1(192, name=name(3))),
            chain(
                x,
                UNIT_1X1(c, name=double(1)),
                UNIT_7X1(c, name=double(2)),
                UNIT_1X7(c, name=double(3)),
                UNIT_7X1(c, name=double(4)),
                UNIT_1X7(192, name=double(5)),
            ),
            UNIT_1X1(192, name="branch_pool")(average_pool(x)),
        ]
        return jnp.concatenate(branches, -1), first


class BlockD(nn.Module):
    """Mixed_7a, which halves the sides."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        name, halve = "branch7x7x3_{}".format, partial(UNIT_3X3, stride=2, padded=False)
        branches = [
            chain(x, UNIT_1X1(192, name="branch3x3_1"), halve(320, name="branch3x3_2")),
            chain(
                x,
                UNIT_1X1(192, name=name(1)),
                UNIT_1X7(192, name=name(2)),
                UNIT_7X1(192, name=name(3)),
                halve(192, name=name(4)),
            ),
            halve_pool(x),
        ]
        return jnp.concatenate(branches, -1)


class BlockE(nn.Module):
    """Mixed_7b and 7c, with different pools."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w 2048"]:
        single = UNIT_1X1(384, name="branch3x3_1")(x)
        double = chain(x, UNIT_1X1(448, name="branch3x3dbl_1"), UNIT_3X3(384, name="branch3x3dbl_2"))
        branches = [
            UNIT_1X1(320, name="branch1x1")(x),
            UNIT_1X3(384, name="branch3x3_2a")(single),
            UNIT_3X1(384, name="branch3x3_2b")(single),
            UNIT_1X3(384, name="branch3x3dbl_3a")(double),
            UNIT_3X1(384, name="branch3x3dbl_3b")(double),
            UNIT_1X1(192, name="branch_pool")(self.pool(x)),
        ]
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """The network, in float32."""

    @nn.compact
    def __call__(self, images: Float32[Array, "B 299 299 3"]) -> Features:
        """Compute features of images in 0 .. 255 (`resize_tf1`)."""
        shrink = partial(UNIT_3X3, padded=False)
        x = (images - 128) / 128
        x = chain(
            x,
            shrink(32, stride=2, name="Conv2d_1a_3x3"),
            shrink(32, name="Conv2d_2a_3x3"),
            UNIT_3X3(64, name="Conv2d_2b_3x3"),
            halve_pool,
            UNIT_1X1(80, name="Conv2d_3b_1x1"),
            shrink(192, name="Conv2d_4a_3x3"),
            halve_pool,
            BlockA(32, name="Mixed_5b"),
            BlockA(64, name="Mixed_5c"),
            BlockA(64, name="Mixed_5d"),
            BlockB(name="Mixed_6a"),
        )
        for letter, features in zip("bcde", (128, 160, 160, 192), strict=True):
            x, first = BlockC(features, name=f"Mixed_6{letter}")(x)
            if letter == "d":
                spatial = first[..., :SPATIAL_CHANNELS].reshape(len(images), -1)
        x = chain(
            x,
            BlockD(name="Mixed_7a"),
            BlockE(average_pool, name="Mixed_7b"),
            BlockE(same_max_pool, name="Mixed_7c"),
        )
        pool = x.mean((1, 2))
        # Published scores leave out the bias, which the file has.
        fc = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        logits = fc(pool) - fc.variables["params"]["bias"]
        return Features(pool, spatial, jax.nn.log_softmax(logits))
