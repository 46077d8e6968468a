"""Make trainer.pth and trainer_legacy.pth with PyTorch: checkpoints as the published trainer saves them.

    pip install torch==2.13.0 && python tests/interop/data/make_trainer.py

The layout is that of `VARTrainer.state_dict` and `Args.state_dict`; the optimizer is the published one, fused
AdamW with two groups, after a step in float16 with a gradient scaler. The transformer is complete: width 4,
depth 1, 5 classes, 16 codes of 4 channels and scales (1, 2, 4). Of the tokenizer only some tensors are saved:
a complete one has at least 32 channels, which is too large for a repository.
"""

from collections import OrderedDict
from pathlib import Path

import torch

WIDTH, CODES, CODE_DIM, CLASSES, SCALES = 4, 16, 4, 5, (1, 2, 4)
LENGTH = sum(side * side for side in SCALES)
VAR = {
    "class_emb.weight": (CLASSES + 1, WIDTH),
    "pos_start": (1, 1, WIDTH),
    "pos_1LC": (1, LENGTH, WIDTH),
    "lvl_embed.weight": (len(SCALES), WIDTH),
    "word_embed.weight": (WIDTH, CODE_DIM),
    "word_embed.bias": (WIDTH,),
    "head_nm.ada_lin.1.weight": (2 * WIDTH, WIDTH),
    "head_nm.ada_lin.1.bias": (2 * WIDTH,),
    "head.weight": (CODES, WIDTH),
    "head.bias": (CODES,),
    "blocks.0.attn.scale_mul_1H11": (1, 1, 1, 1),
    "blocks.0.attn.mat_qkv.weight": (3 * WIDTH, WIDTH),
    "blocks.0.attn.q_bias": (WIDTH,),
    "blocks.0.attn.v_bias": (WIDTH,),
    "blocks.0.attn.proj.weight": (WIDTH, WIDTH),
    "blocks.0.attn.proj.bias": (WIDTH,),
    "blocks.0.ffn.fc1.weight": (4 * WIDTH, WIDTH),
    "blocks.0.ffn.fc1.bias": (4 * WIDTH,),
    "blocks.0.ffn.fc2.weight": (WIDTH, 4 * WIDTH),
    "blocks.0.ffn.fc2.bias": (WIDTH,),
    "blocks.0.ada_lin.1.weight": (6 * WIDTH, WIDTH),
    "blocks.0.ada_lin.1.bias": (6 * WIDTH,),
}
VAE = {"quantize.embedding.weight": (CODES, CODE_DIM), "quant_conv.weight": (CODE_DIM, CODE_DIM, 3, 3)}


def network(shapes: dict[str, tuple], buffers: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Build a module with parameters and buffers of these names; the n-th number of all is n / 64."""
    root = torch.nn.Module()
    first = 0
    for name, value in [*shapes.items(), *buffers.items()]:
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, torch.nn.Module())
            module = getattr(module, folder)
        if isinstance(value, torch.Tensor):
            module.register_buffer(leaf, value)
            continue
        numbers = torch.arange(first, first + torch.Size(value).numel(), dtype=torch.float32) / 64
        module.register_parameter(leaf, torch.nn.Parameter(numbers.reshape(value)))
        first += numbers.numel()
    return root


def checkpoint() -> dict:
    levels = torch.cat([torch.full((side * side,), k) for k, side in enumerate(SCALES)]).view(1, LENGTH)
    mask = torch.where(levels <= levels.T, 0.0, -torch.inf).reshape(1, 1, LENGTH, LENGTH)
    constants = {
        "lvl_1L": levels,
        "attn_bias_for_masking": mask,
        "blocks.0.attn.zero_k_bias": torch.zeros(WIDTH),
    }
    var = network(VAR, constants)
    vae = network(VAE, {"quantize.ema_vocab_hit_SV": torch.zeros(3, CODES)})
    decayed = [p for p in var.parameters() if p.ndim > 1]
    others = [p for p in var.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "wd_sc": 1.0, "lr_sc": 1.0},
        {"params": others, "wd_sc": 0.0, "lr_sc": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, growth_interval=1000)
    loss = sum((p.half().float() ** 2).sum() for p in var.parameters())
    scaler.scale(loss).backward()
    weights = OrderedDict((name, tensor.clone()) for name, tensor in var.state_dict().items())
    weights._metadata = var.state_dict()._metadata
    scaler.step(optimizer)
    scaler.update()
    config = {"patch_nums": SCALES, "resos": tuple(16 * side for side in SCALES), "label_smooth": 0.0}
    config |= {"prog_it": 7, "last_prog_si": -1, "first_prog": True}
    trainer = {"config": config, "var_wo_ddp": weights, "vae_local": vae.state_dict()}
    trainer["var_opt"] = {"scaler": scaler.state_dict(), "optimizer": optimizer.state_dict()}
    args = OrderedDict(
        data_path="/data", depth=1, tlr=1e-4, twde=None, saln=False, patch_nums=SCALES, seed=None
    )
    return {"epoch": 3, "iter": 0, "trainer": trainer, "args": args}


if __name__ == "__main__":
    folder = Path(__file__).parent
    torch.save(checkpoint(), folder / "trainer.pth")
    torch.save(checkpoint(), folder / "trainer_legacy.pth", _use_new_zipfile_serialization=False)
