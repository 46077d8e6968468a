"""Tokenizer and VAR for small pictures of your own, here 64 pixels: docs/your_own_images.md walks through it.

    python -m examples.coloured_shapes pictures --images=4000
    python -m var_jax.tools.prepare --images=pictures --name=shapes --data_dir=data --skip_bad
    python train.py --config=configs/shapes.py --workdir=runs/shapes

Sized for two CPU cores.  With an accelerator take more channels, more blocks and more steps first.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    for stage in (config.tokenizer, config.next_scale):
        stage.seed = 0
        stage.data.update(dict(name="shapes", dir="data", flip=True, shift=0, resize=1.125))
        stage.train.update(dict(log_every=50, eval_every=400, preview_every=400, checkpoint_every=200))
    config.tokenizer.model.update(
        dict(scales=(1, 2, 3, 4, 6, 8), num_codes=512, code_dim=16, ch=16, ch_mult=(1, 2, 4, 4))
    )
    config.tokenizer.model.update(dict(norm_groups=8, quantizer_dropout=0.1))
    config.tokenizer.loss.update(dict(l2=1.0, l1=0.2))
    config.tokenizer.codebook.update(dict(kmeans_steps=10, ema=0.99, restart_every=20))
    config.tokenizer.train.update(dict(steps=1000, batch=32, learning_rate=1e-2, weight_decay=0.005))
    config.tokenizer.train.update(dict(weight_decay_end=0.005))
    config.next_scale.model.update(dict(depth=5, width=160, num_heads=5, drop_path=0.05))
    config.next_scale.train.update(dict(steps=1200, batch=32, learning_rate=8e-3, ema=0.99))
    config.next_scale.sampling.update(dict(guidance=1.5, top_k=0, top_p=0.96))
    return config
