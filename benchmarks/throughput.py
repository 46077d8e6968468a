"""Measure the published networks on this machine: images/s, compile time, memory, and share of peak FLOP/s.

    python -m benchmarks.throughput sample --depth 16 --batch 8
    python -m benchmarks.throughput train --depth 16 --batch 8 --against ../shared/peer/torch_var.py
    python -m benchmarks.throughput train --depth 16 --batch 8 --with_encoder
    python -m benchmarks.throughput sample --depth 30 --latency
    python -m benchmarks.throughput tokenizer --batch 8
    python -m benchmarks.throughput input --batch=64

Prints one JSON line.  Weights are random, since speed does not depend on them.  `--against` first runs a
PyTorch yardstick of the same shape (it needs the extra `torch`), and adds its line and the ratio.  The
yardstick has neither encoder nor decoder, so the ratio compares sampling without the decoder, and training
from tokens.  `--with_encoder` adds a training step from images and its relative time, which a token cache
saves on the device.  `--latency` draws one image, and adds the bound of reading the weights: their bytes,
read once for each map, by the memory bandwidth of the data sheet.  `tokenizer` is a training step of the
tokenizer, with LPIPS and discriminator.  `input` measures the host's data loading; see input_rate.py.
`--tiny` runs networks of a few channels on 8x8 images, to try the command.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.input_rate import add_input_arguments, measure_input, measure_tokens, open_data
from benchmarks.workload import NUM_CLASSES
from configs import tokenizer as tokenizer_config
from configs import var
from var_jax import cli
from var_jax.sampling.cast_params import in_compute_dtype, tokenizer_in_compute_dtype
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, generate, image_keys
from var_jax.scales import SCALES_256, SCALES_512
from var_jax.sharding import make_mesh
from var_jax.tokenizer import model as tokenizer_model
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.lpips import CHANNELS, LAYERS
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.hardware import chip, peak_flops
from var_jax.training.state import TrainState, count_parameters, create_state
from var_jax.training.task import compute_dtype, program_flops
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.model import choose_scan

TINY_TOKENIZER = dict(
    scales=(1, 2, 4), num_codes=16, code_dim=4, ch=8, ch_mult=(1, 1), num_blocks=1, norm_groups=4
)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["sample", "train", "tokenizer", "encode", "decode", "input"])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, choices=[256, 512])
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16, float32 on CPU), float32, bfloat16")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls; the median is reported")
    parser.add_argument("--guidance_until", type=int, help="sample: no guidance from this scale on")
    parser.add_argument("--attention", default="auto", help="train: one of transformer/attention.py")
    parser.add_argument("--remat", default="auto", help="train: policy of transformer/remat.py")
    parser.add_argument(
        "--scan_layers",
        default="auto",
        help="true or false; auto: train scans unless on a GPU, sample on a TPU",
    )
    parser.add_argument("--with_encoder", action="store_true", help="train: also time a step from images")
    parser.add_argument("--latency", action="store_true", help="sample: one image, and its lower bound")
    parser.add_argument("--against", help="path of the PyTorch yardstick")
    parser.add_argument("--compile", action="store_true", help="run the yardstick under torch.compile")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on 8x8 images, to try the command")
    add_input_arguments(parser)
    return parser.parse_args()


def measure_yardstick(args: argparse.Namespace) -> dict:
    """Run the PyTorch yardstick for the given arguments, before JAX takes a device; return its JSON line."""
    query = f"from var_jax.training.task import compute_dtype; print(compute_dtype({args.dtype!r}))"
    dtype = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True).stdout.strip()
    flags = [f"--{name}={getattr(args, name)}" for name in ("depth", "batch", "size", "repeats")]
    try:
        return run_yardstick(args.against, [args.what, *flags], dtype, args.compile)
    except RuntimeError as error:
        sys.exit(str(error))


def run_yardstick(
    path: str, arguments: list[str], dtype: str, compiled: bool, timeout: float | None = None
) -> dict:
    """Run the PyTorch yardstick in a process of its own; this process's JAX must not hold the device.

    Args:
      path: of its script.
      arguments: mode, and the flags that it shares with this command.
      dtype: float32 or bfloat16.
      compiled: run under torch.compile.
      timeout: seconds; None: no limit.

    Returns:
      The JSON line that it prints, parsed.

    Raises:
      RuntimeError: if it fails.
      subprocess.TimeoutExpired: if it takes longer than `timeout`.
    """
    command = [sys.executable, path, *arguments, f"--dtype={dtype}", *["--compile"] * compiled]
    # Our float32 models multiply in float32 on every platform; without this, the yardstick would use TF32.
    environment = {**os.environ, **({"NVIDIA_TF32_OVERRIDE": "0"} if dtype == "float32" else {})}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if process.returncode:
        advice = "it needs pip install -e '.[torch]'"
        raise RuntimeError(f"the yardstick failed ({advice}):\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def time_function(function: Callable, *inputs, repeats: int, carry: bool = False) -> dict:
    """Compile and time a jitted function.

    Args:
      function: jitted.
      inputs: its arguments.
      repeats: number of timed calls.
      carry: pass the first output of a call as the first input of the next (it is donated).

    Returns:
      compile_s, the median `seconds`, and peak_gib (see `peak_bytes`).
    """
    start = time.perf_counter()
    compiled = function.lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    times, inputs = [], list(inputs)
    for _ in range(2 + repeats):  # the first two warm up
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
        if carry:
            inputs[0] = result[0]
    return {
        "seconds": round(float(np.median(times[2:])), 5),
        "compile_s": round(compile_s, 1),
        "peak_gib": round(peak_bytes(compiled) / 2**30, 2),
    }


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the first device's peak memory so far, or the program's planned memory if it keeps no count."""
    try:
        stats = jax.local_devices()[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # not every platform keeps count
        stats = {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    memory = compiled.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, part) for part in parts) - memory.alias_size_in_bytes


def make_networks(args: argparse.Namespace) -> tuple[Tokenizer, NextScaleTask]:
    """Build the published tokenizer and a VAR task of the requested depth; at 512 pixels adaLN is shared."""
    dtype = compute_dtype(args.dtype)
    shape = TINY_TOKENIZER if args.tiny else {"scales": SCALES_256 if args.size == 256 else SCALES_512}
    encoder_dtype = jnp.dtype(jnp.float32) if args.dtype == "auto" else dtype  # the default of the API
    tokenizer = Tokenizer(TokenizerConfig(**shape), dtype, encoder_dtype=encoder_dtype)
    stage = ConfigDict(var.get_config("d16" if args.size == 256 else "d36"))
    stage.model.update(depth=args.depth, width=64 * args.depth, num_heads=args.depth)
    stage.train.update(batch=args.batch, dtype=dtype.name)
    scanned = choose_scan(args.scan_layers, jax.default_backend(), sampling=args.what == "sample")
    stage.transformer.update(attention=args.attention, remat=args.remat, scan_layers=str(scanned).lower())
    return tokenizer, NextScaleTask(stage, 1000, tokenizer, {}, NUM_CLASSES)


def init_params(init: Callable) -> dict:
    """Initialize random parameters by a function of a key."""
    return nn.meta.unbox(jax.jit(init)(jax.random.key(0)))


def init_tokenizer_params(tokenizer: Tokenizer) -> dict:
    """Initialize a tokenizer's random parameters in its compute dtype."""
    side = tokenizer.config.image_size
    params = init_params(lambda key: tokenizer.init(key, jnp.zeros((1, side, side, 3)))["params"])
    return tokenizer_in_compute_dtype(params, tokenizer)


def measure_sampling(args: argparse.Namespace, tokenizer: Tokenizer, task: NextScaleTask) -> dict:
    """Measure sampling with and without the decoder."""
    params = in_compute_dtype(init_params(lambda key: task.init(key)[0]), task.model.dtype)
    params = jax.jit(task.model.own_layout)(params)
    options = SamplingOptions(guidance_until=args.guidance_until)
    per_scale = options.per_scale(task.config.schedule, task.config.num_codes)
    labels = jnp.arange(args.batch, dtype=jnp.int32) % NUM_CLASSES
    networks = Networks(tokenizer, task.model, init_tokenizer_params(tokenizer), params)
    inputs = (networks, labels, image_keys(0, jnp.arange(args.batch)), per_scale)
    result = time_function(jax.jit(lambda *inputs: generate(*inputs)[0]), *inputs, repeats=args.repeats)
    tokens_alone = time_function(jax.jit(lambda *inputs: generate(*inputs)[1]), *inputs, repeats=args.repeats)
    seconds = tokens_alone["seconds"]
    result["without_decoder"] = {"seconds": seconds, "images_per_s": round(args.batch / seconds, 3)}
    flops = generation_flops(task.config, per_scale.num_guided_scales) * args.batch
    if args.latency:
        result["latency"] = weight_reading_bound(params, len(task.config.steps), seconds)
    return result | {"tflops": flops / seconds / 1e12, "parameters": count_parameters(params)}


def weight_reading_bound(params: dict, steps: int, seconds: float) -> dict:
    """Compare the time of one image without the decoder with that of reading the blocks and the head.

    Returns:
      `ms`, `read_gb`; and, if the bandwidth of the device is known, `bound_ms` and `share_of_bound`.
    """
    read = [value for name, value in params.items() if name in ("blocks", "head")]
    gigabytes = steps * sum(leaf.nbytes for leaf in jax.tree.leaves(read)) / 1e9
    result = {"ms": round(1e3 * seconds, 2), "read_gb": round(gigabytes, 3)}
    if sheet := chip(jax.devices()[0]):
        bound = gigabytes * 1e9 / sheet.bandwidth
        result |= {"bound_ms": round(1e3 * bound, 2), "share_of_bound": round(bound / seconds, 3)}
    return result


def initial_state(task: NextScaleTask) -> TrainState:
    """Create the state before the first training step, on one device."""
    params = init_params(lambda key: task.init(key)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, None, jax.jit(task.optimizer.init)(params), {})


def jit_step(train_step: Callable) -> Callable:
    """Jit a task's training step: it returns state and metrics, and donates the state."""
    return jax.jit(lambda *args: train_step(*args).state_and_metrics(), donate_argnums=0)


def random_tokens(config: NextScaleConfig, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Create random inputs of a training step.

    Returns:
      Labels int32 [B], tokens int32 [B, L], and teacher-forcing inputs float32 [B, L - num_start_tokens, C].
    """
    rng, length = np.random.default_rng(0), config.length
    labels = jnp.asarray(rng.integers(0, config.num_classes, batch), jnp.int32)
    tokens = jnp.asarray(rng.integers(0, config.num_codes, (batch, length)), jnp.int32)
    inputs = rng.standard_normal((batch, length - config.num_start_tokens, config.code_dim))
    return labels, tokens, jnp.asarray(inputs, jnp.float32)


def measure_training(args: argparse.Namespace, tokenizer: Tokenizer, task: NextScaleTask) -> dict:
    """Measure a training step from tokens; with --with_encoder, also one from images."""
    run = partial(time_function, repeats=args.repeats, carry=True)
    labels, tokens, inputs = random_tokens(task.config, args.batch)
    key, count = jax.random.key(0), count_parameters(jax.eval_shape(lambda: initial_state(task)).params)
    step = jit_step(task.train_on_tokens)
    result = run(step, initial_state(task), labels, tokens, inputs, key)
    flops = training_flops(task.config) * args.batch
    result |= {"tflops": flops / result["seconds"] / 1e12, "parameters": count}
    if args.with_encoder:
        rng, side = np.random.default_rng(0), task.image_size
        images = jnp.asarray(rng.integers(0, 256, (args.batch, side, side, 3)), jnp.uint8)
        frozen = {"tokenizer": init_tokenizer_params(tokenizer)}
        batch = {"image": images, "label": labels}
        with_encoder = run(jit_step(task.train_step), initial_state(task), frozen, batch, key)
        with_encoder |= {"images_per_s": round(args.batch / with_encoder["seconds"], 3)}
        ratio = round(with_encoder["seconds"] / result["seconds"], 3)
        result["with_encoder"] = with_encoder | {"ratio": ratio}
    return result


def measure_tokenizer_training(args: argparse.Namespace, tokenizer: Tokenizer, task: NextScaleTask) -> dict:
    """Measure a training step of the tokenizer with its published losses: LPIPS and a discriminator."""
    stage = tokenizer_config.get_config()
    stage.model.scales = tokenizer.config.scales
    stage.adversarial.start_fraction = 0.0
    stage.codebook.kmeans_steps = 0
    stage.train.update(batch=args.batch, dtype=tokenizer.dtype.name)
    if args.tiny:  # 16 pixels are the fewest for a discriminator of three layers; VGG compiles slowly
        stage.model.update({**TINY_TOKENIZER, "ch_mult": (1, 1, 1)})
        stage.loss.perceptual, stage.adversarial.channels = 0.0, 8
    perceptual_networks = {"vgg": random_vgg()} if stage.loss.perceptual else {}
    tokenizer_task = TokenizerTask(stage, 1000, perceptual_networks)
    rng = np.random.default_rng(0)
    mesh = make_mesh(devices=jax.devices()[:1])
    init, optimizer = tokenizer_task.init, tokenizer_task.optimizer
    state = create_state(init, optimizer, True, jax.random.key(0), mesh)[0]()
    count = count_parameters(state.params)
    side = tokenizer_task.image_size
    batch = {"image": jnp.asarray(rng.integers(0, 256, (args.batch, side, side, 3), dtype=np.uint8))}
    step = jit_step(tokenizer_task.train_step)
    frozen, key = tokenizer_task.frozen, jax.random.key(1)
    result = time_function(step, state, frozen, batch, key, repeats=args.repeats, carry=True)
    return result | {
        "tflops": tokenizer_task.flops_per_image() * args.batch / result["seconds"] / 1e12,
        "parameters": count,
    }


def random_vgg() -> dict:
    """Create random parameters of VGG-16 and LPIPS."""
    rng, channels, conv = np.random.default_rng(0), 3, {}
    for layer, convolutions in enumerate(LAYERS):
        for i in convolutions:
            kernel = rng.standard_normal((3, 3, channels, CHANNELS[layer])) / (3 * channels**0.5)
            conv[str(i)] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(CHANNELS[layer])}
            channels = CHANNELS[layer]
    return {"conv": conv, "linear": {str(i): jnp.ones(c) / c for i, c in enumerate(CHANNELS)}}


def measure_tokenizer(args: argparse.Namespace, tokenizer: Tokenizer, task: NextScaleTask) -> dict:
    """Measure `encode` (images to tokens) or `decode` (tokens to images)."""
    params, side = init_tokenizer_params(tokenizer), tokenizer.config.image_size
    if args.what == "encode":
        inputs = jnp.zeros((args.batch, side, side, 3))
    else:
        inputs = jnp.zeros((args.batch, tokenizer.config.schedule.length), jnp.int32)
    function = jax.jit(partial(getattr(tokenizer_model, args.what), tokenizer))
    result = time_function(function, params, inputs, repeats=args.repeats)
    flops = program_flops(function, params, inputs)
    return result | {"tflops": flops / result["seconds"] / 1e12, "parameters": count_parameters(params)}


def main():
    cli.keep_freed_memory()
    args = parse_arguments()
    if args.against and args.what not in ("sample", "train"):
        sys.exit("--against: goes with sample and train")
    if args.latency:
        if args.what != "sample":
            sys.exit(f"--latency: goes with sample, not with {args.what}")
        args.batch = 1
    if args.with_encoder and args.what != "train":
        sys.exit(f"--with_encoder: goes with train, not with {args.what}")
    yardstick = measure_yardstick(args) if args.against else None
    tokenizer, task = make_networks(args)
    if args.what == "input" and args.tokens:
        return print(json.dumps(measure_tokens(args, task.config)))
    if args.what == "input":
        try:
            source = open_data(args)
        except (FileNotFoundError, ValueError) as error:  # the data set is missing or too small
            sys.exit(f"throughput: {error}")
        return print(json.dumps(measure_input(args, tokenizer, task.config, source)))
    steps = {"sample": measure_sampling, "train": measure_training, "tokenizer": measure_tokenizer_training}
    run = steps.get(args.what, measure_tokenizer)
    result = run(args, tokenizer, task)
    line = {"what": args.what, "depth": args.depth, "batch": args.batch, "size": tokenizer.config.image_size}
    line |= {"device": jax.devices()[0].device_kind, "dtype": jnp.dtype(tokenizer.dtype).name, **result}
    line |= {"images_per_s": round(args.batch / result["seconds"], 3), "tflops": round(result["tflops"], 3)}
    if peak := peak_flops(jax.devices()[0]):
        line["share_of_peak"] = round(result["tflops"] * 1e12 / peak, 3)
    if yardstick:
        seconds = result.get("without_decoder", result)["seconds"]  # the yardstick has no decoder
        line |= {"against": yardstick, "ratio": round(yardstick["seconds"] / seconds, 3)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
