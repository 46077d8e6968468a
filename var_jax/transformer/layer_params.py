"""Layouts of a transformer's parameters: layers stacked, as in checkpoints, or each layer apart.

Stacked, the parameters of all blocks are in `blocks/layers/...` and those of their adaLN in `adaln/...`, with
a leading axis of layers.  Apart, they are in `blocks/layers_0/...`, `blocks/layers_1/...` and `adaln_0/...`.
All other parameters, those of shared adaLN among them, are the same in both.
"""

import jax
import numpy as np


def unstack_layers(params: dict) -> dict:
    """Split the leading axis of layers of all blocks; the input is in the layout of checkpoints."""
    apart = {name: value for name, value in params.items() if name not in ("blocks", "adaln")}
    apart["blocks"] = {f"layers_{i}": layer for i, layer in enumerate(_split(params["blocks"]["layers"]))}
    if "adaln" in params:
        apart |= {f"adaln_{i}": layer for i, layer in enumerate(_split(params["adaln"]))}
    return apart


def stack_layers(params: dict) -> dict:
    """Invert `unstack_layers`, on the host."""
    depth = len(params["blocks"])
    names = [f"adaln_{i}" for i in range(depth)]
    stacked = {name: value for name, value in params.items() if name not in ("blocks", *names)}
    stacked["blocks"] = {"layers": _stack([params["blocks"][f"layers_{i}"] for i in range(depth)])}
    if names[0] in params:
        stacked["adaln"] = _stack([params[name] for name in names])
    return stacked


def _split(tree: dict) -> list[dict]:
    """Return the tree of each layer."""
    leaves, structure = jax.tree.flatten(tree)

    def layers(leaf):
        if isinstance(leaf, np.ndarray):
            return list(leaf)
        # Unlike indexing, `split` has a gradient of a single concatenation.
        return [part[0] for part in jax.lax.split(leaf, [1] * len(leaf), axis=0)]

    return [structure.unflatten(layer) for layer in zip(*map(layers, leaves), strict=True)]


def _stack(trees: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
