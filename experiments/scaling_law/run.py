"""Scaling laws: how held-out loss and token error fall with parameters and compute.

    python -m experiments.scaling_law.run --config=configs/digits.py --out=runs/scaling_law
    python -m experiments.scaling_law.run --config=configs/var.py:d16 --config.tokenizer=runs/tokenizer \\
        --config.data.dir=DATA --config.data.tokens=TOKENS --depths=6,8,10,12,14,16,18,20,24,30 \\
        --width_per_depth=64 --norate_by_width --out=DIR     # ImageNet on a pod; not yet run

Trains the stage next_scale of a config at several depths, the width in proportion (the published rule is 64
a block, one head a block), all on one tokenizer, for the same number of steps and batch.  The learning rate
goes with 1 / width (Yang et al. 2022, table 3), unless --norate_by_width says that it is the same for all, as
published.  It is constant after its warm-up, and evaluated is a moving average over about the last ninth of
the steps so far: so every evaluation, not only the last, is a fair point of loss against compute, and one run
gives them all.  What the config says of schedule and moving average is replaced by that.

Tokenizer and tokens are those that the config names (`tokenizer`, `data.tokens`); else the config's own
tokenizer stage is trained first, and the data encoded once in `--crops` random crops, as that stage cuts
them out.  Every run is a run of the training loop, under OUT/runs/DEPTH/SEED, so that a call that was stopped
goes on.  Writes `scaling_law.md` (tables), `scaling_law.json` and `scaling_law.png` under OUT.
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
# min(EMA, (1 + t) / (10 + t)) at step t (training/optimizer.py): over a ninth of any t that matters.
EMA_DECAY = 0.99999
MIN_SIZES = 3  # sizes: L = (a N)^b + c has three parameters


def prepare_stage(config: ConfigDict, out: Path, crops: int) -> ConfigDict:
    """The stage next_scale, with its tokenizer trained and its data encoded; what is there is taken as it is.

    Raises:
      ConfigError: where there is no such stage, neither a tokenizer nor a stage that trains one, or several
        processes would have to encode.
    """
    with config_errors():
        stage = next_scale_stage(config)
    trains = {result.task: result for result in stages.stages_of(config)}.get("tokenizer")
    if trains is not None and not stage.data.tokens:  # cut out as for the tokenizer
        stage.data.update({name: trains.data[name] for name in ("resize", "flip", "shift")})
    setup_tokens.prepare_tokens(stage, trains, out, crops)
    return stage


def size_config(
    stage: ConfigDict, depth: int, width_per_depth: int, rate_by_width: bool, seed: int, evaluations: int
) -> ConfigDict:
    """Config of one run: the stage at another size, with a rhythm that gives a curve.

    Args:
      stage: next_scale, with its tokens.
      depth: blocks and heads.
      width_per_depth: channels a head; 64 as published.
      rate_by_width: whether the learning rate, the config's at its own width, goes with 1 / width.
      seed: of parameters, order and drops.
      evaluations: at equal distances.
    """
    steps = stages.num_steps(stage.train, stages.open_sources(stage)[0].num_images)
    width, own = width_per_depth * depth, stage.model.width or 64 * stage.model.depth
    drop_path = stage.model.drop_path * depth / stage.model.depth  # as published: in proportion
    stage = stage.copy_and_resolve_references()
    stage.seed = seed
    stage.model.update(dict(depth=depth, width=width, num_heads=depth, drop_path=drop_path))
    if rate_by_width:
        stage.train.base_learning_rate *= own / width
    every = max(steps // evaluations, 1)
    stage.train.update(
        dict(steps=steps, lr_schedule="constant", ema_decay=EMA_DECAY, eval_every=every, preview_every=0)
    )
    return stage


def read_run(workdir: Path) -> dict:
    """What a finished run was and logged: sizes, compute, and its held-out curve.

    Returns:
      depth, width, seed, N (parameters but for embeddings and head), batch, flops_per_image (forward and
      backward); `step`, `loss`, `loss_last`, `error` and `error_last`, lists over the evaluations.
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
    for which in ("", "_last"):
        run[f"loss{which}"] = [line[f"loss{which}"] for line in lines]
        run[f"error{which}"] = [1 - line[f"accuracy{which}"] for line in lines]
    return run


def count_block_parameters(cfg: NextScaleConfig) -> int:
    """Of the blocks with adaLN, as published: 73728 d^3 at width 64 d, and 49152 d^3 with shared adaLN."""
    return (12 if cfg.shared_adaln else 18) * cfg.depth * cfg.width**2


def parse_depths(words: list[str]) -> list[int]:
    """The depths of the flag --depths, ascending.

    Raises:
      ValueError: where they are not whole numbers from 1, or too few for a fit.
    """
    given = f"--depths={','.join(words)}"
    wrong = [word for word in words if not word.isdecimal() or int(word) < 1]
    if wrong:
        raise ValueError(f"{given}: a depth is a whole number from 1, got {wrong[0]}")
    depths = sorted({int(word) for word in words})
    if len(depths) < MIN_SIZES:
        raise ValueError(f"{given}: too few sizes, a fit of (a N)^b + c needs {MIN_SIZES} or more")
    return depths


def main(_):
    try:
        depths, seeds = parse_depths(FLAGS.depths), sorted(set(cli.numbers("seeds", int)))
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    out = cli.local_folder("out")
    cli.join_hosts()
    asked = [(depth, seed) for seed in seeds for depth in depths]
    workdirs = [out / "runs" / f"d{depth}" / str(seed) for depth, seed in asked]
    with cli.failing_at_once():
        stage = prepare_stage(FLAGS.config, out, FLAGS.crops)
        for i, ((depth, seed), workdir) in enumerate(zip(asked, workdirs, strict=True), 1):
            print(f"--- run {i} of {len(asked)}: depth {depth}, seed {seed}", flush=True)
            how = (FLAGS.width_per_depth, FLAGS.rate_by_width, seed, FLAGS.evaluations)
            stages.run(size_config(stage, depth, *how), workdir)
    if jax.process_index() > 0:
        return
    runs = [read_run(workdir) for workdir in workdirs]
    result = report.fit_runs(runs)
    (out / "scaling_law.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "scaling_law.md").write_text(report.format_fits(result))
    report.plot_laws(result, out / "scaling_law.png")
    print((out / "scaling_law.md").read_text() + f"\npicture: {out / 'scaling_law.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="With a stage next_scale, e.g. configs/digits.py")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("depths", ["1", "2", "3", "4", "5", "6"], "Blocks and heads, of each size")
    flags.DEFINE_integer(
        "width_per_depth", 8, "Width over depth, which is a head's; published 64", lower_bound=1
    )
    flags.DEFINE_bool("rate_by_width", True, "Learning rate in proportion to 1 / width; published: not")
    flags.DEFINE_list("seeds", ["0"], "Each size is trained with each")
    flags.DEFINE_integer("evaluations", 40, "Of each run, at equal distances", lower_bound=MIN_SIZES)
    flags.DEFINE_integer("crops", 16, "Of each image, where the data is encoded here", lower_bound=1)
    cli.define_host_flags()
    flags.mark_flag_as_required("config")
    cli.run(main)
