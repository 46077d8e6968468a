"""Load the weights of a DINO vision transformer from the published files."""

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

# Features are taken from the blocks; the layers after them are not used.
UNUSED = ("norm.", "head.")


def load_dino(path: str | Path) -> dict:
    """Load the parameters of `dino_features`; shapes in the file determine width, depth and patch size.

    Args:
      path: file of a state dict with the published names, such as `dino_deitsmall16_pretrain.pth` or timm's
        files; names may have the prefix `backbone.`.  The final norm and a head are ignored.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if tensors are missing, unknown or of other shapes; the message names them.
    """
    tensors, table, shapes = with_path(path, _check_dino, read_tensors(path, "dino"))
    return jax.tree.map(jnp.asarray, to_ours(tensors, table, shapes))


def _check_dino(tensors: Tensors) -> tuple[Tensors, list[Entry], dict]:
    """Check the tensors of a file; return those used, their table, and the shapes of our parameters."""
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
    """Return the table of our parameters and the published tensors that they are made of."""
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
    """Return the shapes of our parameters, derived from those of the patch and position embeddings.

    Raises:
      ValueError: if these two are not of a vision transformer with heads of 64 channels.
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
    linear = lambda d, e: {"kernel": (depth, d, e), "bias": (depth, e)}
    blocks = {"norm1": norm, "qkv": linear(width, 3 * width), "proj": linear(width, width)}
    blocks |= {"norm2": norm, "fc1": linear(width, 4 * width), "fc2": linear(4 * width, width)}
    shapes = {
        "patch": {"kernel": (patch, patch, 3, width), "bias": (width,)},
        "class_token": (1, width),
        "positions": positions[1:],
        "blocks": blocks,
    }
    as_struct = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    return jax.tree.map(as_struct, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
