"""Flags and start-up that the commands share: networks to load, sampling options, hosts, errors."""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import platform
import re
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

import var_jax
from var_jax.api import ARGUMENTS
from var_jax.errors import ConfigError, UserError, config_errors
from var_jax.installation.machine import compilation_cache_folder
from var_jax.interop.model_names import find_model
from var_jax.interop.tensor_files import SUFFIXES
from var_jax.paths import local_path
from var_jax.sampling.options import MAX_SEED, SamplingOptions
from var_jax.scales import Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import fingerprint
from var_jax.training.checkpoint import unfinished_notice
from var_jax.training.config_fields import RENAMED, rename_flags
from var_jax.transformer.config import TransformerConfig

FLAGS = flags.FLAGS
NO_CLUSTER = "coordinator_address should be defined"  # start of JAX's error outside of any known cluster
MALLOC_ONE_ARENA, MALLOC_NO_MMAP, MALLOC_NO_TRIM = (-8, 1), (-4, 0), (-1, -1)  # parameters of mallopt(3)
TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"
PER_SCALE = ("guidance", "top_k", "top_p", "temperature", "smooth")


def define_tokenizer_flags() -> None:
    """Define the flags that select a tokenizer and its dtype."""
    flags.DEFINE_string("workdir", None, "Directory of a run")
    flags.DEFINE_string("tokenizer", None, "Published tokenizer file, or a run; by default that of --workdir")
    flags.DEFINE_list("scales", None, "Sides of the token maps of a published file that is not of 256px")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Compute dtype of the networks; auto: float32 to encode, so that tokens are the same on every "
        "platform, and otherwise bfloat16 on accelerators and float32 on CPU",
    )


def define_model_flags(has_output: bool = True) -> None:
    """Define the flags that select a tokenizer and a transformer, and --out unless nothing is written."""
    define_tokenizer_flags()
    flags.DEFINE_string("checkpoint", None, "Published VAR file; or a step of the run, `latest` or `best`")
    if has_output:
        flags.DEFINE_string(
            "out", None, "Output directory; by default --workdir, or else the current directory"
        )


def define_sampling_flags() -> None:
    """Define a flag for each of the `SamplingOptions`; the defaults are those of the run, or as published."""
    flags.DEFINE_integer("seed", 0, "Random seed; image i depends on (seed, i) alone", 0, MAX_SEED)
    flags.DEFINE_list("guidance", None, "Guidance strength at the last scale; or one per scale, 0,1,2,...")
    flags.DEFINE_enum(
        "guidance_schedule",
        None,
        ["ramp", "constant"],
        "Course of a single guidance strength over the scales",
    )
    flags.DEFINE_integer("guidance_until", None, "First scale (0 is the coarsest) without guidance: faster")
    flags.DEFINE_list("top_k", None, "Number of likeliest codes to sample from; 0 for all; or one per scale")
    flags.DEFINE_list(
        "top_p", None, "Probability that the codes to sample from hold together; 0 for all; or one per scale"
    )
    flags.DEFINE_list("temperature", None, "Divisor of the logits; or one per scale")
    flags.DEFINE_list("smooth", None, "true: mix codes instead of sampling one; or one per scale")
    flags.DEFINE_integer("upto", None, "Number of maps to sample, for a coarse preview; by default all")


def define_refiner_flags() -> None:
    """Define the flags of a second transformer that samples the last maps."""
    flags.DEFINE_string(
        "refiner", None, "Run or published VAR file that samples the maps after the first --draft_scales"
    )
    flags.DEFINE_integer("draft_scales", None, "Number of maps before those of the --refiner", lower_bound=1)


def define_host_flags() -> None:
    """Define the flags of several hosts that are not part of a cluster known to JAX."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for a job on several hosts")
    flags.DEFINE_integer("num_processes", None, "Number of processes of the job")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0")
    flags.DEFINE_integer("host_timeout", 100, "Seconds without a host after which the other hosts exit")


def run(
    main: Callable[[list[str]], None],
    arguments: tuple[str, ...] = (),
    verbosity: int = logging.ERROR,
    caches_programs: bool = True,
    renamed: Mapping[str, str] | None = None,
    commands: tuple[str, ...] = (),
) -> None:
    """Parse the flags and run a command; print a `UserError` as one line, other errors with their traceback.

    A UsageError is that line and one that points to --help, which lists the flags of this package, too.

    Config fields and flags of the last release are accepted under their old names, with a notice on stderr.

    Args:
      main: function that takes the program name and the positional arguments.
      arguments: names of the positional arguments, for the message.
      verbosity: log level; Orbax warns about every item that is not read.
      caches_programs: whether compiled programs are kept; not those compiled ahead of time, which JAX cannot
        read back.
      renamed: old names of flags of this command to their present names.
      commands: names of which one may be given as the positional argument.
    """

    def command(argv: list[str]) -> None:
        if commands and (len(argv) > 2 or (argv[1:] and argv[1] not in commands)):
            usage_error(f"the command must be one of {', '.join(commands)}, got {' '.join(argv[1:])}")
        if not commands and len(argv) != 1 + len(arguments):
            expected = " ".join(arguments) or "none"
            usage_error(f"positional arguments must be {expected}, got {argv[1:]}")
        logging.set_verbosity(verbosity)
        provide_threads()
        keep_freed_memory()
        prefer_cublas()
        if caches_programs:
            enable_compilation_cache()
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"{command_name()}: {error}")
        except app.UsageError as error:
            usage_error(str(error))

    sys.argv[:], notices = rename_flags(sys.argv)  # in place: ml_collections looks there for overrides
    for i, argument in enumerate(sys.argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name in (renamed or {}):
            sys.argv[i] = f"--{renamed[name]}{equals}{value}"
            notices.append(f"--{name} is called --{renamed[name]} now; the next release drops the old name")
    for notice in notices:
        print(notice, file=sys.stderr)
    app.run(command, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; report a wrong one, or a field that a config does not have, as one line."""
    for module, module_flags in FLAGS.flags_by_module_dict().items():
        for flag in module_flags if module.startswith("var_jax.") else ():
            FLAGS.register_key_flag_for_module(argv[0], flag)  # --help lists the key flags of the command
    try:
        return FLAGS(argv)
    except flags.Error as error:
        usage_error(str(error))
    except AttributeError as error:  # of ml_collections, around a KeyError that names a field like it
        reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else str(error)
        sys.exit(f"{command_name()}: no such field of the config: {' '.join(reason.split())}")
    except KeyError as error:  # of ml_collections, for a field of a field
        sys.exit(
            f"{command_name()}: no such field of the config: {error.args[0]}; in a config with stages give "
            "the stage, too, e.g. --config.next_scale.model.depth"
        )


def usage_error(message: str) -> NoReturn:
    """Exit with a message and the way to the flags, without the help text that absl would print before."""
    sys.exit(f"{command_name()}: {message}\n  see --help")


def command_name() -> str:
    """Return the name of the running command: `train.py`, `edit`, or NAME of `experiments.NAME.run`."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return Path(sys.argv[0]).name
    parts = spec.name.split(".")
    return parts[-2] if parts[-1] in ("run", "__main__") else parts[-1]


def initialize_distributed() -> None:
    """Initialize `jax.distributed`, before any other call of JAX; silence stdout on all but process 0.

    The processes are those of the flags, or those of the TPU pod, or of the SLURM, MPI or Kubernetes job of
    this process; outside of all of these it is the only one.  If they cannot connect, print what to check
    and exit.

    Raises:
      UsageError: if only some of the flags are set.
    """
    cluster = [FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id]
    if None in cluster and cluster != [None] * 3:
        raise app.UsageError("several hosts need --coordinator, --num_processes and --process_id, all three")
    try:
        jax.distributed.initialize(*cluster, heartbeat_timeout_seconds=FLAGS.host_timeout)
    except (RuntimeError, ValueError) as error:
        if None in cluster and str(error).startswith(NO_CLUSTER):
            return
        address = cluster[0] or "of process 0, as the cluster names it"
        sys.exit(
            f"{command_name()}: the hosts did not find each other: {error}\n"
            "  Check that every process is started, with equal --num_processes and its own --process_id,\n"
            f"  and that the address {address} is reachable from all hosts and its port is free on process 0."
        )
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def abort_on_error():
    """On several hosts, print the error of a process that fails and end it with `os._exit(1)`.

    A normal exit would block in JAX's shutdown barrier for minutes while the other hosts wait for this one;
    after `os._exit` they exit, too.  A UserError prints its message alone.  sys.exit counts as a failure and
    prints its message; a subclass of SystemExit (`Preempted`) is raised on all hosts and propagates.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        is_regular_exit = isinstance(error, SystemExit) and (type(error) is not SystemExit or not error.code)
        if jax.process_count() == 1 or is_regular_exit:
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif isinstance(error, UserError):
            print(f"{command_name()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache in JAX_COMPILATION_CACHE_DIR, or else in ~/.cache/var_jax."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache_folder(os.environ)))


def provide_threads() -> None:
    """Give fake CPU devices more threads than there are cores, before JAX starts.

    They run independent collectives in different orders, and each blocks a thread; with one thread per core,
    which is XLA's default, all may wait for each other.
    """
    devices = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices and int(devices[1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(8 * int(devices[1]), os.cpu_count() or 1)))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, on a machine without an accelerator, before JAX starts threads.

    By default it returns large blocks to the kernel, so that every run of a program takes new pages for its
    temporary arrays: a fifth of the CPU time of a training step of the digits config.
    """
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if (plugins and jax.config.jax_platforms != "cpu") or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in (MALLOC_ONE_ARENA, MALLOC_NO_MMAP, MALLOC_NO_TRIM):
        libc.mallopt(parameter, value)


def prefer_cublas() -> None:
    """Multiply matrices with cuBLAS, not Triton, on NVIDIA GPUs, unless XLA_FLAGS decide; before JAX starts.

    cuBLAS adds biases and applies GELU as it writes a product.  Triton's products take minutes to autotune.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    has_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if has_plugin and TRITON_PRODUCTS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{TRITON_PRODUCTS}=false".strip()


def tokenizer_source() -> tuple[str, tuple[int, ...] | None]:
    """Return the path of the tokenizer that the flags name, and the scales they give or None.

    Print a warning if it is that of a run and was not trained to its last step.

    Raises:
      UsageError: if the flags name no tokenizer.
      ConfigError: on a name that no model has.
    """
    if not (FLAGS.tokenizer or FLAGS.workdir):
        raise app.UsageError("give --workdir of a run, or --tokenizer")
    scales = None if FLAGS.scales is None else tuple(numbers("scales", int))
    path = FLAGS.tokenizer or FLAGS.workdir
    with config_errors():
        if notice := unfinished_notice(find_model(path), "tokenizer"):
            print(notice, flush=True)
    return path, scales


def load() -> var_jax.LoadedVAR:
    """Load the networks that the flags name.

    Raises:
      UsageError: if the flags do not name both.
      ConfigError: naming the file that cannot be read.
    """
    checkpoint = FLAGS.checkpoint or "latest"
    is_file = checkpoint.endswith(SUFFIXES)
    if not (FLAGS.tokenizer or FLAGS.workdir) or not (is_file or FLAGS.workdir):
        raise app.UsageError(
            "give --workdir of a run, or --tokenizer and --checkpoint of published files "
            f"({', '.join(SUFFIXES)})"
        )
    path, scales = tokenizer_source()
    with config_errors():
        tokenizer = var_jax.load_tokenizer(path, scales=scales, dtype=FLAGS.dtype)
        if is_file:
            model = var_jax.load_var(checkpoint, tokenizer=tokenizer, dtype=FLAGS.dtype)
        else:
            model = var_jax.load_var(FLAGS.workdir, tokenizer=tokenizer, step=checkpoint, dtype=FLAGS.dtype)
    return with_refiner(model)


def with_refiner(model: var_jax.LoadedVAR) -> var_jax.LoadedVAR:
    """Return a model with the refiner of the flags, if the command has such flags and they name one.

    Raises:
      UsageError: if only one of the flags is given.
      ConfigError: if the refiner cannot be read or does not fit.
    """
    path, draft_scales = getattr(FLAGS, "refiner", None), getattr(FLAGS, "draft_scales", None)
    if path is None and draft_scales is None:
        return model
    if path is None or draft_scales is None:
        raise app.UsageError("give both --refiner and --draft_scales, or neither")
    # A file does not tell its tokenizer; a run has its own, which is compared.
    tokenizer = model.tokenizer if path.endswith(SUFFIXES) else None
    with config_errors(prefix="--refiner: "):
        refiner = var_jax.load_var(path, tokenizer=tokenizer, dtype=FLAGS.dtype)
        return model.with_refiner(refiner, draft_scales)


def options(
    model: var_jax.LoadedVAR, fixed: Mapping[str, object] = MappingProxyType({}), **defaults
) -> SamplingOptions:
    """Return the sampling options of the flags, with those of the model's run for flags that are not given.

    Args:
      model: model to sample from.
      fixed: options that replace those of the flags.
      **defaults: options that replace those of the run.

    Raises:
      UsageError: naming the option that is wrong.
    """
    overrides = {}
    for name in (field.name for field in dataclasses.fields(SamplingOptions)):
        value = FLAGS[name].value
        if value is not None and name not in fixed:
            overrides[name] = _per_scale(name) if name in PER_SCALE else value
    try:
        result = dataclasses.replace(model.options, **{**defaults, **overrides, **fixed})
        result.per_scale(Scales(model.scales), model.tokenizer.num_codes)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    return result


def job(model: var_jax.LoadedVAR, conditions: np.ndarray, options: SamplingOptions) -> dict:
    """Return everything that decides the images; only the same job can be resumed.

    Args:
      model: on one device; all parameters, those of its tokenizer too, enter the fingerprints.
      conditions: labels int [N], or captions or embeddings.
      options: sampling options.
    """
    spec = {
        "labels": f"{len(conditions)} labels {zlib.crc32(conditions.tobytes()):08x}",
        "tokenizer": _network_id(model.tokenizer, model.tokenizer.params),
        "transformer": _network_id(model, model.checkpoint_params),
        "seed": FLAGS.seed,
        **dataclasses.asdict(options),
    }
    if model.refiner is not None:
        spec["refiner"] = _network_id(model.refiner, model.refiner.checkpoint_params)
        spec["draft_scales"] = model.draft_scales
    return spec


# Fields of a transformer that the last release did not have, and their values in its models.
NEW_FIELDS = dict(
    mask="block_causal", condition="label", condition_length=0, condition_width=0, vocabulary=(), text_depth=2
)


def config_checksum(config: TokenizerConfig | TransformerConfig) -> int:
    """Return a checksum of an architecture, equal to that of the last release: its samples are resumed."""
    text = repr(config)
    for name, value in NEW_FIELDS.items():
        if getattr(config, name, None) == value:
            text = text.replace(f", {name}={value!r}", "")
    for old, new in RENAMED["model"].items():
        text = text.replace(f" {new}=", f" {old}=")
    return zlib.crc32(text.encode())


def _network_id(network: var_jax.LoadedTokenizer | var_jax.LoadedVAR, params: dict) -> str:
    """Return checksums of weights and architecture, and the compute dtype, of a network."""
    config = config_checksum(network.module.config)
    return f"weights {fingerprint(params)}, config {config:08x}, {np.dtype(network.module.dtype)}"


def _per_scale(name: str):
    """Return the single value of a list flag, or a tuple of one value per scale."""
    parse = {"top_k": int, "smooth": _parse_bool}.get(name, float)
    values = tuple(numbers(name, parse))
    return values[0] if len(values) == 1 else values


def numbers(flag: str, parse: Callable[[str], float]) -> list:
    """Return the parsed values of a list flag.

    Raises:
      UsageError: naming the flag, if `parse` raises ValueError.
    """
    try:
        return [parse(value) for value in FLAGS[flag].value]
    except ValueError as error:
        raise app.UsageError(f"--{flag}={','.join(FLAGS[flag].value)}: {error}") from error


def local_folder(flag: str) -> epath.Path:
    """Return the directory on this machine that a flag names.

    Raises:
      UsageError: on a URL.
    """
    try:
        return local_path(FLAGS[flag].value, f"--{flag}")
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _parse_bool(word: str) -> bool:
    if word.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"must be true or false, got {word!r}")
    return word.lower() in ("true", "1")


def labels(model: var_jax.LoadedVAR, flag: str, max_count: int | None = None) -> np.ndarray:
    """Return the labels int32 [N] of a list flag: numbers, ranges such as 0-999, and `none` for no class.

    Args:
      model: model whose classes they are.
      flag: name of the flag.
      max_count: largest number of labels to accept; None for any.

    Raises:
      UsageError: naming the flag, on words that are not classes, or more than `max_count` of them.
    """
    words, result = FLAGS[flag].value, []
    try:
        for word in words:
            first, dash, last = word.partition("-")
            if word == "none":
                result.append(model.num_classes)
            elif dash and first:
                result += range(int(first), int(last) + 1)
            else:
                result.append(int(word))
        if max_count is not None and len(result) > max_count:
            raise ValueError(f"must name at most {max_count} class, got {len(result)}")
        return model.check_labels(np.array(result, np.int64))
    except ValueError as error:
        raise app.UsageError(f"--{flag}={','.join(words)}: {error}") from error


def condition(model: var_jax.LoadedVAR, flag: str, count: int) -> dict:
    """Return the condition of a list flag, for `count` images, as an argument of the model's methods.

    The flag names a class, `none` for no class, or, of a model trained on captions, a prompt; without a value
    it is "no condition".

    Raises:
      UsageError: naming the flag, on what is no class or no prompt of the model.
    """
    config, words = model.module.config, FLAGS[flag].value
    is_caption = config.condition == "caption"
    if not words:
        nothing = [None] * count if is_caption else config.null_conditions(count)
        return {ARGUMENTS[config.condition]: nothing}
    if not is_caption:
        return {"labels": np.repeat(labels(model, flag, max_count=1), count)}
    text = ",".join(words)
    try:
        model.conditions(prompt=text)
    except ValueError as error:
        raise app.UsageError(f"--{flag}: {error}") from error
    return {"prompt": [text] * count}


def check_classes(model: var_jax.LoadedVAR) -> None:
    """Raise ConfigError if a model was not trained on classes."""
    if (kind := model.module.config.condition) != "label":
        raise ConfigError(
            f"this model was trained on {kind}s, not on classes: sample.py has --prompts and --embeddings"
        )
