"""Import what every command imports, once; commands are forked from here (see `commands.py`)."""

import gc
import importlib
import warnings

for name in (
    "absl.app",
    "flax.linen",
    "fsspec",
    "grain",
    "jax.experimental.pallas",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax.checkpoint",
    "PIL.Image",
    "sklearn.svm",
    "tensorboardX",
    "tensorflow_datasets",
):
    importlib.import_module(name)
# JAX warns of forks, since its backends have threads; none has started yet.
warnings.filterwarnings("ignore", message=r"os.fork\(\) was called")
gc.freeze()
