"""Flags that the scripts share: which networks to load, and how to draw."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

import var_jax
from var_jax.errors import UserError, config_errors
from var_jax.interop.tensor_files import SUFFIXES
from var_jax.paths import local_path
from var_jax.sampling.options import MAX_SEED, SamplingOptions
from var_jax.training.config_fields import rename_flags

FLAGS = flags.FLAGS
NO_CLUSTER = "coordinator_address should be defined"  # what JAX says where it knows no cluster around it
PER_SCALE = ("guidance", "top_k", "top_p", "temperature", "smooth")


def define_tokenizer_flags() -> None:
    flags.DEFINE_string("workdir", None, "Directory of a run")
    flags.DEFINE_string("tokenizer", None, "Published tokenizer file or a run; by default that of --workdir")
    flags.DEFINE_list("scales", None, "Sides of the token maps of a published file that is not of 256px")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Of the networks; auto: float32 to encode, so that tokens are the same everywhere, and for the rest "
        "bfloat16 on accelerators, float32 on CPU",
    )


def define_model_flags() -> None:
    define_tokenizer_flags()
    flags.DEFINE_string("checkpoint", None, "Published VAR file; or a step of the run, `latest` or `best`")
    flags.DEFINE_string("out", None, "Where to write; by default --workdir, else here")


def define_sampling_flags() -> None:
    """Flags of `SamplingOptions`; what is not given is as in the run, or as published."""
    flags.DEFINE_integer("seed", 0, "Image i depends on (seed, i) alone", 0, MAX_SEED)
    flags.DEFINE_list("guidance", None, "Strength of guidance at the last scale; or one a scale, 0,1,2,...")
    flags.DEFINE_enum("guidance_schedule", None, ["ramp", "constant"], "How one strength is spread")
    flags.DEFINE_integer("guidance_until", None, "No guidance from this scale on (0 is the first): faster")
    flags.DEFINE_list("top_k", None, "Draw among so many of the likeliest codes; 0 for all; or one a scale")
    flags.DEFINE_list("top_p", None, "Draw among codes that hold this probability; 0 for all; or one a scale")
    flags.DEFINE_list("temperature", None, "Logits are divided by it; or one a scale")
    flags.DEFINE_list("smooth", None, "true: mix codes instead of drawing one; or one a scale")
    flags.DEFINE_integer("upto", None, "Draw the first so many maps only, a coarse preview")


def define_host_flags() -> None:
    """For several hosts that do not find each other by themselves."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where several hosts work together")
    flags.DEFINE_integer("num_processes", None, "How many there are")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0")
    flags.DEFINE_integer("host_timeout", 100, "Seconds after which a host that is gone ends the others, too")


def run(main: Callable[[list[str]], None], num_arguments: int = 0, verbosity: int = logging.ERROR) -> None:
    """Parse the flags and run a command, which prints a `UserError` as a line and any other error as it is.

    Config fields of the last release are accepted under their old names, with a notice.

    Args:
      main: the command; takes what is left of the command line.
      num_arguments: number of its positional arguments.
      verbosity: of the log; Orbax warns of every item that is left unread.
    """

    def command(argv: list[str]) -> None:
        if len(argv) != 1 + num_arguments:
            raise app.UsageError(f"takes {num_arguments or 'no'} arguments beside flags, got {argv[1:]}")
        logging.set_verbosity(verbosity)
        keep_compiled_programs()
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"{command_name()}: {error}")

    sys.argv[:], notices = rename_flags(sys.argv)  # in place: ml_collections looks there for overrides
    for notice in notices:
        print(notice, file=sys.stderr)
    app.run(command)


def command_name() -> str:
    """Name of the running command: `train.py`, `edit`, or the experiment of `experiments.NAME.run`."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return Path(sys.argv[0]).name
    parts = spec.name.split(".")
    return parts[-2] if parts[-1] == "run" else parts[-1]


def join_hosts() -> None:
    """Connects the processes of a run, before anything else is asked of JAX; all but process 0 fall silent.

    They are those that the flags name, or those of the TPU pod, the SLURM, MPI or Kubernetes job that this
    process is part of; outside of all of these it stays alone.  Ends the script with what to check where
    they do not find each other.

    Raises:
      UsageError: where a flag is missing.
    """
    given = [FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id]
    if None in given and given != [None] * 3:
        raise app.UsageError("several hosts need --coordinator, --num_processes and --process_id, all three")
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=FLAGS.host_timeout)
    except (RuntimeError, ValueError) as error:
        if None in given and str(error).startswith(NO_CLUSTER):
            return
        named = given[0] or "of process 0, as the cluster names it"
        sys.exit(
            f"{command_name()}: the hosts did not find each other: {error}\n"
            "  Check that every process was started, with the same number of them and an id of its own, and\n"
            f"  that the address {named} is reachable from all hosts and its port free on process 0."
        )
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def failing_at_once():
    """On several hosts, print what went wrong and end a process that fails with `os._exit(1)`.

    A normal exit would block in JAX's shutdown barrier for minutes, while the other hosts wait for this one;
    without it they end, too.  sys.exit counts as a failure and prints its message; a subclass of SystemExit
    (`Preempted`) is raised by all hosts alike and goes the usual way.  Of a UserError the message is printed.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        stopped = isinstance(error, SystemExit) and (type(error) is not SystemExit or not error.code)
        if jax.process_count() == 1 or stopped:
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif isinstance(error, UserError):
            print(f"{command_name()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def keep_compiled_programs() -> None:
    """Keeps compiled programs under ~/.cache/var_jax, or where JAX_COMPILATION_CACHE_DIR says."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "var_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def tokenizer_source() -> tuple[str, tuple[int, ...] | None]:
    """Path of the tokenizer that the flags name, and the sides of its token maps where they are given.

    Raises:
      UsageError: where the flags name none.
    """
    if not (FLAGS.tokenizer or FLAGS.workdir):
        raise app.UsageError("give --workdir of a run, or --tokenizer")
    scales = None if FLAGS.scales is None else tuple(numbers("scales", int))
    return FLAGS.tokenizer or FLAGS.workdir, scales


def load() -> var_jax.LoadedVAR:
    """Load the networks that the flags name.

    Raises:
      UsageError: where the flags name none.
      ConfigError: naming the file that cannot be read.
    """
    checkpoint = FLAGS.checkpoint or "latest"
    is_file = checkpoint.endswith(SUFFIXES)
    if not (FLAGS.tokenizer or FLAGS.workdir) or not (is_file or FLAGS.workdir):
        raise app.UsageError("give --workdir of a run, or --tokenizer and --checkpoint of published files")
    path, scales = tokenizer_source()
    with config_errors():
        tokenizer = var_jax.load_tokenizer(path, scales=scales, dtype=FLAGS.dtype)
        if is_file:
            return var_jax.load_var(checkpoint, tokenizer=tokenizer, dtype=FLAGS.dtype)
        return var_jax.load_var(FLAGS.workdir, tokenizer=tokenizer, step=checkpoint, dtype=FLAGS.dtype)


def options(model: var_jax.LoadedVAR, **defaults) -> SamplingOptions:
    """How to draw: what the flags say, over `defaults`, over what the model's run says.

    Raises:
      UsageError: naming the flag that is wrong.
    """
    given = {}
    for name in (field.name for field in dataclasses.fields(SamplingOptions)):
        value = FLAGS[name].value
        if value is not None:
            given[name] = _per_scale(name) if name in PER_SCALE else value
    try:
        result = dataclasses.replace(model.options, **{**defaults, **given})
        result.controls(model.module.config.schedule, model.module.config.num_codes)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    return result


def as_keywords(options: SamplingOptions) -> dict:
    """Options as the methods of a model take them."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _per_scale(name: str):
    """One value, or a tuple of one a scale."""
    kind = {"top_k": int, "smooth": _yes_or_no}.get(name, float)
    values = tuple(numbers(name, kind))
    return values[0] if len(values) == 1 else values


def numbers(flag: str, kind) -> list:
    """The values of a list flag.  Raises UsageError on what is none of that kind."""
    try:
        return [kind(value) for value in FLAGS[flag].value]
    except ValueError as error:
        raise app.UsageError(f"--{flag}={','.join(FLAGS[flag].value)}: {error}") from error


def local_folder(flag: str) -> epath.Path:
    """Directory on this machine that a flag names.  Raises UsageError on a URL."""
    try:
        return local_path(FLAGS[flag].value, f"--{flag}")
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _yes_or_no(word: str) -> bool:
    if word.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"must be true or false, got {word!r}")
    return word.lower() in ("true", "1")


def labels(model: var_jax.LoadedVAR, flag: str, most: int | None = None) -> np.ndarray:
    """Classes that a list flag names: numbers, ranges 0-999, and `none` for no class.

    Raises:
      UsageError: naming the flag, on what is no class, or more classes than `most`.
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
        if most is not None and len(result) > most:
            raise ValueError(f"must name {most} class, got {len(result)}")
        return model.check_labels(np.array(result, np.int64))
    except ValueError as error:
        raise app.UsageError(f"--{flag}={','.join(words)}: {error}") from error
