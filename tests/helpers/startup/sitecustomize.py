"""Settings of every Python process that tests start: `tests/conftest.py` puts this folder on PYTHONPATH."""

import gc

# Tracing makes many objects, few of them garbage: a short train.py spent a fifth of its CPU time on them.
gc.set_threshold(200_000, 20, 100)
