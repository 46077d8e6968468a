"""Checks for `var_jax.tools.doctor`, of an installation where any dependency may be missing or broken.

Only `packages` imports a dependency, `packaging`; the scripts `jax_probe` and `data_probe` run in processes
of their own.
"""
