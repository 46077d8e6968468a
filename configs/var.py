"""The published VAR transformers on ImageNet, 256px (d12 d16 d20 d24 d30) and 512px (d36).

    python train.py --config=configs/var.py:d16 --workdir=runs/d16 --config.tokenizer=vae_ch160v4096z32.pth

The tokenizer is a published file or the directory of a run; empty: this run's own.  Published for
d16: FID 3.55 (released weights), 2.5 days on 16 A100s.  Not yet run at this size: needs ImageNet and
accelerators.
"""

from ml_collections import ConfigDict

from configs import common
from var_jax.scales import SCALES_256, SCALES_512

# Depth -> epochs, batch, learning rate at 256 images, gamma at the start, end of schedule, end of decay.
RECIPES = {
    "d12": (200, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d16": (200, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d20": (250, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d24": (350, 768, 8e-5, 1e-4, 0.01, 0.05),
    "d30": (350, 1024, 8e-5, 1e-5, 0.01, 0.08),
    "d36": (350, 768, 8e-5, 5e-6, 0.01, 0.08),
}


def get_config(name: str = "d16") -> ConfigDict:
    if name not in RECIPES:
        raise ValueError(f"configs/var.py knows {', '.join(RECIPES)}; got {name!r}")
    epochs, batch, learning_rate, gamma_init, end, weight_decay_end = RECIPES[name]
    depth, large = int(name[1:]), name == "d36"
    config = ConfigDict(
        dict(task="next_scale", seed=0, data=common.data("imagenet2012"), train=common.train())
    )
    config.transformer = common.transformer()
    config.data.eval_split = "validation"
    config.tokenizer = ""  # published file or run directory; empty: this run's own
    config.init_from = ""  # published file or run directory to fine-tune; empty: from scratch
    config.scales = SCALES_512 if large else SCALES_256  # of the tokenizer; () for whatever it has
    config.model = dict(
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        shared_adaln=large,
        normalized_attention=True,
        positions="learned_1d",  # see var_jax/transformer/positions.py
        gamma_init=gamma_init,
        label_drop=0.1,
        drop_path=0.1 * depth / 24,
        dropout=0.0,
    )
    config.train.update(
        dict(
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            end=end,
            weight_decay_end=weight_decay_end,
        )
    )
    config.sampling = dict(guidance=1.5, top_k=900, top_p=0.96, smooth=False)  # of the previews
    return config
