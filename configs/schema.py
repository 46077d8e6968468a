"""Define every field of each stage, with its meaning and default: the base of all configs.

`tests/test_configs.py` checks that each config has exactly these fields.
"""

import os

from ml_collections import ConfigDict


def _data() -> dict:
    return dict(
        name="imagenet2012",  # name of a prepared TFDS data set
        dir=os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"),
        train_split="train",
        eval_split="validation",
        resize=1.125,  # ratio of the short side to the image size before the random crop
        flip=False,  # mirror half of the training images
        shift=0,  # maximum shift, in pixels, of half of the training images
        threads=16,  # threads that read and decode ahead
        workers=0,  # processes that do so instead; 0: none
        # Directory of a token cache (var_jax.tools.encode_dataset); empty: encode images.  With a cache, the
        # stage reads no images, and data set, splits, resize, flip and shift are those of the cache.
        tokens="",
    )


def _train() -> dict:
    return dict(
        batch=768,  # images per step, over all devices
        steps=0,  # 0: computed from `epochs`
        epochs=200,
        grad_accum_steps=1,  # parts of a batch, computed in turn to save memory; each draws its own noise
        base_learning_rate=1e-4,  # for 256 images; the learning rate is this times batch / 256
        b1=0.9,
        b2=0.95,
        grad_clip_norm=2.0,  # global norm of the gradient; 0: no clipping
        weight_decay=0.05,
        weight_decay_end=0.05,
        lr_schedule="lin0",  # cos, lin, lin0, lin00, linX, exp, constant: var_jax/training/optimizer.py
        warmup_fraction=0.02,  # of all steps
        lr_start_fraction=0.005,  # of the peak learning rate
        lr_end_fraction=0.1,  # of the peak learning rate
        ema_decay=0.0,  # of the moving average of the parameters, used for sampling; 0: none
        dtype="auto",  # of matrix products: bfloat16 on accelerators, float32 on CPU
        mesh=dict(data=1, fsdp=-1, tensor=1),  # -1: all remaining devices
        log_every=50,  # steps, here and below
        eval_every=5000,
        preview_every=5000,  # preview images; 0: none
        checkpoint_every=5000,
        max_skipped=20,  # consecutive steps with a non-finite loss or gradient before training stops
        max_to_keep=2,  # latest checkpoints; the best one is kept too
        writers=("tensorboard",),  # of metrics, besides metrics.jsonl: tensorboard, csv, wandb
    )


def tokenizer_stage() -> ConfigDict:
    """Return the fields of the stage `tokenizer`."""
    return ConfigDict(
        dict(
            task="tokenizer",
            seed=0,
            init_from="",  # published file or run directory to fine-tune; empty: from scratch
            # Files of VGG-16 (torchvision's) and of LPIPS's channel weights, separated by a comma; empty: no
            # perceptual loss.
            perceptual_weights="",
            data=_data(),
            model=dict(  # var_jax/tokenizer/config.py
                scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # sides of the token maps, coarse to fine
                num_codes=4096,
                code_dim=32,
                ch=160,  # channels of the first level
                ch_mult=(1, 1, 2, 2, 4),  # channels of each level, in units of `ch`
                num_blocks=2,  # residual blocks per level
                num_phis=4,  # convolutions that smooth the upsampled maps; 0: none
                l2_normalized=False,  # codes of length 1
                norm_groups=32,  # of GroupNorm
                dropout=0.0,
                quantizer_dropout=0.1,  # share of images decoded without their last maps
                vq_gradient="straight_through",  # or "rotation"
                patch=0,  # side in pixels of patches used as features in place of the networks; 0: none
            ),
            loss=dict(l2=1.0, l1=0.2, perceptual=1.0, codebook=1.0, entropy=0.0),  # weights
            codebook=dict(
                kmeans_steps=10,  # number of first steps that fit the codebook to the batch
                ema_decay=0.99,  # of the mean of its targets that a code follows; 0: gradient
                entropy_temperature=0.01,  # of loss.entropy, in units of squared distance
                hits_decay=0.99,  # of the moving average of code uses
                dead_threshold=0.03,  # relative to uniform use, below which a code is dead
                restart_every=100,  # steps; 0: never
                restart_until_fraction=0.8,  # of all steps
                window=10_000,  # images over which the log counts code use
            ),
            adversarial=dict(
                weight=0.4,  # 0: no discriminator
                adaptive=True,  # scale the weight by the ratio of gradient norms at the last layer
                min_ratio=0.015,
                start_fraction=0.2,  # of all steps
                warmup_fraction=0.02,  # of all steps, over which the weight rises
                network="patch",  # PatchGAN; or "dino": heads on features of a frozen ViT-S
                dino_weights="",  # file of DINO's ViT-S
                channels=64,
                layers=3,
                augment=True,  # DiffAugment
                r1=0.0,
                lecam=0.0,
                train=dict(
                    base_learning_rate=1e-4,
                    b1=0.5,
                    b2=0.9,
                    grad_clip_norm=10.0,
                    weight_decay=0.005,
                    weight_decay_end=0.005,
                ),
            ),
            train=_train() | dict(remat=True),  # recompute activations in the backward pass
        )
    )


def transformer_stage() -> ConfigDict:
    """Return the fields of the stage `next_scale`."""
    return ConfigDict(
        dict(
            task="next_scale",
            seed=0,
            init_from="",  # published file or run directory to fine-tune; empty: from scratch
            tokenizer="",  # published file or run directory; empty: the tokenizer of this run
            scales=(),  # of the tokenizer, to check it; (): any
            data=_data(),
            model=dict(  # var_jax/transformer/config.py
                depth=16,
                width=1024,
                num_heads=16,
                shared_adaln=False,
                normalized_attention=True,
                positions="learned_1d",  # var_jax/transformer/positions.py
                # What a map sees: block_causal, itself and all coarser maps; block_diagonal, itself alone.
                mask="block_causal",
                gamma_init=1e-3,  # scale of the initial residual gates
                # What an image is drawn from: label, its class; caption or embedding, which
                # var_jax.tools.prepare stores with the images (docs/training.md).
                condition="label",
                text_depth=2,  # blocks of the caption encoder
                class_dropout_prob=0.1,  # share of conditions replaced by "no class", for guidance
                drop_path=0.1 * 16 / 24,
                dropout=0.0,
            ),
            transformer=dict(  # how it is computed
                attention="auto",  # a name in var_jax/transformer/attention.py
                remat="auto",  # none, mlp, flat_qkv or full: var_jax/transformer/remat.py
                scan_layers="auto",  # true or false; auto: unrolled on a GPU
                # Encoder precision in a step from images (docs/precision.md): high is TF32 on a GPU and three
                # bfloat16 passes on a TPU; highest is float32; default is one pass on a TPU.
                encoder_precision="high",
            ),
            # Maps that are trained, such as those of one model of a pair (docs/training.md); by default all.
            loss=dict(
                from_scale=0,  # first of them; 0: the coarsest
                upto=0,  # number of maps, counted from the coarsest, with the last of them; 0: all
            ),
            # Self-correction: replace tokens in training, and let later maps repair them (docs/training.md).
            correction=dict(
                strength=0.0,  # maximum share of the tokens of a map that are replaced; 0: none
                source="uniform",  # of the replacements: uniform (any code) or model (its own predictions)
            ),
            sampling=dict(  # of the previews, and by default of `sample.py`
                guidance=1.5, top_k=900, top_p=0.96, temperature=1.0, smooth=False
            ),
            train=_train()
            | dict(
                fid_every=0,  # steps between FIDs of samples; 0: none
                fid_samples=2000,  # drawn as the previews; FID is larger for fewer samples
                fid_inception="",  # weights of Inception-v3; empty: a small classifier of the data
                fid_reference="",  # file of `evaluate.py statistics`; empty: the training images
                best_by="loss",  # held-out `loss`, or `fid`: metric that selects the best checkpoint
            ),
        )
    )


def next_token_stage() -> ConfigDict:
    """Return the fields of the stage `next_token`: those of `next_scale`, and the order of prediction."""
    stage = transformer_stage()
    stage.task = "next_token"
    del stage.correction, stage.loss  # there is one map
    stage.model.order = "raster"  # order of prediction: var_jax/transformer/orders.py
    stage.model.order_seed = 0  # of the order `random`
    stage.model.mask = "causal"  # or row, column, axial, local: var_jax/transformer/positions.py
    stage.model.mask_radius = 1  # in cells; for every mask but causal
    return stage


def align_stage() -> ConfigDict:
    """Return the fields of the stage `align`: those of `next_scale`, and the loss."""
    stage = transformer_stage()
    del stage.correction, stage.loss  # its pairs are not corrupted, and its loss is of whole images
    stage.task = "align"  # init_from is required: the transformer to fine-tune, which is the reference too
    stage.align = ConfigDict(
        dict(  # var_jax/training/align_task.py
            method="cca",  # or "ddo"
            beta=0.02,  # factor of the log-ratio of the transformer and the reference
            negative_weight=50.0,  # lambda of cca, alpha of ddo
            samples="",  # ddo: directory of samples of init_from (var_jax.tools.sample_tokens)
        )
    )
    stage.model.drop_path = 0.0
    stage.sampling.guidance = 0.0
    return stage
