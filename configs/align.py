"""Fine-tune a VAR transformer so that it samples without guidance as well as with it, at half the cost.

    python train.py --config=configs/align.py:d16 --workdir=runs/aligned --config.init_from=var_d16.pth \\
        --config.tokenizer=vae_ch160v4096z32.pth
    python train.py --config=configs/align.py:digits --workdir=runs/aligned --config.init_from=runs/digits \\
        --config.tokenizer=runs/digits   # on a laptop
    python sample.py --workdir=runs/aligned

`config.init_from` is what is fine-tuned, and the frozen reference; the argument selects its architecture.
The result is a run of next_scale.  Negatives are the images with other labels (condition contrastive
alignment, Chen et al. 2024); with `--config.align.method=ddo` they are samples of `init_from`
(docs/training.md).

Published for d16 without guidance: FID 4.03 (3.02 for d20, 2.63 for d24, 2.54 for d30).  These have not been
run: they need ImageNet and accelerators.  Digits, measured: experiments/alignment/README.md.
"""

from ml_collections import ConfigDict

from configs import digits, schema, var
from var_jax.scales import SCALES_256

NEGATIVE_WEIGHTS = {"d16": 50.0, "d20": 50.0, "d24": 100.0, "d30": 1000.0}  # published


def get_config(name: str = "d16") -> ConfigDict:
    if name not in (*NEGATIVE_WEIGHTS, "digits"):
        raise ValueError(f"configs/align.py knows {', '.join(NEGATIVE_WEIGHTS)}, digits; got {name!r}")
    if name == "digits":
        return small_data(digits.next_scale())
    stage = schema.align_stage()
    var.set_recipe(stage, name)
    stage.scales = SCALES_256
    stage.model.drop_path = 0.0
    stage.align.negative_weight = NEGATIVE_WEIGHTS[name]

    # Optimizer: as published; the rest is that of configs/var.py
    stage.train.batch = 256
    stage.train.epochs = 1
    stage.train.base_learning_rate = 2e-5
    return stage


def small_data(base: ConfigDict) -> ConfigDict:
    """Return the alignment of a small transformer trained by the stage `base`: two epochs of the digits."""
    stage = schema.align_stage()
    for section in ("data", "model", "train", "sampling"):
        stage[section].update(base[section])
    stage.update(dict(seed=base.seed, tokenizer=base.tokenizer, scales=base.scales))
    stage.model.drop_path = 0.0

    # Alignment
    stage.align.beta = 0.1
    stage.align.negative_weight = 1.0

    # Optimizer
    stage.train.batch = 32
    stage.train.steps = 90
    stage.train.base_learning_rate = 1.6e-3  # 2e-4 at batch 32
    stage.train.ema_decay = 0.0

    # Intervals
    stage.train.log_every = 15
    stage.train.eval_every = 45
    stage.train.preview_every = 90
    stage.train.checkpoint_every = 90
    return stage
