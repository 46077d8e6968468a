"""Train tokenizer and VAR on small images of your own, here 64 pixels; guide: docs/your_own_images.md.

    python -m examples.coloured_shapes pictures --images=4000
    python -m var_jax.tools.prepare --images=pictures --name=shapes --data_dir=data --skip_bad
    python train.py --config=configs/shapes.py --workdir=runs/shapes

Takes 34 minutes for the tokenizer and 39 for the transformer on two CPU cores.  On an accelerator, increase
channels, blocks and steps first.  `configs/shapes.py:small` is for a first try: 32 pixels, 200 steps each.
"""

from ml_collections import ConfigDict

from configs import schema


def get_config(name: str = "") -> ConfigDict:
    if name not in ("", "small"):
        raise ValueError(f"configs/shapes.py knows small; got {name!r}")
    config = ConfigDict(dict(stages=("tokenizer", "next_scale")))
    config.tokenizer = tokenizer()
    config.next_scale = next_scale()
    if name == "small":
        set_small(config)
    return config


def set_small(config: ConfigDict) -> None:
    """Set the sizes and intervals of a first try."""
    config.tokenizer.model.update(dict(scales=(1, 2, 4, 8), num_codes=256, ch=8, ch_mult=(1, 2, 4)))
    config.tokenizer.model.norm_groups = 2  # with a group for each channel, normalization would remove colors
    config.next_scale.model.update(dict(depth=3, width=128, num_heads=4))
    for stage in (config.tokenizer, config.next_scale):
        intervals = dict(log_every=10, eval_every=100, preview_every=100, checkpoint_every=100)
        stage.train.update(dict(steps=200, **intervals))


def tokenizer() -> ConfigDict:
    stage = schema.tokenizer_stage()

    # Data
    stage.data.name = "shapes"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.flip = True
    stage.data.threads = 2

    # Model
    stage.model.scales = (1, 2, 3, 4, 6, 8)
    stage.model.num_codes = 512
    stage.model.code_dim = 16
    stage.model.ch = 16
    stage.model.ch_mult = (1, 2, 4, 4)
    stage.model.num_blocks = 1
    stage.model.norm_groups = 8
    stage.model.quantizer_dropout = 0.1

    # Losses
    stage.loss.l2 = 1.0
    stage.loss.l1 = 0.2
    stage.loss.perceptual = 0.0
    stage.loss.codebook = 1.0
    stage.adversarial.weight = 0.0

    # Codebook
    stage.codebook.kmeans_steps = 10
    stage.codebook.ema_decay = 0.99
    stage.codebook.hits_decay = 0.95
    stage.codebook.restart_every = 20
    stage.codebook.restart_until_fraction = 0.7

    # Optimizer
    stage.train.batch = 32
    stage.train.steps = 1000
    stage.train.epochs = 250
    stage.train.base_learning_rate = 1e-2  # 1.25e-3 at batch 32
    stage.train.b1 = 0.9
    stage.train.b2 = 0.99
    stage.train.grad_clip_norm = 1.0
    stage.train.weight_decay = 0.005
    stage.train.weight_decay_end = 0.005
    stage.train.lr_schedule = "cos"
    stage.train.lr_end_fraction = 0.02
    stage.train.ema_decay = 0.99
    stage.train.remat = False

    # Intervals
    stage.train.log_every = 50
    stage.train.eval_every = 400
    stage.train.preview_every = 400
    stage.train.checkpoint_every = 200
    stage.train.max_to_keep = 1
    return stage


def next_scale() -> ConfigDict:
    stage = schema.transformer_stage()

    # Data
    stage.data.name = "shapes"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.flip = True
    stage.data.threads = 2

    # Model
    stage.model.depth = 5
    stage.model.width = 160
    stage.model.num_heads = 5
    stage.model.gamma_init = 0.1
    stage.model.drop_path = 0.05

    # Optimizer
    stage.train.batch = 32
    stage.train.steps = 1200
    stage.train.base_learning_rate = 8e-3  # 1e-3 at batch 32
    stage.train.lr_schedule = "cos"
    stage.train.lr_end_fraction = 0.02
    stage.train.ema_decay = 0.99

    # Sampling
    stage.sampling.guidance = 1.5
    stage.sampling.top_k = 0
    stage.sampling.top_p = 0.96

    # Intervals
    stage.train.log_every = 50
    stage.train.eval_every = 400
    stage.train.preview_every = 400
    stage.train.checkpoint_every = 200
    stage.train.max_to_keep = 1
    return stage
