"""Visual AutoRegressive modeling (VAR: next-scale prediction) in JAX/Flax.

tok = var_jax.load_tokenizer("runs/digits")
model = var_jax.load_var("runs/digits", tokenizer=tok)
images = model.generate([0, 1, 2])
"""

from var_jax.api import LoadedTokenizer, LoadedVAR, load_tokenizer, load_var

__version__ = "0.1.0"

__all__ = ["LoadedTokenizer", "LoadedVAR", "__version__", "load_tokenizer", "load_var"]
