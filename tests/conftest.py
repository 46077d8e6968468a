"""Shared test setup: eight fake CPU devices, golden tensors and tiny networks."""

import os

from tests.helpers.xla_flags import fake_devices

os.environ["JAX_PLATFORMS"] = "cpu"
# The compilation cache is shared by all tests and the processes that they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.getcwd(), ".pytest_cache", "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), fake_devices(8)))
# Fake devices run independent collectives in different orders, and each blocks a thread: with one per core,
# which is XLA's default, all would wait for each other.
os.environ["PJRT_NPROC"] = "64"
# Child processes collect garbage less often, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [os.path.join(os.path.dirname(__file__), "helpers", "startup")]
    + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
)

import dataclasses
import fcntl
import gc
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import var_jax
from benchmarks.goldens import golden_folder
from tests.helpers.arrays import GOLDEN_SCALES, TRANSFORMERS, randomized
from tests.helpers.commands import REPOSITORY
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale

# Test files that take a minute or more, slowest first.
SLOW = [
    "training/test_hosts.py",
    "training/test_sharding.py",
    "training/test_resume.py",
    "benchmarks/test_device_check.py",
    "test_sampling_commands.py",
    "training/test_adversarial.py",
    "training/test_param_init.py",
    "experiments/test_scaling_law.py",
    "benchmarks/test_scaling.py",
    "benchmarks/test_plan.py",
    "experiments/test_inpainting.py",
    "benchmarks/test_throughput.py",
    "training/test_lowering.py",
    "training/test_checkpoint.py",
    "training/test_gs.py",
    "experiments/test_next_token.py",
    "app/test_page.py",
    "test_own_images.py",
    "test_notebooks.py",
    "test_precision.py",
]


def pytest_collection_modifyitems(items):
    """Move slow files to the front, so that pytest-xdist workers finish together (--no-loadscope-reorder)."""
    rank = {REPOSITORY / "tests" / name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish():
    """Collect garbage less often: tracing makes many objects, few of them garbage."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def golden_arrays_folder() -> Path:
    """Folder of golden tensors, maybe without the networks' weights."""
    return folder_with("vae.npz")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Directory of all golden tensors; skip where there is only the subset of tests/goldens."""
    return folder_with("vae.pth")


def folder_with(file: str) -> Path:
    """Return the golden directory; without a file of it skip, or fail if VAR_JAX_REQUIRE_GOLDENS is set."""
    folder = golden_folder()
    if not (folder / file).exists():
        message = f"no {file} among the golden tensors at {folder} (set VAR_JAX_GOLDENS)"
        if os.environ.get("VAR_JAX_REQUIRE_GOLDENS"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def golden(golden_arrays_folder):
    """Loader of the arrays of a golden file by name; images and feature maps are converted to NHWC."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(golden_arrays_folder / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file}
        return {key: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for key, a in arrays.items()}

    return load


@pytest.fixture(scope="session")
def golden_tokenizer(goldens) -> var_jax.LoadedTokenizer:
    """Tokenizer of the goldens, from a published file."""
    return var_jax.load_tokenizer(goldens / "vae.pth", scales=GOLDEN_SCALES)


@pytest.fixture(scope="session", params=TRANSFORMERS)
def golden_var(request, goldens, golden, golden_tokenizer):
    """Each transformer of the goldens, from a published file, with its arrays."""
    model = var_jax.load_var(goldens / f"{request.param}.pth", tokenizer=golden_tokenizer)
    with np.load(goldens / f"{request.param}.npz") as file:
        return model, {key: file[key] for key in file}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> tuple[Tokenizer, dict]:
    """Tiny tokenizer of 8x8 images, with three scales and 16 codes, and its parameters."""
    config = TokenizerConfig(
        scales=(1, 2, 4), num_codes=16, code_dim=4, ch=8, ch_mult=(1, 1), num_blocks=1, norm_groups=4
    )
    module = Tokenizer(config)
    return module, randomized(
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    )


@pytest.fixture(scope="session")
def tiny_var(tiny_tokenizer) -> tuple[NextScale, dict]:
    """Transformer of two blocks of width 32 and 5 classes for the tiny tokenizer, and its parameters."""
    config = NextScaleConfig(
        depth=2, width=32, num_heads=4, num_classes=5, num_codes=16, code_dim=4, scales=(1, 2, 4)
    )
    module = NextScale(config)
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 20, 4)))
    return module, randomized(jax.eval_shape(module.init, jax.random.key(0), *blank)["params"], 1)


@pytest.fixture(scope="session")
def tiny_shared_var(tiny_var) -> tuple[NextScale, dict]:
    """`tiny_var` with shared adaLN and without query-key normalization, and its parameters."""
    config = dataclasses.replace(tiny_var[0].config, shared_adaln=True, normalized_attention=False)
    module = NextScale(config)
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 20, 4)))
    return module, randomized(jax.eval_shape(module.init, jax.random.key(0), *blank)["params"], 2)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """Data directory with the prepared digits."""
    from var_jax.data.sources import open_source

    folder = tmp_path_factory.mktemp("data")
    open_source("digits", "train", folder)
    return folder


@pytest.fixture(scope="session")
def token_cache(tiny_run, digits_dir, tmp_path_factory) -> Path:
    """Token cache of the digits for the tokenizer of `tiny_run`: two crops, written on eight devices."""
    from tests.helpers.token_cache import make_cache

    return make_cache(tiny_run, digits_dir, tmp_path_factory.mktemp("cache") / "tokens")


@pytest.fixture(scope="session")
def tiny_run(digits_dir, tmp_path_factory, worker_id) -> Path:
    """Run of both stages for two steps on eight devices, created by the first worker that needs it."""
    from tests.helpers.tiny import tiny_config
    from var_jax.stages import run

    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    with open(folder / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run.done").exists():
            run(tiny_config(digits_dir, steps=2), folder / "run")
            (folder / "run.done").touch()
    return folder / "run"


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> str:
    """URL of a fake bucket, which processes started with `python -m tests.helpers.fake_gs` see too."""
    from tests.helpers import fake_gs

    with fake_gs.serving(tmp_path_factory.mktemp("gs")) as environment:
        os.environ.update(environment)
        fake_gs.install()
        yield "gs://bucket"
        for name in environment:
            del os.environ[name]


@pytest.fixture
def small_disk(tmp_path):
    """Directory on a file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy, since a log file may still be open
