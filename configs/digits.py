"""Train tokenizer and VAR on the embedded handwritten digits, on a laptop's CPU.

    python train.py --config=configs/digits.py --workdir=runs/digits

Takes five to eight minutes on two CPU cores.  Expected metrics and samples: docs/demo.md.
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
    stage.seed = 1

    # Data: there are only 1442 images. With shifts by a pixel and weight decay, held-out digits are
    # reconstructed as well as training digits.
    stage.data.name = "digits"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.resize = 1.0
    stage.data.shift = 1
    stage.data.threads = 2

    # Model: with two 1x1 maps and quantizer dropout, the first tokens encode which digit it is and its style,
    # so that the tokens of a larger map, which are sampled independently, are consistent.
    stage.model.scales = (1, 1, 2, 3, 4)
    stage.model.num_codes = 128
    stage.model.code_dim = 16
    stage.model.ch = 32
    stage.model.ch_mult = (1, 2)
    stage.model.num_blocks = 1
    stage.model.norm_groups = 8
    stage.model.quantizer_dropout = 0.2

    # Losses
    stage.loss.l2 = 1.0
    stage.loss.l1 = 0.0
    stage.loss.perceptual = 0.0
    stage.loss.codebook = 1.0
    stage.adversarial.weight = 0.0

    # Codebook
    stage.codebook.kmeans_steps = 0
    stage.codebook.ema_decay = 0.0
    stage.codebook.hits_decay = 0.95
    stage.codebook.restart_every = 20
    stage.codebook.restart_until_fraction = 0.7

    # Optimizer
    stage.train.batch = 64
    stage.train.steps = 1700
    stage.train.epochs = 250
    stage.train.base_learning_rate = 6e-3  # 1.5e-3 at batch 64
    stage.train.b1 = 0.9
    stage.train.b2 = 0.99
    stage.train.grad_clip_norm = 1.0
    stage.train.weight_decay = 0.5
    stage.train.weight_decay_end = 0.5
    stage.train.lr_schedule = "cos"
    stage.train.lr_end_fraction = 0.02
    stage.train.ema_decay = 0.99
    stage.train.remat = False

    # Intervals
    stage.train.log_every = 50
    stage.train.eval_every = 350
    stage.train.preview_every = 700
    stage.train.checkpoint_every = 350
    stage.train.max_to_keep = 1
    return stage


def next_scale() -> ConfigDict:
    stage = schema.transformer_stage()
    stage.seed = 1

    # Data
    stage.data.name = "digits"
    stage.data.dir = "data"
    stage.data.eval_split = "test"
    stage.data.resize = 1.0
    stage.data.threads = 2

    # Model
    stage.model.depth = 4
    stage.model.width = 128
    stage.model.num_heads = 4
    stage.model.gamma_init = 0.1
    stage.model.drop_path = 0.0

    # Optimizer
    stage.train.batch = 32
    stage.train.steps = 1150
    stage.train.base_learning_rate = 1.6e-2  # 2e-3 at batch 32
    stage.train.lr_schedule = "cos"
    stage.train.lr_end_fraction = 0.02
    stage.train.ema_decay = 0.995

    # Sampling
    stage.sampling.guidance = 0.0
    stage.sampling.top_k = 0
    stage.sampling.top_p = 0.0
    stage.sampling.temperature = 1.1  # the transformer overfits: samples are too near to the training images

    # Intervals
    stage.train.log_every = 50
    stage.train.eval_every = 350
    stage.train.preview_every = 700
    stage.train.checkpoint_every = 350
    stage.train.max_to_keep = 1
    return stage
