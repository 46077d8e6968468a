"""Measurements and experiments.  They run from the root of a checkout, whose `configs` they use."""

import importlib.util

if importlib.util.find_spec("configs") is None:
    raise ImportError(
        "var_jax.benchmarks: there is no package `configs` to import. The benchmarks use the configs of the "
        "repository, which an installed var_jax does not have: run them from the root of a checkout"
    )
