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
        stage.data.update(dict(name="digits", dir="data", eval_split="test", resize=1.0, threads=2))
        stage.train.update(dict(batch=64, remat=False, keep=1))
    config.tokenizer.model.update(
        dict(
            scales=(1, 2, 3, 4), num_codes=64, code_dim=8, ch=32, ch_mult=(1, 2), num_blocks=1, norm_groups=8
        )
    )
    config.tokenizer.loss.update(dict(l2=1.0, l1=0.0, codebook=1.0))
    config.tokenizer.codebook.update(dict(hits_decay=0.95, restart_every=20, restart_until=0.7))
    config.tokenizer.train.update(
        dict(
            steps=1200,
            learning_rate=6e-3,
            b1=0.9,
            b2=0.99,
            clip=1.0,
            schedule="cos",
            end=0.02,
            ema=0.99,
            log_every=50,
            eval_every=200,
            preview_every=600,
            checkpoint_every=200,
        )
    )
    config.next_scale.model.update(
        dict(depth=4, width=128, num_heads=4, gamma_init=0.1, drop_path=0.0, dropout=0.1)
    )
    config.next_scale.train.update(
        dict(
            steps=1500,
            learning_rate=4e-3,
            schedule="cos",
            end=0.02,
            ema=0.995,
            log_every=50,
            eval_every=250,
            preview_every=750,
            checkpoint_every=250,
        )
    )
    config.next_scale.sampling.update(dict(guidance=0.5, top_k=0, top_p=0.0))
    return config
