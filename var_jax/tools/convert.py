"""Converts weights between the published layout and a run directory of ours.

    python -m var_jax.tools.convert vae_ch160v4096z32.pth runs/published
    python -m var_jax.tools.convert var_d16.pth runs/published
    python -m var_jax.tools.convert runs/published vae.safetensors --stage=tokenizer
    python -m var_jax.tools.convert runs/published var_d16.pth --stage=next_scale    # extra `torch`

Tensors go one parameter at a time: nothing is held twice.  Every tensor is accounted for; a file that lacks
one, or has one too many or of another shape, is refused with their names.  What a file holds (tokenizer,
transformer, or both in a checkpoint of the published trainer) is seen from its names, and the architecture
from its shapes.
"""

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags
from etils import epath

from var_jax import cli
from var_jax.errors import ConfigError, config_errors
from var_jax.interop import published
from var_jax.interop.load import (
    next_scale_shapes,
    published_next_scale,
    published_tokenizer,
    tokenizer_shapes,
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
STAGES = ("tokenizer", "next_scale")


def to_run(source: Path, run: Path, scales: tuple[int, ...] | None = None) -> list[str]:
    """Writes what a file in the published layout holds as stages of a run.

    Args:
      source: `.pth` or `.safetensors`.
      run: directory of the run; may hold the other stage already.
      scales: sides of the token maps, where they are not the published ones.

    Returns:
      A line for each stage that was written.

    Raises:
      ConfigError: naming the tensors that do not fit.
      FileExistsError: where the run has that stage already.
    """
    networks = []
    try:  # whatever can be wrong, before anything is written
        for kind, tensors in read_networks(source).items():
            kind = kind or ("tokenizer" if "quantize.embedding.weight" in tensors else "next_scale")
            check_is_new(run / kind / CHECKPOINT_DIR)
            read = published_tokenizer if kind == "tokenizer" else published_next_scale
            networks.append((kind, tensors, *read(source, tensors, scales)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    is_new = networks[0][0] == "tokenizer"  # it comes first
    tokenizer = "" if is_new else _fingerprint_in(run)
    lines = []
    for kind, tensors, config, table, shapes in networks:
        params, extra = published.to_ours(tensors, table, shapes), {}
        if kind == "tokenizer":
            extra, tokenizer = {"code_hits": params.pop("code_hits")}, fingerprint(params)
        save_params(run / kind / CHECKPOINT_DIR, params, extra, _record(kind, config, source, tokenizer))
        lines.append(f"{run / kind}: {kind} of {source}, {len(tensors)} tensors, scales {config.scales}")
    return lines


def _fingerprint_in(run: Path) -> str:
    """Fingerprint of the tokenizer of a run; "" where it has none yet."""
    folder = run / "tokenizer" / CHECKPOINT_DIR
    return fingerprint(load_params(folder)[0]) if steps_under(folder) else ""


def _record(kind: str, config: TokenizerConfig | NextScaleConfig, source: Path, tokenizer: str) -> dict:
    """Config of a checkpoint, as the training loop saves it."""
    tokenizer = "" if kind == "tokenizer" else tokenizer
    stage = {"task": kind, "converted_from": str(source.absolute())}
    if kind == "next_scale":
        stage |= {"tokenizer": "", "scales": [], "sampling": dataclasses.asdict(SamplingOptions())}
    model = dataclasses.asdict(config)
    return {"task": kind, "model": model, "stage": stage, "steps": 0, "tokenizer": tokenizer}


def to_file(run: Path, stage: str | None, target: Path, step: int | str = "latest") -> list[str]:
    """Writes a stage of a run as a file in the published layout.

    Args:
      run: directory of a run.
      stage: `tokenizer` or `next_scale`; may be left out where the run has one alone.
      target: `.pth` (needs PyTorch) or `.safetensors`.
      step: checkpoint of the run: a step, `latest` or `best`.

    Raises:
      ConfigError: on a stage that is not there, or a network that the layout cannot express.
      CheckpointMissing: where the run has no checkpoint.
    """
    there = [name for name in STAGES if (run / name / CHECKPOINT_DIR).exists()]
    if not there:
        raise CheckpointMissing(f"{run} is no run: it has neither {' nor '.join(STAGES)}")
    if stage is None and len(there) > 1:
        raise ConfigError(f"{run} has {' and '.join(there)}: say which with --stage")
    stage = stage or there[0]
    folder = run / stage / CHECKPOINT_DIR
    step, record = load_config(folder, step)
    if stage == "tokenizer":
        config = TokenizerConfig(**record["model"])
        table, shapes, constants = published.tokenizer_table(config), tokenizer_shapes(config), {}
    else:
        config = NextScaleConfig(**record["model"])
        table, shapes = published.next_scale_table(config), next_scale_shapes(config)
        constants = published.next_scale_constants(config)
    check_expressible(config)

    params, state = (SavedArrays(folder, step, item) for item in ("params", "state"))

    def read(path: str) -> np.ndarray:
        return state.read("extra/code_hits") if path == "code_hits" else params.read(path)

    tensors = published.published_tensors(read, table, constants)
    if target.suffix == ".safetensors":
        announced = {name: constant.shape for name, constant in constants.items()}
        announced |= published.published_shapes(table, shapes)
        dtypes = {name: constant.dtype for name, constant in constants.items()}
        write_safetensors(target, announced, tensors, dtypes)
    else:
        write_pth(target, tensors)
    return [f"{target}: {stage} of {run}, step {step}, {target.stat().st_size / 2**20:.1f} MiB"]


def check_expressible(config: TokenizerConfig | NextScaleConfig) -> None:
    """Raises ConfigError where the published layout could not say what the architecture is."""
    problems = []
    if isinstance(config, TokenizerConfig):
        blank = TokenizerConfig()
        for field in ("patch", "norm_groups", "l2_normalized"):
            if getattr(config, field) != getattr(blank, field):
                problems.append(f"{field} is {getattr(config, field)}, there always {getattr(blank, field)}")
    else:
        if config.positions != "learned_1d":
            problems.append(f"positions is {config.positions}, there always learned_1d")
        if not config.normalized_attention and config.head_dim != 64:
            problems.append(f"heads of plain attention are {config.head_dim} wide, there always 64")
    if problems:
        raise ConfigError("the published layout cannot express this network: " + "; ".join(problems))


def convert(source: Path, target: Path, stage: str | None, scales, step: int | str) -> list[str]:
    """To a run if the source is a file, to a file if it is a run; see `to_run` and `to_file`."""
    if source.is_dir():
        if target.suffix not in SUFFIXES:
            raise ConfigError(
                f"{source} is a run, so the target must be a {' or '.join(SUFFIXES)} file: {target}"
            )
        return to_file(source, stage, target, step)
    if target.suffix in SUFFIXES:
        raise ConfigError(f"{source} is a file, so the target must be the directory of a run: {target}")
    return to_run(source, target, scales)


def path_of(path: str, name: str) -> epath.Path:
    """A file of weights on this machine, or a run, which may be in a bucket; ConfigError on other URLs."""
    with config_errors():
        return local_path(path, name) if path.endswith(SUFFIXES) else check_storage(path, name)


def main(argv):
    with config_errors(prefix="--scales: "):
        scales = None if FLAGS.scales is None else tuple(int(side) for side in FLAGS.scales)
    with config_errors(OSError, ModuleNotFoundError):
        source, target = (path_of(*named) for named in zip(argv[1:], ("SRC", "DST"), strict=True))
        print("\n".join(convert(source, target, FLAGS.stage, scales, FLAGS.step)))


if __name__ == "__main__":
    flags.DEFINE_enum("stage", None, STAGES, "Which stage of a run to write; needed where it has both")
    flags.DEFINE_list("scales", None, "Sides of the token maps of a file that is not of 256 or 512 pixels")
    flags.DEFINE_string("step", "latest", "Checkpoint of a run: a step, latest or best")
    cli.run(main, num_arguments=2)  # SRC and DST
