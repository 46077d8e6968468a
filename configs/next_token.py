"""Train the baseline of VAR: a next-token transformer on a single-scale VQ-VAE, ImageNet 256px.

    python train.py --config=configs/tokenizer.py:single --workdir=runs/single
    python train.py --config=configs/next_token.py:d16 --workdir=runs/raster --config.tokenizer=runs/single
    python train.py --config=configs/next_token.py:digits --workdir=runs/raster_digits   # on a laptop

Depth, width, optimizer and schedule are those of configs/var.py; only the prediction scheme differs.
`--config.model.order=spiral_in` sets the order of prediction, `--config.model.positions=rotary_2d` the
positions, `--config.model.mask=axial` the mask (see var_jax/transformer/positions.py; with digits:
`--config.next_token.model.order=...`).

`d12` to `d30` have not been run: they need ImageNet and accelerators.
"""

from ml_collections import ConfigDict

from configs import digits, schema, var

SIZES = tuple(name for name in var.RECIPES if name != "d36")


def get_config(name: str = "d16") -> ConfigDict:
    if name not in (*SIZES, "digits"):
        raise ValueError(f"configs/next_token.py knows {', '.join(SIZES)}, digits; got {name!r}")
    if name == "digits":
        return flattened(digits.get_config())
    config = schema.next_token_stage()
    var.set_recipe(config, name)
    config.scales = (16,)
    return config


def flattened(config: ConfigDict) -> ConfigDict:
    """Convert a config of tokenizer and next_scale to next-token prediction of a single map, the finest."""
    tokenizer = ConfigDict(config.tokenizer.to_dict())
    tokenizer.model.scales = tuple(tokenizer.model.scales)[-1:]
    tokenizer.model.num_phis = 0
    tokenizer.model.quantizer_dropout = 0.0
    stage = schema.next_token_stage()
    for name, value in config.next_scale.items():
        if name in ("correction", "loss"):  # of several maps
            continue
        if isinstance(value, ConfigDict):
            stage[name].update(value)
        elif name not in ("task", "tokenizer", "scales"):  # the run trains its own tokenizer
            stage[name] = value
    stage.data.tokens = ""
    stage.model.mask = "causal"
    return ConfigDict(dict(stages=("tokenizer", "next_token"), tokenizer=tokenizer, next_token=stage))
