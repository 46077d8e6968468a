"""Images cut into patches and put together again: features without a network (Dosovitskiy et al. 2021)."""

import jax


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """Space to depth: [B, H, W, 3] -> [B, H / p, W / p, 3 p^2], p = patch; the same values in the same dtype.

    Raises:
      ValueError: where p does not divide H and W.
    """
    b, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} pixels do not fill images of {height} x {width}")
    h, w = height // patch, width // patch
    x = images.reshape(b, h, patch, w, patch, channels).swapaxes(2, 3)
    return x.reshape(b, h, w, patch * patch * channels)


def from_patches(patches: jax.Array, patch: int) -> jax.Array:
    """Depth to space, the inverse: [B, h, w, 3 p^2] -> [B, h p, w p, 3]."""
    b, h, w, _ = patches.shape
    x = patches.reshape(b, h, w, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, h * patch, w * patch, -1)
