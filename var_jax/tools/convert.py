"""Convert weights between the published layout and a run directory.

    python -m var_jax.tools.convert vae_ch160v4096z32.pth runs/published
    python -m var_jax.tools.convert var_d16.pth runs/published
    python -m var_jax.tools.convert runs/published vae.safetensors --stage=tokenizer
    python -m var_jax.tools.convert runs/published var_d16.pth --stage=next_scale    # extra `torch`

Tensors are converted one parameter at a time, so that no network is held in memory twice.  A file with
missing or unknown tensors, or tensors of another shape, is refused with their names.  The names of the
tensors decide whether a file holds a tokenizer, a transformer, or both (a checkpoint of the published
trainer); their shapes decide the architecture.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
from absl import flags
from etils import epath

from var_jax import cli
from var_jax.errors import ConfigError, config_errors
from var_jax.interop import published
from var_jax.interop.load import (
    published_next_scale,
    published_tokenizer,
    tokenizer_shapes,
    transformer_shapes,
)
from var_jax.interop.tensor_files import SUFFIXES, read_networks, write_pth, write_safetensors
from var_jax.paths import local_path
from var_jax.sampling.options import SamplingOptions
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import fingerprint
from var_jax.training.checkpoint import (
    CHECKPOINT_DIR,
    CheckpointMissing,
    SavedArrays,
    check_is_new,
    check_storage,
    load_config,
    load_params,
    save_params,
)
from var_jax.training.checkpoint_integrity import steps_under
from var_jax.transformer.config import NextScaleConfig

FLAGS = flags.FLAGS
PUBLISHED_STAGES = ("tokenizer", "next_scale")


def to_run(source: Path, run: Path, scales: tuple[int, ...] | None = None) -> list[str]:
    """Write the networks of a file in the published layout as stages of a run.

    Args:
      source: `.pth` or `.safetensors` file.
      run: directory of the run; may have the other stage already.
      scales: sides of the token maps, if they are not the published ones.

    Returns:
      A summary line for each stage that was written.

    Raises:
      ConfigError: naming the tensors that do not fit.
      FileExistsError: if the run has that stage already.
    """
    networks = []
    try:  # check all networks before any of them is written
        for kind, tensors in read_networks(source).items():
            kind = kind or ("tokenizer" if "quantize.embedding.weight" in tensors else "next_scale")
            check_is_new(run / kind / CHECKPOINT_DIR)
            read = published_tokenizer if kind == "tokenizer" else published_next_scale
            networks.append((kind, tensors, *read(source, tensors, scales)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    has_tokenizer = networks[0][0] == "tokenizer"  # `read_networks` yields it first
    tokenizer = "" if has_tokenizer else _tokenizer_fingerprint(run)
    lines = []
    for kind, tensors, config, table, shapes in networks:
        params = published.to_ours(tensors, table, shapes)
        extra = {}
        if kind == "tokenizer":
            extra, tokenizer = {"code_hits": params.pop("code_hits")}, fingerprint(params)
        save_params(run / kind / CHECKPOINT_DIR, params, extra, _record(kind, config, source, tokenizer))
        lines.append(f"{run / kind}: {kind} of {source}, {len(tensors)} tensors, scales {config.scales}")
    if not tokenizer:
        lines.append(f"{run} has no tokenizer yet: {published.TOKENIZER_ADVICE}")
    return lines


def _tokenizer_fingerprint(run: Path) -> str:
    """Return the fingerprint of a run's tokenizer; "" if the run has no tokenizer yet."""
    folder = run / "tokenizer" / CHECKPOINT_DIR
    return fingerprint(load_params(folder)[0]) if steps_under(folder) else ""


def _record(kind: str, config: TokenizerConfig | NextScaleConfig, source: Path, tokenizer: str) -> dict:
    """Return the config of a checkpoint in the layout of the training loop."""
    tokenizer = "" if kind == "tokenizer" else tokenizer
    stage = {"task": kind, "converted_from": str(source.absolute())}
    if kind == "next_scale":
        stage |= {"tokenizer": "", "scales": [], "sampling": dataclasses.asdict(SamplingOptions())}
    model = dataclasses.asdict(config)
    return {"task": kind, "model": model, "stage": stage, "steps": 0, "tokenizer": tokenizer}


def to_file(run: Path, stage: str | None, target: Path, step: int | str = "latest") -> list[str]:
    """Write a stage of a run as a file in the published layout.

    Args:
      run: directory of a run.
      stage: `tokenizer` or `next_scale`; None if the run has only one of them.
      target: `.pth` (needs PyTorch) or `.safetensors` file.
      step: checkpoint of the run: a step, `latest` or `best`.

    Returns:
      A summary line.

    Raises:
      ConfigError: if the stage is ambiguous, or the published layout cannot express the network.
      CheckpointMissing: if the run has no checkpoint.
    """
    stages = [name for name in PUBLISHED_STAGES if (run / name / CHECKPOINT_DIR).exists()]
    if not stages:
        raise CheckpointMissing(f"{run} is not a run: it has neither {' nor '.join(PUBLISHED_STAGES)}")
    if stage is None and len(stages) > 1:
        raise ConfigError(f"{run} has {' and '.join(stages)}: choose one with --stage")
    stage = stage or stages[0]
    folder = run / stage / CHECKPOINT_DIR
    step, record = load_config(folder, step)
    if stage == "tokenizer":
        config = TokenizerConfig(**record["model"])
        table, shapes, constants = published.tokenizer_table(config), tokenizer_shapes(config), {}
    else:
        config = NextScaleConfig(**record["model"])
        table, shapes = published.next_scale_table(config), transformer_shapes(config)
        constants = published.next_scale_constants(config)
    check_expressible(config)

    params, state = (SavedArrays(folder, step, item) for item in ("params", "state"))

    def read(path: str) -> np.ndarray:
        return state.read("extra/code_hits") if path == "code_hits" else params.read(path)

    tensors = published.published_tensors(read, table, constants)
    if target.suffix == ".safetensors":
        header_shapes = {name: constant.shape for name, constant in constants.items()}
        header_shapes |= published.published_shapes(table, shapes)
        dtypes = {name: constant.dtype for name, constant in constants.items()}
        write_safetensors(target, header_shapes, tensors, dtypes)
    else:
        write_pth(target, tensors)
    return [f"{target}: {stage} of {run}, step {step}, {os.path.getsize(target) / 2**20:.1f} MiB"]


def check_expressible(config: TokenizerConfig | NextScaleConfig) -> None:
    """Raise ConfigError if a file in the published layout could not express the architecture."""
    problems = []
    if isinstance(config, TokenizerConfig):
        defaults = TokenizerConfig()
        for field in ("patch", "norm_groups", "l2_normalized"):
            value, required = getattr(config, field), getattr(defaults, field)
            if value != required:
                problems.append(f"{field} is {value}, must be {required}")
    else:
        if config.condition != "label":
            problems.append(f"condition is {config.condition}, must be label")
        if config.positions != "learned_1d":
            problems.append(f"positions is {config.positions}, must be learned_1d")
        if config.mask != "block_causal":
            problems.append(f"mask is {config.mask}, must be block_causal")
        if not config.normalized_attention and config.head_dim != 64:
            problems.append(f"head size of plain attention is {config.head_dim}, must be 64")
    if problems:
        raise ConfigError("the published layout cannot express this network: " + "; ".join(problems))


def convert(source: Path, target: Path, stage: str | None, scales, step: int | str) -> list[str]:
    """Convert a file to a run, or a run to a file; see `to_run` and `to_file`."""
    if source.is_dir():
        if target.suffix not in SUFFIXES:
            raise ConfigError(
                f"{source} is a run, so the target must be a {' or '.join(SUFFIXES)} file: {target}"
            )
        return to_file(source, stage, target, step)
    if target.suffix in SUFFIXES:
        raise ConfigError(f"{source} is a file, so the target must be the directory of a run: {target}")
    return to_run(source, target, scales)


def check_path(path: str, name: str) -> epath.Path:
    """Return the path of a weights file on this machine, or of a run, which may be in a bucket.

    Raises:
      ConfigError: on other URLs.
    """
    with config_errors():
        return local_path(path, name) if path.endswith(SUFFIXES) else check_storage(path, name)


def main(argv):
    with config_errors(prefix="--scales: "):
        scales = None if FLAGS.scales is None else tuple(int(side) for side in FLAGS.scales)
    with config_errors(OSError, ModuleNotFoundError):
        source, target = (check_path(path, name) for path, name in zip(argv[1:], ("SRC", "DST"), strict=True))
        print("\n".join(convert(source, target, FLAGS.stage, scales, FLAGS.step)))


if __name__ == "__main__":
    flags.DEFINE_enum("stage", None, PUBLISHED_STAGES, "Stage of a run to write; needed if it has both")
    flags.DEFINE_list("scales", None, "Sides of the token maps of a file that is not of 256 or 512 pixels")
    flags.DEFINE_string("step", "latest", "Checkpoint of a run: a step, latest or best")
    cli.run(main, arguments=("SRC", "DST"))
