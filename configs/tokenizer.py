"""Train the published multi-scale tokenizer (V=4096, C=32, ch=160, 16x down) on ImageNet 256px.

    python train.py --config=configs/tokenizer.py --workdir=runs/tokenizer \\
        --config.perceptual_weights=vgg16.pth,vgg_lpips.pth
    python train.py --config=configs/tokenizer.py:small --workdir=runs/tokenizer   # a single GPU

The architecture is the released one; its training code was not released.  Choices made here:

- Losses, optimizer and data are those that the authors' single-scale trainer reports: L2 1, L1 0.2, LPIPS 1,
  codebook 1; hinge 0.4 times the adaptive ratio (at least 0.015) from 20% of the steps on, with a warm-up
  over 2%; AdamW 3e-4 at batch 768 for both, (0.5, 0.9), weight decay 0.005, cosine to 0.3, clip 10, EMA
  0.9999, 250 epochs, resize to 1.125, random crop.
- A PatchGAN with DiffAugment, which needs no file.  The authors and XQ-GAN (rFID 0.80 at V=4096) use
  `adversarial.network=dino`, which needs DINO's weights.
- Quantizer dropout 0.1, like XQ-GAN, so that coarse maps carry the image; theirs begins at the third map,
  ours at the first.
- k-means in the first steps, codes that follow the mean of their targets (0.99), and restarts of dead codes
  from the targets of all scales.  With the published uniform initialization and gradient alone, most codes
  die if the codebook is large for the data.  Measurements: experiments/codebook/README.md.
- Codes of 32 dimensions without L2 normalization, as released: published transformers and files stay
  compatible.

`small` has 64 channels in place of 160, batch 128 and 40 epochs.

The baselines of VAR use maps of one size, without phi, which smooths upsampled maps:

- `single`: one 16x16 map, an ordinary VQ-VAE (van den Oord et al. 2017); no quantizer dropout.
- `residual`: four 16x16 maps, each of the residual of those before it (Lee et al. 2022, RQ-VAE).
- `patches`: no networks; the features are patches of 16 pixels.  It has as many tokens and codes as `single`,
  and so shows the effect of the networks.  The codes follow means, so learning rate and moving average have
  no effect.  Two maps: `--config.model.scales="(16,16)"`; smaller patches:
  `--config.model.patch=8 --config.model.scales="(32,)"`.

None of these has been run: they need ImageNet and accelerators.
"""

from ml_collections import ConfigDict

from configs import schema

VARIANTS = ("published", "small", "single", "residual", "patches")


def get_config(variant: str = "published") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/tokenizer.py knows {', '.join(VARIANTS)}; got {variant!r}")
    config = schema.tokenizer_stage()

    # Model
    config.model.scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    config.model.num_codes = 4096
    config.model.code_dim = 32
    config.model.ch = 160
    config.model.ch_mult = (1, 1, 2, 2, 4)
    config.model.num_blocks = 2
    config.model.num_phis = 4
    config.model.quantizer_dropout = 0.1

    # Losses
    config.loss.l2 = 1.0
    config.loss.l1 = 0.2
    config.loss.perceptual = 1.0
    config.loss.codebook = 1.0
    config.adversarial.weight = 0.4
    config.adversarial.start_fraction = 0.2

    # Optimizer
    config.train.batch = 768
    config.train.epochs = 250
    config.train.base_learning_rate = 1e-4  # 3e-4 at batch 768
    config.train.b1 = 0.5
    config.train.b2 = 0.9
    config.train.grad_clip_norm = 10.0
    config.train.weight_decay = 0.005
    config.train.weight_decay_end = 0.005
    config.train.lr_schedule = "cos"
    config.train.lr_end_fraction = 0.3
    config.train.ema_decay = 0.9999

    if variant == "small":
        config.model.ch = 64
        config.train.batch = 128
        config.train.epochs = 40
        config.train.ema_decay = 0.999
    if variant == "residual":
        config.model.scales = (16,) * 4
        config.model.num_phis = 0
    if variant in ("single", "patches"):
        config.model.scales = (16,)
        config.model.num_phis = 0
        config.model.quantizer_dropout = 0.0
    if variant == "patches":
        config.model.patch = 16
        config.loss.l1 = 0.0
        config.loss.perceptual = 0.0
        config.loss.codebook = 0.0  # without networks, l2 is the codebook loss
        config.adversarial.weight = 0.0
        config.train.epochs = 2
        config.train.ema_decay = 0.0
        config.train.eval_every = 1000
        config.train.preview_every = 1000
        config.train.checkpoint_every = 1000
    return config
