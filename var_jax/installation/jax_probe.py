"""Script: import JAX, list its devices, and time and check a product on each; prints an object a line.

`check.run_probe` runs it in a process of its own: a damaged installation or driver may crash or hang it.
"""

import importlib
import json
import time
import traceback

CPU_SIDE, ACCELERATOR_SIDE = 1024, 8192  # of the matrices that are timed
GRADIENT_SIDE = 256
REPEATS = 3


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def emit_cuda_versions() -> None:
    """Print the versions of the libraries that CUDA plugins load, as integers: 91002 for cuDNN 9.10.2."""
    for major in (12, 13):
        try:
            versions = importlib.import_module(f"jax_cuda{major}_plugin._versions")
        except ModuleNotFoundError:
            continue
        cuda = {"major": major, "cudnn_build": versions.cudnn_build_version()}
        for name in ("cudnn", "cuda_runtime", "cuda_driver"):
            try:
                cuda[name] = getattr(versions, f"{name}_get_version")()
            except RuntimeError as error:
                cuda[f"{name}_error"] = str(error)
        emit(cuda=cuda)


def time_product(device) -> float:
    """Return the GFLOP/s of a product of matrices, in float32 on a CPU and bfloat16 elsewhere."""
    import jax
    import jax.numpy as jnp

    is_cpu = device.platform == "cpu"
    side = CPU_SIDE if is_cpu else ACCELERATOR_SIDE
    x = jax.device_put(jnp.ones((side, side), jnp.float32 if is_cpu else jnp.bfloat16), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()  # compiles
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e9


def gradient_error(device) -> float:
    """Return the largest relative error of the gradient of mean((x w)^2) by w: 2 x^T x w / n^2."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x, w = np.random.default_rng(0).normal(size=(2, GRADIENT_SIDE, GRADIENT_SIDE))
    expected = 2 * x.T @ x @ w / GRADIENT_SIDE**2

    def loss(w, x):
        return jnp.mean(jnp.matmul(x, w, precision="highest") ** 2)

    arrays = (jax.device_put(jnp.asarray(a, jnp.float32), device) for a in (w, x))
    gradient = np.asarray(jax.jit(jax.grad(loss))(*arrays), np.float64)
    return float(np.abs(gradient - expected).max() / np.abs(expected).max())


def main() -> None:
    emit(begin="importing JAX")
    import jax
    import jaxlib

    emit(jax=jax.__version__, jaxlib=jaxlib.__version__)
    emit(begin="versions of CUDA")
    emit_cuda_versions()
    emit(begin="listing devices")
    devices = jax.local_devices()
    emit(
        devices=[
            {"id": device.id, "platform": device.platform, "kind": device.device_kind} for device in devices
        ]
    )
    for device in devices:
        emit(begin=f"a product and a gradient on {device}")
        stats = device.memory_stats() or {}
        emit(
            device=str(device),
            gflops=time_product(device),
            gradient_error=gradient_error(device),
            memory_bytes=stats.get("bytes_limit"),
        )


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        emit(error=f"{type(error).__name__}: {error}")
