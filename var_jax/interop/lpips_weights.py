"""Load VGG-16 and LPIPS weights from torchvision and LPIPS files."""

from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from var_jax.interop.tensor_files import read_tensors
from var_jax.tokenizer.lpips import CHANNELS, LAYERS


def load_perceptual(paths: Iterable[str | Path]) -> dict:
    """Load the parameters of `perceptual_distance`.

    Args:
      paths: files that together hold the convolutions, named as in torchvision (`features.0.weight`) or
        LPIPS (`net.slice1.0.weight`), and LPIPS's channel weights (`lin0.model.1.weight` or
        `lins.0.model.1.weight`).  Other tensors, such as torchvision's classifier, are ignored.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if tensors are missing or have other shapes; the message names them.
    """
    paths = list(paths)
    tensors = {}
    for path in paths:
        tensors |= read_tensors(path, "perceptual")
    problems = []

    def find(names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        name = next((name for name in names if name in tensors), None)
        if name is None:
            problems.append(f"missing: {' or '.join(names)}")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {tensors[name].shape}, expected {shape}")
        else:
            return np.asarray(tensors[name], np.float32)
        return np.zeros(shape, np.float32)

    conv, linear = {}, {}
    channels = 3
    for layer, convolutions in enumerate(LAYERS):
        out = CHANNELS[layer]
        for i in convolutions:
            names = (f"features.{i}", f"net.slice{layer + 1}.{i}")
            kernel = find(tuple(f"{name}.weight" for name in names), (out, channels, 3, 3))
            bias = find(tuple(f"{name}.bias" for name in names), (out,))
            conv[str(i)] = {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}
            channels = out
        names = (f"lin{layer}.model.1.weight", f"lins.{layer}.model.1.weight")
        linear[str(layer)] = jnp.asarray(find(names, (1, out, 1, 1)).reshape(-1))
    if problems:
        names = " and ".join(map(str, paths))
        raise ValueError(f"{names}: no weights for LPIPS on VGG-16:\n  " + "\n  ".join(problems))
    return {"conv": conv, "linear": linear}
