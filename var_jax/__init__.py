"""Visual AutoRegressive modeling (VAR: next-scale prediction) in JAX/Flax.

model = var_jax.load_var("digits")  # comes with the package; or a run, or published files
images = model.sample([0, 1, 2])
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from var_jax.api import LoadedTokenizer, LoadedVAR, load_tokenizer, load_var

__version__ = "0.1.0"

__all__ = ["LoadedTokenizer", "LoadedVAR", "__version__", "load_tokenizer", "load_var"]


def __getattr__(name: str) -> object:
    """Import the API on first use: `var_jax.tools.doctor` runs where JAX cannot be imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module("var_jax.api"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
