"""Tiny version of the digits config that trains in seconds, with every feature of tokenizer training."""

from ml_collections import ConfigDict

from configs import digits


def tiny_config(data_dir, steps: int = 6, every: int = 2) -> ConfigDict:
    """Return the config of both stages, with a checkpoint every `every` steps."""
    config = digits.get_config()
    for stage in (config.tokenizer, config.next_scale):
        stage.data.dir = str(data_dir)
        stage.train.update(dict(steps=steps, batch=16, log_every=1, checkpoint_every=every, max_to_keep=2))
        stage.train.update(dict(eval_every=steps, preview_every=steps))
    config.tokenizer.model.update(
        dict(scales=(1, 2, 4), num_codes=16, code_dim=4, ch=8, ch_mult=(1, 1), norm_groups=4)
    )
    config.tokenizer.codebook.update(dict(restart_every=2, kmeans_steps=1, ema_decay=0.9))
    config.tokenizer.adversarial.update(
        dict(weight=0.4, start_fraction=0.25, warmup_fraction=0.75, layers=1, channels=8)
    )
    config.next_scale.model.update(dict(depth=2, width=32, num_heads=4, drop_path=0.1))
    return config
