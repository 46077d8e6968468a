"""The embedded default: tokenizer and VAR on handwritten digits, on a laptop's CPU.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs import tokenizer, var


def get_config() -> ConfigDict:
    config = ConfigDict(
        dict(
            stages=("tokenizer", "next_scale"),
            tokenizer=tokenizer.get_config(),
            next_scale=var.get_config("d16"),
        )
    )
    for stage in (config.tokenizer, config.next_scale):
        stage.seed = 1
        stage.data.update(dict(name="digits", dir="data", eval_split="test", resize=1.0, threads=2))
        stage.train.update(dict(keep=1, log_every=50, eval_every=350))
        stage.train.update(dict(preview_every=700, checkpoint_every=350))
    # Two 1x1 maps and quantizer dropout: the first tokens then say which digit it is and how it is written,
    # so that the tokens of a larger map, drawn independently of each other, agree.
    config.tokenizer.model.update(
        dict(scales=(1, 1, 2, 3, 4), num_codes=128, code_dim=16, ch=32, ch_mult=(1, 2), num_blocks=1)
    )
    config.tokenizer.model.update(dict(norm_groups=8, quantizer_dropout=0.2))
    config.tokenizer.loss.update(dict(l2=1.0, l1=0.0, perceptual=0.0, codebook=1.0))
    config.tokenizer.adversarial.weight = 0.0
    config.tokenizer.train.remat = False
    config.tokenizer.codebook.update(dict(hits_decay=0.95, restart_every=20, restart_until=0.7))
    config.tokenizer.codebook.update(dict(kmeans_steps=0, ema=0.0))
    config.tokenizer.train.update(dict(steps=1700, batch=64, learning_rate=6e-3, b1=0.9, b2=0.99, clip=1.0))
    config.tokenizer.train.update(dict(schedule="cos", end=0.02, ema=0.99))
    # 1442 images are few: moved by a pixel, and with decay, held-out digits come out as well as seen ones.
    config.tokenizer.train.update(dict(weight_decay=0.5, weight_decay_end=0.5))
    config.tokenizer.data.shift = 1
    config.next_scale.model.update(dict(depth=4, width=128, num_heads=4, gamma_init=0.1, drop_path=0.0))
    config.next_scale.train.update(dict(steps=1150, batch=32, learning_rate=1.6e-2))
    config.next_scale.train.update(dict(schedule="cos", end=0.02, ema=0.995))
    config.next_scale.sampling.update(dict(guidance=0.0, top_k=0, top_p=0.0))
    config.next_scale.scales = ()  # those of its own tokenizer
    return config
