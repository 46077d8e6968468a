"""Locate the golden tensors: inputs and outputs of the published PyTorch code."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SUBSET = REPOSITORY / "tests" / "goldens"  # without the networks' weights; README.md there


def golden_folder() -> Path:
    """Return $VAR_JAX_GOLDENS if it is set, else ../shared/goldens if it exists, else `SUBSET`."""
    if named := os.environ.get("VAR_JAX_GOLDENS"):
        return Path(named)
    shared = REPOSITORY.parent / "shared" / "goldens"
    return shared if shared.exists() else SUBSET
