"""Fields that every config has, with their meaning; the experiments override them."""

import os

from ml_collections import ConfigDict


def data(name: str) -> ConfigDict:
    """Where images come from and what happens to them on the host."""
    return ConfigDict(
        dict(
            name=name,  # of a prepared TFDS data set
            dir=os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"),
            train_split="train",
            eval_split="test",
            resize=1.125,  # short side over image size before the random crop
            flip=False,
            shift=0,  # pixels that half of the training images are moved by at most
            threads=16,  # that read and decode ahead
            workers=0,  # processes that do so instead
            # Directory of a token cache (var_jax.tools.encode_dataset).  The stage next_scale then reads no
            # images: data set, splits, resize, flip and shift are those of the cache.
            tokens="",
        )
    )


def train() -> ConfigDict:
    """The optimiser, the rhythm of the loop, and where arrays live."""
    return ConfigDict(
        dict(
            batch=768,  # images a step, over all devices
            steps=0,  # 0: from the epochs
            epochs=200,
            accumulate=1,  # parts that a batch is worked through in, to save memory; each has its own draws
            learning_rate=1e-4,  # at 256 images; in proportion to the batch
            b1=0.9,
            b2=0.95,
            clip=2.0,  # global norm of the gradient; 0 for none
            weight_decay=0.05,
            weight_decay_end=0.05,
            schedule="lin0",
            warmup=0.02,  # share of all steps
            warmup_start=0.005,  # share of the peak
            end=0.1,  # share of the peak
            ema=0.0,  # decay of the moving average to sample with; 0 for none
            dtype="auto",  # of matrix products: bfloat16 on accelerators, float32 on CPU
            mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: all devices that are left
            log_every=50,
            eval_every=5000,
            preview_every=5000,  # pictures; 0 for none, at the end neither
            checkpoint_every=5000,
            max_skipped=20,  # steps in a row whose loss or gradient is not finite, before training stops
            keep=2,  # latest checkpoints kept, beside the best
        )
    )


def transformer() -> ConfigDict:
    """How the transformer is computed; what it computes is in `model`."""
    return ConfigDict(
        dict(
            attention="auto",  # einsum, grouped, cudnn or splash: var_jax/transformer/attention.py
            remat="auto",  # none, mlp, flat_qkv or full, by memory: var_jax/transformer/remat.py
            # Of the float32 encoder, where a step encodes its images itself: high is TF32 on a GPU, three
            # bfloat16 passes on a TPU; highest is float32, default one pass on a TPU: docs/precision.md.
            encoder_precision="high",
        )
    )
