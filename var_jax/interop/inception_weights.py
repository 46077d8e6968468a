"""Load the weights of Inception-v3 as of 2015-12-05, from the files in which ports of FID distribute them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.evaluation.inception import SIDE, Inception
from var_jax.interop.tensor_files import read_tensors

NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TO_FILE = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # axes of a tensor in the file, by their number in ours
FROM_FILE = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}

# OpenAI's names follow those of the TensorFlow graph.  Its batch normalizations have no scale: it is 1.
OPENAI_NAMES = {"kernel": "weight", "bias": "beta", "mean": "mean", "var": "var"}
OPENAI_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
OPENAI_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
OPENAI_TOWERS = {
    "branch3x3": "",
    "branch5x5": "",
    "branch7x7": "",
    "branch3x3dbl": "_1",
    "branch7x7dbl": "_1",
}
OPENAI_TOWERS |= {"branch7x7x3": "_1"}
OPENAI_LAST_BLOCKS = {
    "branch3x3_1": "tower_conv",
    "branch3x3_2a": "tower_mixed_conv",
    "branch3x3_2b": "tower_mixed_conv_1",
    "branch3x3dbl_1": "tower_1_conv",
    "branch3x3dbl_2": "tower_1_conv_1",
    "branch3x3dbl_3a": "tower_1_mixed_conv",
    "branch3x3dbl_3b": "tower_1_mixed_conv_1",
    "branch_pool": "tower_2_conv",
}


def inception_shapes() -> dict:
    """Return the variables of the network as shapes: collections `params` and `batch_stats`."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), image)


def openai_unit(block: str, branch: str = "") -> str:
    """Return OpenAI's name of a unit: a convolution with its batch normalization."""
    if not branch:
        return _numbered("layers.conv", OPENAI_STEM.index(block))
    kind = block.removeprefix("Mixed_")
    prefix = _numbered("layers.mixed", OPENAI_BLOCKS.index(kind))
    if branch == "branch1x1" or (kind, branch) == ("6a", "branch3x3"):
        return f"{prefix}.conv"
    if kind in ("7b", "7c"):
        return f"{prefix}.{OPENAI_LAST_BLOCKS[branch]}"
    if branch == "branch_pool":
        return f"{prefix}.tower_2.conv"
    stem, number = branch.rsplit("_", 1)
    tower = "" if kind == "6a" else OPENAI_TOWERS[stem]
    return _numbered(f"{prefix}.tower{tower}.conv", int(number) - 1)


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def load_inception(path: str | Path) -> dict:
    """Load the variables of `Inception` from a file.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth`, torch-fidelity's file, either as safetensors, or OpenAI's
        `inception-2015-12-05.pt`.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it has other tensors; the message names the first few.
    """
    tensors = read_tensors(path, "inception")
    is_openai = "layers.conv.weight" in tensors
    problems: list[str] = []

    def find(keys, shape: jax.ShapeDtypeStruct) -> jax.Array:
        *unit, layer, leaf = (key.key for key in keys[1:])
        if is_openai and leaf == "scale":
            return jnp.ones(shape.shape)
        if not is_openai:
            name = ".".join((*unit, layer, NAMES[leaf]))
        elif unit:
            name = f"{openai_unit(*unit)}.{OPENAI_NAMES[leaf]}"
        else:
            name = f"output.{NAMES[leaf]}"
        expected = tuple(shape.shape[axis] for axis in TO_FILE[shape.ndim])
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != expected:
            what = "is missing" if tensor is None else f"has shape {tensor.shape}"
            problems.append(f"{name} {what}, expected {expected}")
            return jnp.zeros(shape.shape)
        return jnp.asarray(np.transpose(np.asarray(tensor, np.float32), FROM_FILE[tensor.ndim]))

    variables = jax.tree_util.tree_map_with_path(find, inception_shapes())
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path}: no weights of Inception-v3 as of 2015-12-05 (torchvision's have other shapes and "
            "scores):\n  " + "\n  ".join(problems[:5]) + more
        )
    return variables
