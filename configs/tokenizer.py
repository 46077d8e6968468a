"""The published multi-scale tokenizer (V=4096, C=32, ch=160, 16x down) on ImageNet 256px.

    python train.py --config=configs/tokenizer.py --workdir=runs/tokenizer \\
        --config.perceptual_weights=vgg16.pth,vgg_lpips.pth
    python train.py --config=configs/tokenizer.py:small --workdir=runs/tokenizer   # a single GPU

The architecture is the released one; its training code never was.  What is chosen here, and why:

- L2 1, L1 0.2, LPIPS 1, codebook 1; hinge 0.4 times the adaptive ratio (at least 0.015) from 20% of the steps
  on, its weight rising over 2%; AdamW 3e-4 at batch 768 for both, (0.5, 0.9), weight decay 0.005, cosine to
  0.3, clip 10, EMA 0.9999, 250 epochs, resize to 1.125, crop: as the authors' single-scale trainer reports.
- A PatchGAN with DiffAugment, since it needs no file; with DINO's weights at hand, `adversarial.network=dino`
  is what the authors and XQ-GAN use (rFID 0.80 at V=4096).
- Quantizer dropout 0.1, as XQ-GAN, so that coarse maps carry the image; theirs begins at the third map, ours
  at the first.
- k-means in the first steps, codes that follow the mean of their targets (0.99), and restart of dead codes
  from the targets of all scales, instead of the published uniform start and gradient alone, with which most
  codes die where the codebook is large for the data.  Measured: experiments/codebook/README.md.
- Codes of 32 dimensions, as released, not L2-normalised: published transformers and files stay compatible.

`small` has 64 channels in place of 160, batch 128 and 40 epochs.

What VAR is measured against stands on maps of one size, without phi, which smooths what was enlarged:

- `single`: one 16x16 map, an ordinary VQ-VAE (van den Oord et al. 2017); no quantizer dropout.
- `residual`: four 16x16 maps, each of what those before it left (Lee et al. 2022, RQ-VAE).
- `patches`: no networks.  Patches of 16 pixels are the features as they are: as many tokens and codes as in
  `single`, so that it shows what the networks are worth.  The codes follow means, so that learning rate and
  moving average mean nothing.  Two maps: `--config.model.scales="(16,16)"`; smaller patches:
  `--config.model.patch=8 --config.model.scales="(32,)"`.

None has been run at this size: they need ImageNet and accelerators.
"""

from ml_collections import ConfigDict

from configs import common

SIZES = ("published", "small", "single", "residual", "patches")


def get_config(size: str = "published") -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f"configs/tokenizer.py knows {', '.join(SIZES)}; got {size!r}")
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
        quantizer_dropout=0.1,
        gradient="straight_through",  # or "rotation"
        patch=0,  # side in pixels of patches that are the features as they are; 0: the networks
    )
    config.loss = dict(l2=1.0, l1=0.2, perceptual=1.0, codebook=1.0, entropy=0.0)
    config.train.remat = True  # keep little for the backward pass, and work the rest out again
    # Files of VGG-16 (torchvision's) and LPIPS's channel weights, comma between; empty: no perceptual loss.
    config.perceptual_weights = ""
    config.init_from = ""  # published file or run directory to fine-tune; empty: from scratch
    config.codebook = dict(
        kmeans_steps=10,  # first steps in which the codebook is fitted to the batch; not after init_from
        ema=0.99,  # decay of the mean of its targets that a code follows; 0: follows its gradient
        entropy_temperature=0.01,  # of loss.entropy, in units of squared distance
        hits_decay=0.99,  # of the moving average of code uses
        dead_below=0.03,  # of an even share of the uses
        restart_every=100,  # steps; 0 for never
        restart_until=0.8,  # share of all steps
        window=10_000,  # images that the use of codes in the log is over, at most (but two batches)
    )
    config.adversarial = dict(
        weight=0.4,  # 0: no discriminator
        adaptive=True,  # times the ratio of gradients at the last layer
        min_ratio=0.015,
        start=0.2,  # share of all steps before it
        warmup=0.02,  # share of all steps over which its weight rises
        network="patch",  # PatchGAN; or "dino": heads on features of a frozen ViT-S
        dino_weights="",  # its file
        channels=64,
        layers=3,
        augment=True,  # images before the discriminator sees them (DiffAugment)
        r1=0.0,
        lecam=0.0,
        train=dict(learning_rate=1e-4, b1=0.5, b2=0.9, clip=10.0, weight_decay=0.005, weight_decay_end=0.005),
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
    if size == "small":
        config.model.ch = 64
        config.train.update(dict(batch=128, epochs=40, ema=0.999))
    if size == "residual":
        config.model.update(dict(scales=(16,) * 4, num_phis=0))
    if size in ("single", "patches"):
        config.model.update(dict(scales=(16,), num_phis=0, quantizer_dropout=0.0))
    if size == "patches":
        config.model.patch = 16
        config.loss.update(dict(l1=0.0, perceptual=0.0, codebook=0.0))  # l2 says it all
        config.adversarial.weight = 0.0
        config.train.update(
            dict(epochs=2, ema=0.0, eval_every=1000, preview_every=1000, checkpoint_every=1000)
        )
    return config
