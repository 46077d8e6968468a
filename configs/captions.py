"""Train tokenizer and VAR on images of 32 pixels with captions; guide: docs/your_own_images.md.

    python -m examples.captioned_shapes captioned --images=10000
    python -m var_jax.tools.prepare --images=captioned --captions=captioned/captions.jsonl --name=captioned \\
        --data_dir=data
    python train.py --config=configs/captions.py --workdir=runs/captions
    python sample.py --workdir=runs/captions --prompts="a red star on blue"

Takes 40 minutes for the tokenizer and 56 for the transformer on two CPU cores that other work shared.  The
result is in the package: var_jax.load_var("shapes").  What it draws: experiments/captions.
"""

from ml_collections import ConfigDict

from configs import schema


def get_config() -> ConfigDict:
    config = ConfigDict(dict(stages=("tokenizer", "next_scale")))
    config.tokenizer = tokenizer()
    config.next_scale = next_scale()
    return config


def tokenizer() -> ConfigDict:
    stage = schema.tokenizer_stage()

    # Data
    stage.data.name = "captioned"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.resize = 1.0  # a crop would cut off shapes at the border
    stage.data.flip = True
    stage.data.threads = 2

    # Model
    stage.model.scales = (1, 1, 2, 3, 4, 6, 8)
    stage.model.num_codes = 256
    stage.model.code_dim = 16
    stage.model.ch = 16
    stage.model.ch_mult = (1, 2, 2)
    stage.model.num_blocks = 1
    stage.model.norm_groups = 8
    stage.model.quantizer_dropout = 0.2

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
    stage.train.steps = 2000
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
    stage.data.name = "captioned"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.resize = 1.0  # a crop would cut off shapes at the border
    stage.data.flip = True
    stage.data.threads = 2

    # Model
    stage.model.condition = "caption"
    stage.model.depth = 4
    stage.model.width = 128
    stage.model.num_heads = 4
    stage.model.gamma_init = 0.1
    stage.model.drop_path = 0.05

    # Optimizer
    stage.train.batch = 32
    stage.train.steps = 3500
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
    stage.train.eval_every = 1000
    stage.train.preview_every = 1000
    stage.train.checkpoint_every = 200
    stage.train.max_to_keep = 1
    return stage
