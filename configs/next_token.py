"""What VAR is measured against: a next-token transformer on a single-scale VQ-VAE, ImageNet 256px.

    python train.py --config=configs/tokenizer.py:single --workdir=runs/single
    python train.py --config=configs/next_token.py:d16 --workdir=runs/raster --config.tokenizer=runs/single
    python train.py --config=configs/next_token.py:digits --workdir=runs/raster_digits   # on a laptop

Depth, width, optimiser and schedule are those of configs/var.py, so that the prediction scheme is all that
differs.  A way through the map is `--config.model.order=spiral_in`, positions are
`--config.model.positions=rotary_2d`, masks `--config.model.mask=axial` (var_jax/transformer/positions.py,
var_jax/transformer/positions.py; with digits: `--config.next_token.model.order=...`).

`d12` to `d30` have not been run at this size: they need ImageNet and accelerators.
"""

from ml_collections import ConfigDict

from configs import digits, var

SEQUENCE = dict(order="raster", order_seed=0, mask="causal", reach=1)


def get_config(name: str = "d16") -> ConfigDict:
    known = [*(name for name in var.RECIPES if name != "d36"), "digits"]
    if name not in known:
        raise ValueError(f"configs/next_token.py knows {', '.join(known)}; got {name!r}")
    if name == "digits":
        return flattened(digits.get_config())
    config = var.get_config(name)
    config.task = "next_token"
    config.scales = (16,)
    config.model.update(SEQUENCE)
    return config


def flattened(config: ConfigDict) -> ConfigDict:
    """What stands against a config of tokenizer and next_scale: one map, the finest, token by token."""
    tokenizer, stage = (ConfigDict(config[name].to_dict()) for name in ("tokenizer", "next_scale"))
    # One map: no quantizer dropout, no phi.
    scales = tuple(tokenizer.model.scales)[-1:]
    tokenizer.model.update(dict(scales=scales, num_phis=0, quantizer_dropout=0.0))
    stage.task, stage.tokenizer, stage.scales, stage.data.tokens = "next_token", "", (), ""  # its own
    stage.model.update(SEQUENCE)
    return ConfigDict(dict(stages=("tokenizer", "next_token"), tokenizer=tokenizer, next_token=stage))
