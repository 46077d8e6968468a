"""Fit scaling laws: held-out loss and token error against parameters and compute.

    python -m experiments.scaling_law.run --config=configs/digits.py --out=runs/scaling_law
    python -m experiments.scaling_law.run --config=configs/var.py:d16 --config.tokenizer=runs/tokenizer \\
        --config.data.dir=DATA --config.data.tokens=TOKENS --depths=6,8,10,12,14,16,18,20,24,30 \\
        --width_per_depth=64 --norate_by_width --out=DIR     # ImageNet on a pod; not yet run

Trains the next_scale stage of a config at several depths, with width and heads proportional to depth
(published: width 64 and one head per block), on one tokenizer, with the same batch and number of steps.  The
learning rate is proportional to 1 / width (Yang et al. 2022, table 3), or with --norate_by_width the same for
all sizes, as published.  It is constant after its warm-up, and evaluations use a moving average of the
parameters over about the last ninth of the steps so far.  Therefore every evaluation is a valid point of loss
against compute, and one run gives a whole curve.  This replaces the config's schedule and moving average.

The config names the tokenizer and tokens (`tokenizer`, `data.tokens`).  If it does not, its own tokenizer
stage is trained first, and the data is encoded once in `--crops` random crops with that stage's transform.
Every run uses the training loop under OUT/runs/DEPTH/SEED, so an interrupted call resumes.  Writes
`scaling_law.md` (tables), `scaling_law.json` and `scaling_law.png` under OUT.
"""

import json
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from benchmarks.workload import next_scale_stage
from experiments import setup_tokens
from experiments.scaling_law import report
from var_jax import cli, stages
from var_jax.errors import config_errors
from var_jax.training.checkpoint import CHECKPOINT_DIR, load_config
from var_jax.training.metrics import read_metrics
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import training_flops

FLAGS = flags.FLAGS
# The decay at step t is min(EMA_DECAY, (1 + t) / (10 + t)), which averages over about t / 9 steps.
EMA_DECAY = 0.99999
MIN_SIZES = 3  # the number of parameters of L = (a N)^b + c


def prepare_stage(config: ConfigDict, out: Path, crops: int) -> ConfigDict:
    """Return the next_scale stage of a config, with its tokenizer trained and its data encoded if necessary.

    Args:
      config: with a stage next_scale.
      out: directory of the tokenizer's run and of the tokens.
      crops: number of crops of each training image.

    Raises:
      ConfigError: if there is no such stage, neither a tokenizer nor a stage that trains one, or if several
        processes would have to encode.
    """
    with config_errors():
        stage = next_scale_stage(config)
    tokenizer_stage = {stage.task: stage for stage in stages.stages_of(config)}.get("tokenizer")
    if tokenizer_stage is not None and not stage.data.tokens:  # crop as in the tokenizer's training
        stage.data.update({name: tokenizer_stage.data[name] for name in ("resize", "flip", "shift")})
    setup_tokens.prepare_tokens(stage, tokenizer_stage, out, crops)
    return stage


def size_config(
    stage: ConfigDict, depth: int, width_per_depth: int, rate_by_width: bool, seed: int, evaluations: int
) -> ConfigDict:
    """Make the config of one run: the stage at another size, with frequent evaluations.

    Args:
      stage: next_scale, with its tokens.
      depth: number of blocks and of heads.
      width_per_depth: channels of a head; published: 64.
      rate_by_width: scale the config's learning rate by its own width / width.
      seed: of the run.
      evaluations: number of evaluations, at equal intervals.
    """
    steps = stages.num_steps(stage.train, stages.open_sources(stage)[0].num_images)
    width = width_per_depth * depth
    config_width = stage.model.width or 64 * stage.model.depth
    drop_path = stage.model.drop_path * depth / stage.model.depth  # as published: proportional to depth
    stage = stage.copy_and_resolve_references()
    stage.seed = seed
    stage.model.update(dict(depth=depth, width=width, num_heads=depth, drop_path=drop_path))
    if rate_by_width:
        stage.train.base_learning_rate *= config_width / width
    every = max(steps // evaluations, 1)
    stage.train.update(
        dict(steps=steps, lr_schedule="constant", ema_decay=EMA_DECAY, eval_every=every, preview_every=0)
    )
    return stage


def read_run(workdir: Path) -> dict:
    """Read size, compute and held-out curves of a finished run.

    Returns:
      depth, width, seed, N (parameters without embeddings and head), batch, flops_per_image (forward and
      backward); and lists over the evaluations: step, loss, loss_last, error and error_last.
    """
    record = load_config(workdir / "next_scale" / CHECKPOINT_DIR)[1]
    cfg = NextScaleConfig(**record["model"])
    lines = [
        line for line in read_metrics(workdir / "next_scale" / "metrics.jsonl") if line["kind"] == "eval"
    ]
    run = {
        "depth": cfg.depth,
        "width": cfg.width,
        "seed": record["stage"]["seed"],
        "N": count_block_parameters(cfg),
    }
    run |= {"batch": record["stage"]["train"]["batch"], "flops_per_image": training_flops(cfg)}
    run["step"] = [line["step"] for line in lines]
    for suffix in ("", "_last"):
        run[f"loss{suffix}"] = [line[f"loss{suffix}"] for line in lines]
        run[f"error{suffix}"] = [1 - line[f"accuracy{suffix}"] for line in lines]
    return run


def count_block_parameters(cfg: NextScaleConfig) -> int:
    """Count the parameters of the blocks with adaLN: 73728 d^3 at width 64 d; with shared adaLN 49152 d^3."""
    return (12 if cfg.shared_adaln else 18) * cfg.depth * cfg.width**2


def parse_depths(words: list[str]) -> list[int]:
    """Parse the depths of the flag --depths, and sort them.

    Raises:
      ValueError: if they are not positive integers, or too few for a fit.
    """
    flag = f"--depths={','.join(words)}"
    invalid = [word for word in words if not word.isdecimal() or int(word) < 1]
    if invalid:
        raise ValueError(f"{flag}: a depth must be a positive integer, got {invalid[0]}")
    depths = sorted({int(word) for word in words})
    if len(depths) < MIN_SIZES:
        raise ValueError(f"{flag}: too few sizes, a fit of (a N)^b + c needs {MIN_SIZES} or more")
    return depths


def main(_):
    try:
        depths, seeds = parse_depths(FLAGS.depths), sorted(set(cli.numbers("seeds", int)))
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    out = cli.local_folder("out")
    cli.initialize_distributed()
    sizes = [(depth, seed) for seed in seeds for depth in depths]
    workdirs = [out / "runs" / f"d{depth}" / str(seed) for depth, seed in sizes]
    with cli.abort_on_error():
        stage = prepare_stage(FLAGS.config, out, FLAGS.crops)
        for i, ((depth, seed), workdir) in enumerate(zip(sizes, workdirs, strict=True), 1):
            print(f"--- run {i} of {len(sizes)}: depth {depth}, seed {seed}", flush=True)
            settings = (FLAGS.width_per_depth, FLAGS.rate_by_width, seed, FLAGS.evaluations)
            stages.run(size_config(stage, depth, *settings), workdir)
    if jax.process_index() > 0:
        return
    runs = [read_run(workdir) for workdir in workdirs]
    result = report.fit_runs(runs)
    (out / "scaling_law.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "scaling_law.md").write_text(report.format_fits(result))
    report.plot_laws(result, out / "scaling_law.png")
    print((out / "scaling_law.md").read_text() + f"\nplot: {out / 'scaling_law.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", help_string="Config with a stage next_scale, e.g. configs/digits.py"
    )
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("depths", ["1", "2", "3", "4", "5", "6"], "Numbers of blocks and heads, one per size")
    flags.DEFINE_integer("width_per_depth", 8, "Channels of a head; published: 64", lower_bound=1)
    flags.DEFINE_bool(
        "rate_by_width", True, "Learning rate proportional to 1 / width; published: the same for all"
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds with which each size is trained")
    flags.DEFINE_integer(
        "evaluations", 40, "Evaluations of each run, at equal intervals", lower_bound=MIN_SIZES
    )
    flags.DEFINE_integer("crops", 16, "Crops of each image, if the data is encoded", lower_bound=1)
    cli.define_host_flags()
    flags.mark_flag_as_required("config")
    cli.run(main)
