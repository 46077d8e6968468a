"""Train the published VAR transformers on ImageNet, 256px (d12 d16 d20 d24 d30) and 512px (d36).

    python train.py --config=configs/var.py:d16 --workdir=runs/d16 --config.tokenizer=vae_ch160v4096z32.pth

`config.tokenizer` is a published file or the directory of a run; empty: the tokenizer of this run.  Published
for d16: FID 3.55 (released weights), 2.5 days on 16 A100s.  None has been run yet: they need ImageNet and
accelerators.
"""

from ml_collections import ConfigDict

from configs import schema
from var_jax.scales import SCALES_256, SCALES_512

# Published hyperparameters that depend on the depth.
RECIPES = {
    "d12": dict(epochs=200, batch=768, base_learning_rate=1e-4, gamma_init=1e-3, lr_end=0.1, decay_end=0.05),
    "d16": dict(epochs=200, batch=768, base_learning_rate=1e-4, gamma_init=1e-3, lr_end=0.1, decay_end=0.05),
    "d20": dict(epochs=250, batch=768, base_learning_rate=1e-4, gamma_init=1e-3, lr_end=0.1, decay_end=0.05),
    "d24": dict(epochs=350, batch=768, base_learning_rate=8e-5, gamma_init=1e-4, lr_end=0.01, decay_end=0.05),
    "d30": dict(
        epochs=350, batch=1024, base_learning_rate=8e-5, gamma_init=1e-5, lr_end=0.01, decay_end=0.08
    ),
    "d36": dict(epochs=350, batch=768, base_learning_rate=8e-5, gamma_init=5e-6, lr_end=0.01, decay_end=0.08),
}


def get_config(name: str = "d16") -> ConfigDict:
    if name not in RECIPES:
        raise ValueError(f"configs/var.py knows {', '.join(RECIPES)}; got {name!r}")
    config = schema.transformer_stage()
    set_recipe(config, name)
    config.scales = SCALES_512 if name == "d36" else SCALES_256
    return config


def set_recipe(config: ConfigDict, name: str) -> None:
    """Set architecture and optimizer of a published size; configs/next_token.py trains the same sizes."""
    recipe, depth = RECIPES[name], int(name[1:])

    # Model
    config.model.depth = depth
    config.model.width = 64 * depth
    config.model.num_heads = depth
    config.model.shared_adaln = name == "d36"
    config.model.gamma_init = recipe["gamma_init"]
    config.model.drop_path = 0.1 * depth / 24

    # Optimizer
    config.train.epochs = recipe["epochs"]
    config.train.batch = recipe["batch"]
    config.train.base_learning_rate = recipe["base_learning_rate"]
    config.train.lr_end_fraction = recipe["lr_end"]
    config.train.weight_decay_end = recipe["decay_end"]
