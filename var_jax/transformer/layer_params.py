"""Layouts of a transformer's parameters: layers stacked, as in checkpoints, or each layer apart.

Stacked, the parameters of all blocks are in `blocks/layers/...`, of their adaLN in `adaln/...` and of the
keys of their cross-attention in `cross/...`, with a leading axis of layers.  Apart, they are in
`blocks/layers_0/...`, `blocks/layers_1/...`, `adaln_0/...` and `cross_0/...`.  All other parameters, those of
shared adaLN among them, are the same in both.
"""

import jax
import numpy as np

PROJECTIONS = ("adaln", "cross")  # of the condition, for each block


def unstack_layers(params: dict) -> dict:
    """Split the leading axis of layers of all blocks; the input is in the layout of checkpoints."""
    apart = {name: value for name, value in params.items() if name not in ("blocks", *PROJECTIONS)}
    apart["blocks"] = {f"layers_{i}": layer for i, layer in enumerate(_split(params["blocks"]["layers"]))}
    for name in PROJECTIONS:
        if name in params:
            apart |= {f"{name}_{i}": layer for i, layer in enumerate(_split(params[name]))}
    return apart


def stack_layers(params: dict) -> dict:
    """Invert `unstack_layers`, on the host."""
    depth = len(params["blocks"])
    stacked = dict(params)
    stacked["blocks"] = {"layers": _stack([params["blocks"][f"layers_{i}"] for i in range(depth)])}
    for name in PROJECTIONS:
        parts = [stacked.pop(f"{name}_{i}", None) for i in range(depth)]
        if parts[0] is not None:
            stacked[name] = _stack(parts)
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
