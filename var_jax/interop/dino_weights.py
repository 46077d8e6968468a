"""Weights of a DINO vision transformer, from the published files."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.interop.load import with_path
from var_jax.interop.published import (
    BATCHED,
    CONV,
    IDENTITY,
    LINEAR,
    MAX_DEPTH,
    Entry,
    Tensors,
    check_tensors,
    count_layers,
    require_tensors,
    to_ours,
)
from var_jax.interop.tensor_files import read_tensors
from var_jax.tokenizer.dino import HEAD_SIZE

# Layers after the blocks, from which the features are taken.
UNUSED = ("norm.", "head.")


def load_dino(path: str | Path) -> dict:
    """Parameters for `dino_features`; the shapes in the file decide width, depth and patch size.

    Args:
      path: a state dict in the published names, as `dino_deitsmall16_pretrain.pth` or timm's files; those
        may be prefixed `backbone.`.  The last normalisation and a head are left alone.

    Raises:
      FileNotFoundError: where there is no file.
      ValueError: naming what is missing, unknown (a network of another kind has more), or has another shape.
    """
    tensors, table, shapes = with_path(path, _checked, read_tensors(path, "dino"))
    return jax.tree.map(jnp.asarray, to_ours(tensors, table, shapes))


def _checked(tensors: Tensors) -> tuple[Tensors, list[Entry], dict]:
    """The tensors that are used, their table, and the shapes of our parameters."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    tensors = {name: t for name, t in tensors.items() if not name.startswith(UNUSED)}
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    require_tensors(tensors, dict.fromkeys(names), "DINO")
    depth = count_layers(tensors, r"blocks\.(\d{1,4})\.", MAX_DEPTH)
    table, shapes = _table(depth), _param_shapes(tensors, depth)
    check_tensors(tensors, table, shapes)
    return tensors, table, shapes


def _table(depth: int) -> list[Entry]:
    """Our parameters and the published tensors that they hold."""
    table = [
        Entry("patch/kernel", ("patch_embed.proj.weight",), CONV),
        Entry("patch/bias", ("patch_embed.proj.bias",), IDENTITY),
        Entry("class_token", ("cls_token",), BATCHED),
        Entry("positions", ("pos_embed",), BATCHED),
    ]
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        ours = f"blocks/{layer.split('.')[-1]}"
        weight, layout = ("scale", IDENTITY) if layer.startswith("norm") else ("kernel", LINEAR)
        names = [f"blocks.{i}.{layer}" for i in range(depth)]
        table.append(Entry(f"{ours}/{weight}", tuple(f"{n}.weight" for n in names), layout, stacked=True))
        table.append(Entry(f"{ours}/bias", tuple(f"{n}.bias" for n in names), IDENTITY, stacked=True))
    return table


def _param_shapes(tensors: Tensors, depth: int) -> dict:
    """Our parameters as shapes; those of the patches and the positions decide the rest.

    Raises:
      ValueError: where these two are not those of a vision transformer with heads of 64.
    """
    kernel, positions = tensors["patch_embed.proj.weight"].shape, tensors["pos_embed"].shape
    if len(kernel) != 4 or kernel[1:] != (3, kernel[3], kernel[3]) or kernel[0] % HEAD_SIZE or 0 in kernel:
        raise ValueError(
            f"patch_embed.proj.weight has shape {kernel}, expected (D, 3, P, P), D a multiple of {HEAD_SIZE}"
        )
    width, patch = kernel[0], kernel[3]
    grid = math.isqrt(max(positions[1] - 1, 0)) if len(positions) == 3 else 0
    if positions != (1, 1 + grid**2, width):
        raise ValueError(f"pos_embed has shape {positions}, expected (1, 1 + G * G, {width})")
    norm = {"scale": (depth, width), "bias": (depth, width)}
    linear = lambda d, e: {"kernel": (depth, d, e), "bias": (depth, e)}  # noqa: E731
    blocks = {"norm1": norm, "qkv": linear(width, 3 * width), "proj": linear(width, width)}
    blocks |= {"norm2": norm, "fc1": linear(width, 4 * width), "fc2": linear(4 * width, width)}
    shapes = {
        "patch": {"kernel": (patch, patch, 3, width), "bias": (width,)},
        "class_token": (1, width),
        "positions": positions[1:],
        "blocks": blocks,
    }
    as_struct = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    return jax.tree.map(as_struct, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
