"""Stages `goldens` and `attention` of `device_check`: numerical checks of a device."""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import var_jax
from benchmarks.device_parts import Options, Part, fraction_equal, median_milliseconds, relative_error
from benchmarks.throughput import init_params, random_tokens
from var_jax.images import denormalize
from var_jax.interop.published import next_scale_table, to_published
from var_jax.scales import SCALES_256
from var_jax.transformer.attention import attend
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.remat import SAVED_NAMES

GOLDEN_SCALES = (1, 2, 3, 4)
GOLDEN_VARS = ("var", "var_shared_adaln", "var_plain_attention")
PLATFORMS = ("cpu", "gpu", "tpu")
# Attention implementation -> platforms that it runs on.
RUNS_ON = {
    "einsum": PLATFORMS,
    "grouped": PLATFORMS,
    "cudnn": ("gpu",),
    "triton": ("gpu",),
    "splash": ("tpu",),
}
HALF_PRECISION_ONLY = ("cudnn", "triton")
# Errors are relative to the largest magnitude of the reference.
GOLDEN_TOLERANCE = {"output": 1e-4, "gradient": 1e-3}  # of float32 models; see goldens/README.md
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # of a kernel, forward and backward
REMAT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of each gradient's norm through two blocks


# --- goldens --------------------------------------------------------------------------------------


def goldens_parts(options: Options) -> list[Part]:
    """List comparisons with published outputs: checks for float32 models, measurements for other dtypes."""
    folder = options.goldens
    transformers = GOLDEN_VARS[:1] if options.tiny else GOLDEN_VARS
    parts = []
    for dtype in ("float32", "auto") if options.tiny else ("float32", "auto", "bfloat16"):
        exact = dtype == "float32"
        runs = {"tokenizer": partial(golden_tokenizer, folder, dtype)}
        for name in transformers if exact else () if options.tiny else GOLDEN_VARS[:1]:
            runs[name] = partial(golden_transformer, folder, name, dtype)
        for name, run in runs.items():
            parts.append(Part(name=f"{name}, {dtype}", run=run, seconds=10, is_check=exact))
    return parts


def golden_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Load the arrays of a golden file; images and feature maps become channels last, gradients do not."""
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file}
    channels_first = lambda key, a: a.ndim == 4 and not key.startswith("grad:")
    return {key: a.transpose(0, 2, 3, 1) if channels_first(key, a) else a for key, a in arrays.items()}


def golden_tokens(arrays: dict, prefix: str = "tokens") -> np.ndarray:
    """Concatenate the token maps of a golden file to one sequence, int [B, L]."""
    return np.concatenate([arrays[f"{prefix}_{k}"] for k in range(len(GOLDEN_SCALES))], axis=1)


def load_golden_tokenizer(folder: Path, dtype: str) -> var_jax.LoadedTokenizer:
    """Load the golden tokenizer in a dtype."""
    return var_jax.load_tokenizer(folder / "vae.pth", scales=GOLDEN_SCALES, dtype=dtype)


def load_golden_var(folder: Path, name: str, dtype: str) -> var_jax.LoadedVAR:
    """Load a golden transformer and its tokenizer in a dtype."""
    tokenizer = load_golden_tokenizer(folder, dtype)
    return var_jax.load_var(folder / f"{name}.pth", tokenizer=tokenizer, dtype=dtype)


def golden_tokenizer(folder: Path, dtype: str) -> dict:
    """Compare the golden images' tokens and reconstructions after every map with the published ones."""
    arrays, tokenizer = golden_arrays(folder, "vae"), load_golden_tokenizer(folder, dtype)
    tokens = tokenizer.encode(np.clip(denormalize(arrays["image"]), 0, 1))
    images = tokenizer.decode_steps(golden_tokens(arrays)) * 2 - 1
    reference = np.stack([arrays[f"reconstruction_{k}"] for k in range(len(GOLDEN_SCALES))], axis=1)
    values = {
        "tokens_equal": fraction_equal(tokens, golden_tokens(arrays)),
        "image_error": relative_error(images, reference),
    }
    if dtype == "float32":
        values["checks"] = {
            "tokens are equal": values["tokens_equal"] == 1,
            "reconstructions are within tolerance": values["image_error"] <= GOLDEN_TOLERANCE["output"],
        }
    return values


def golden_transformer(folder: Path, name: str, dtype: str) -> dict:
    """Compare a golden transformer's logits, loss gradients and greedy samples with the published ones."""
    arrays, vae = golden_arrays(folder, name), golden_arrays(folder, "vae")
    model = load_golden_var(folder, name, dtype)
    tokens, labels = golden_tokens(vae), arrays["label"]
    images, sampled = model.generate(labels, guidance=4.0, top_k=1, top_p=0.0, return_tokens=True)
    loss, grads = golden_gradients(model, vae["var_input"], labels, tokens)
    names = [key.removeprefix("grad:") for key in arrays if key.startswith("grad:")]
    values = {
        "logits_error": relative_error(model.logits(tokens, labels), arrays["logits"]),
        "loss_error": relative_error(loss, arrays["loss"]),
        "gradient_error": max(relative_error(grads[key], arrays[f"grad:{key}"]) for key in names),
        "tokens_equal": fraction_equal(sampled, golden_tokens(arrays, "cfg4.0_tokens")),
        "image_error": relative_error(images, arrays["cfg4.0_image"]),
    }
    if dtype == "float32":
        values["checks"] = {
            "logits are within tolerance": values["logits_error"] <= GOLDEN_TOLERANCE["output"],
            "the loss is within tolerance": values["loss_error"] <= GOLDEN_TOLERANCE["output"],
            "gradients are within tolerance": values["gradient_error"] <= GOLDEN_TOLERANCE["gradient"],
            "greedy tokens are equal": values["tokens_equal"] == 1,
            "generated images are within tolerance": values["image_error"] <= GOLDEN_TOLERANCE["output"],
        }
    return values


def golden_gradients(model: var_jax.LoadedVAR, inputs, labels, tokens) -> tuple[jax.Array, dict]:
    """Compute the mean cross-entropy, and its gradients under their published names."""
    config = model.module.config

    @jax.jit
    def loss_and_gradients(params):
        def loss(params):
            logits = model.module.apply({"params": params}, labels, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        return jax.value_and_grad(loss)(params)

    loss, grads = loss_and_gradients(model.params)
    grads = model.module.checkpoint_layout(jax.tree.map(np.asarray, grads))
    return loss, to_published(grads, next_scale_table(config))


# --- attention ------------------------------------------------------------------------------------


def attention_parts(options: Options) -> list[Part]:
    """List checks of each attention of this platform, and of each remat policy, against einsum in float32."""
    parts = []
    for dtype in ("bfloat16", "float32"):
        for name, platforms in RUNS_ON.items():
            if options.platform in platforms and (dtype == "bfloat16" or name not in HALF_PRECISION_ONLY):
                run = partial(check_attention, name, dtype, options.tiny)
                parts.append(Part(name=f"{name}, {dtype}", run=run, seconds=5))
    dtype = "float32" if options.tiny else "bfloat16"
    for policy in ("mlp", "full") if options.tiny else SAVED_NAMES:
        run = partial(check_remat_policy, policy, dtype, options.tiny)
        parts.append(Part(name=f"remat {policy}, {dtype}", run=run, seconds=8))
    return parts


def attention_config(tiny: bool) -> NextScaleConfig:
    """Return a config of two blocks of d16 on 680 tokens; if tiny, of two narrow blocks on 85 tokens."""
    if tiny:
        return NextScaleConfig(
            depth=2, width=32, num_heads=2, num_classes=10, num_codes=16, code_dim=4, scales=(1, 2, 4, 8)
        )
    return NextScaleConfig(depth=2, width=1024, num_heads=16, scales=SCALES_256, class_dropout_prob=0.0)


def forward_and_backward(function: Callable, weights: jax.Array) -> Callable:
    """Return a jitted function of three arrays that computes gradients and outputs of `function`.

    Args:
      function: three arrays -> outputs.
      weights: array of the outputs' shape; the gradients are those of sum(outputs * weights).
    """

    def loss(*inputs):
        outputs = function(*inputs)
        return jnp.sum(outputs.astype(jnp.float32) * weights), outputs

    return jax.jit(lambda *inputs: jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs))


def check_attention(name: str, dtype: str, tiny: bool) -> dict:
    """Measure errors and times of an attention implementation on normalized queries and keys."""
    config, batch = attention_config(tiny), 2 if tiny else 16
    mask, shape = config.masks[0], (batch, config.length, config.num_heads, config.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, shape) for key in keys)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    inputs = [x.astype(dtype) for x in (4 * unit(q), unit(k), v)]
    tested = partial(attend, scale=1.0, mask=mask, name=name)
    reference = partial(attend, scale=1.0, mask=mask, name="einsum")
    exact = [x.astype(jnp.float32) for x in inputs]
    highest = partial(jax.default_matmul_precision, "highest")
    with highest():
        grads, outputs = forward_and_backward(reference, weights)(*exact)
    with highest() if dtype == "float32" else contextlib.nullcontext():
        both, forward = forward_and_backward(tested, weights), jax.jit(tested)
        tested_grads, tested_outputs = both(*inputs)
        values = {
            "forward_error": relative_error(tested_outputs, outputs),
            "backward_error": max(map(relative_error, tested_grads, grads)),
            "tolerance": TOLERANCE[dtype],
            "forward_ms": median_milliseconds(forward, *inputs),
            "forward_backward_ms": median_milliseconds(both, *inputs),
        }
    return {**values, "checks": tolerance_checks(values)}


def tolerance_checks(values: dict) -> dict[str, bool]:
    """Check the forward and the backward error against the tolerance."""
    return {
        f"{name} is within tolerance": values[f"{name}_error"] <= values["tolerance"]
        for name in ("forward", "backward")
    }


@functools.cache
def reference_loss_and_gradients(tiny: bool) -> tuple[dict, tuple[jax.Array, dict]]:
    """Compute parameters of two blocks, and loss and gradients by float32 einsum without remat."""
    config = attention_config(tiny)
    model = NextScale(config, jnp.dtype("float32"), "einsum", "none")
    labels, _, inputs = random_tokens(config, 1)
    params = init_params(lambda key: model.init(key, labels, inputs)["params"])
    with jax.default_matmul_precision("highest"):
        return params, loss_and_gradients(model, tiny)(params)


def remat_batch(tiny: bool) -> int:
    """Return the batch size of the remat checks."""
    return 2 if tiny else 16


def loss_and_gradients(model: NextScale, tiny: bool) -> Callable:
    """Return a jitted function: parameters -> mean training loss of random tokens, and its gradients."""
    labels, tokens, inputs = random_tokens(model.config, remat_batch(tiny))

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        apply = partial(model.apply, {"params": params}, train=True, rngs=rngs, method="losses")
        return apply(labels, inputs, tokens)[0].mean()

    return jax.jit(jax.value_and_grad(loss))


def check_remat_policy(policy: str, dtype: str, tiny: bool) -> dict:
    """Compare loss and gradients of two blocks under a remat policy with the float32 reference."""
    params, (loss, grads) = reference_loss_and_gradients(tiny)
    model = NextScale(attention_config(tiny), jnp.dtype(dtype), "auto", policy)
    step = loss_and_gradients(model, tiny).lower(params).compile()
    policy_loss, policy_grads = step(params)
    errors = jax.tree.leaves(jax.tree.map(relative_norm_error, policy_grads, grads))
    values = {
        "forward_error": relative_error(policy_loss, loss),
        "backward_error": max(errors),
        "tolerance": REMAT_TOLERANCE[dtype],
        "forward_backward_ms": median_milliseconds(step, params),
        "temp_gib": round(step.memory_analysis().temp_size_in_bytes / 2**30, 3),
    }
    return {**values, "checks": tolerance_checks(values)}


def relative_norm_error(values, reference) -> float:
    """Compute the norm of the difference over the norm of the reference, for gradients with tiny entries."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(values - reference) / max(np.linalg.norm(reference), 1e-30))
