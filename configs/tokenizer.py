"""The published multi-scale tokenizer (V=4096, C=32, ch=160, 16x down) on ImageNet 256px.

    python train.py --config=configs/tokenizer.py --workdir=runs/tokenizer

Architecture as released; the recipe is what the authors' single-scale trainer reports (PUBLISHED
figures: AdamW 3e-4, (0.5, 0.9), weight decay 0.005, batch 768, 250 epochs, EMA 0.9999), less its
adversarial term.  Not yet run at this size: needs ImageNet and accelerators.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = ConfigDict(
        dict(task="tokenizer", seed=0, data=common.data("imagenet2012"), train=common.train())
    )
    config.data.eval_split = "validation"
    config.model = dict(
        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_codes=4096,
        code_dim=32,
        ch=160,
        ch_mult=(1, 1, 2, 2, 4),
        num_blocks=2,
        num_phis=4,
        l2_normalized=False,
        norm_groups=32,
        dropout=0.0,
        quantizer_dropout=0.0,
    )
    config.loss = dict(l2=1.0, l1=0.2, perceptual=1.0, codebook=1.0)
    # Files of VGG-16 (torchvision's) and LPIPS's channel weights, comma between; empty: no perceptual loss.
    config.perceptual_weights = ""
    config.init_from = ""  # published file or run directory to fine-tune; empty: from scratch
    config.codebook = dict(
        hits_decay=0.99,  # of the moving average of code uses
        dead_below=0.03,  # of an even share of the uses
        restart_every=100,  # steps; 0 for never
        restart_until=0.8,  # share of all steps
    )
    config.train.update(
        dict(
            epochs=250,
            learning_rate=1e-4,  # 3e-4 at batch 768
            b1=0.5,
            b2=0.9,
            clip=10.0,
            weight_decay=0.005,
            weight_decay_end=0.005,
            schedule="cos",
            end=0.3,
            ema=0.9999,
        )
    )
    return config
