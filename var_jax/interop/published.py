"""The published PyTorch key layout and ours, both ways.

One table per network lists, for each parameter of ours, the published tensors that it holds and how
a tensor is laid out there.  The same table reads and writes, so that a round trip is the identity.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax.interop.tensor_files import release
from var_jax.scales import SCALES_256, SCALES_512, Scales
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one kind of tensor is laid out: published -> ours, and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    published: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda t: t, lambda a: a)
LINEAR = Layout(lambda t: t.T, lambda a: a.T)
CONV = Layout(lambda t: t.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
BATCHED = Layout(lambda t: t[0], lambda a: a[None])  # a leading axis of 1
PER_HEAD = Layout(lambda t: t.reshape(-1), lambda a: a.reshape(1, -1, 1, 1))
OFFSETS = Layout(lambda t: t[0, 0], lambda a: a[None, None])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours: its path, the published tensors it stacks (one if not stacked)."""

    path: str
    names: tuple[str, ...]
    layout: Layout
    stacked: bool = False


def _layer(ours: str, published: str, layout: Layout, norm: bool = False) -> list[Entry]:
    """Weight and bias of one layer."""
    weight = "scale" if norm else "kernel"
    return [
        Entry(f"{ours}/{weight}", (f"{published}.weight",), SAME if norm else layout),
        Entry(f"{ours}/bias", (f"{published}.bias",), SAME),
    ]


# --- tokenizer ------------------------------------------------------------------------------------


def _residual(ours: str, published: str, shortcut: bool) -> list[Entry]:
    entries = []
    for i in (1, 2):
        entries += _layer(f"{ours}/norm{i}", f"{published}.norm{i}", SAME, norm=True)
        entries += _layer(f"{ours}/conv{i}", f"{published}.conv{i}", CONV)
    return entries + (_layer(f"{ours}/shortcut", f"{published}.nin_shortcut", CONV) if shortcut else [])


def _attention(ours: str, published: str) -> list[Entry]:
    return [
        *_layer(f"{ours}/norm", f"{published}.norm", SAME, norm=True),
        *_layer(f"{ours}/qkv", f"{published}.qkv", CONV),
        *_layer(f"{ours}/proj", f"{published}.proj_out", CONV),
    ]


def _pyramid(config: TokenizerConfig, part: str) -> list[Entry]:
    """Encoder ("down") or decoder ("up"); the order of the levels decides where channels change."""
    encoder = part == "encoder"
    side, resample = ("down", "downsample") if encoder else ("up", "upsample")
    mults, last = config.ch_mult, len(config.ch_mult) - 1
    entries = _layer(f"{part}/conv_in", f"{part}.conv_in", CONV)
    for level, mult in enumerate(mults):
        before = mults[max(level - 1, 0)] if encoder else mults[min(level + 1, last)]
        if encoder and level == 0:
            before = 1
        for i in range(config.num_blocks + (not encoder)):
            name = f"{part}.{side}.{level}.block.{i}"
            entries += _residual(f"{part}/level{level}_block{i}", name, i == 0 and before != mult)
            if level == last:
                name = f"{part}.{side}.{level}.attn.{i}"
                entries += _attention(f"{part}/level{level}_attention{i}", name)
        if level != (last if encoder else 0):
            name = f"{part}.{side}.{level}.{resample}.conv"
            entries += _layer(f"{part}/level{level}_{resample}/conv", name, CONV)
    for ours, theirs in (("block1", "block_1"), ("block2", "block_2")):
        entries += _residual(f"{part}/middle/{ours}", f"{part}.mid.{theirs}", False)
    entries += _attention(f"{part}/middle/attention", f"{part}.mid.attn_1")
    entries += _layer(f"{part}/norm_out", f"{part}.norm_out", SAME, norm=True)
    return entries + _layer(f"{part}/conv_out", f"{part}.conv_out", CONV)


def tokenizer_table(config: TokenizerConfig) -> list[Entry]:
    """All parameters of a tokenizer, and the per-scale code counts `code_hits`."""
    table = _pyramid(config, "encoder") + _pyramid(config, "decoder")
    table += _layer("quant_conv", "quant_conv", CONV) + _layer("post_quant_conv", "post_quant_conv", CONV)
    table.append(Entry("quantizer/codebook", ("quantize.embedding.weight",), SAME))
    if n := config.num_phis:
        root = "quantize.quant_resi"
        phis = [f"{root}.qresi"] if n == 1 else [f"{root}.qresi_ls.{i}" for i in range(n)]
        weights, biases = tuple(f"{p}.weight" for p in phis), tuple(f"{p}.bias" for p in phis)
        table.append(Entry("quantizer/phi_kernel", weights, CONV, stacked=True))
        table.append(Entry("quantizer/phi_bias", biases, SAME, stacked=True))
    return [*table, Entry("code_hits", ("quantize.ema_vocab_hit_SV",), SAME)]


def tokenizer_config(tensors: Tensors, scales=None) -> TokenizerConfig:
    """The architecture that the shapes of a published tokenizer imply.

    Args:
      tensors: the published state dict.
      scales: sides of the token maps; by default those of 256px, where the file has K = 10.

    Raises:
      ValueError: if this is no published tokenizer, or its K is not that of the scales.
    """
    require(
        tensors, ("encoder.conv_in.weight", "quantize.embedding.weight", "quant_conv.weight"), "tokenizer"
    )
    ch = tensors["encoder.conv_in.weight"].shape[0]
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    outs = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    num_codes, code_dim = tensors["quantize.embedding.weight"].shape
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    if scales is None:
        if hits is not None and len(hits) != len(SCALES_256):
            raise ValueError(
                f"quantize.ema_vocab_hit_SV has shape {hits.shape}: a tokenizer of {len(hits)} scales, not "
                f"the published {len(SCALES_256)}; pass scales=, the sides of its token maps"
            )
        scales = SCALES_256
    if hits is not None and hits.shape != (len(scales), num_codes):
        raise ValueError(
            f"quantize.ema_vocab_hit_SV has shape {hits.shape}, but scales {tuple(scales)} and "
            f"{num_codes} codes need {(len(scales), num_codes)}"
        )
    single = "quantize.quant_resi.qresi.weight" in tensors
    return TokenizerConfig(
        scales=tuple(scales),
        num_codes=num_codes,
        code_dim=code_dim,
        ch=ch,
        ch_mult=tuple(out // ch for out in outs),
        num_blocks=count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        num_phis=1 if single else count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    )


# --- transformer ----------------------------------------------------------------------------------


def next_scale_table(config: NextScaleConfig) -> list[Entry]:
    """All parameters of a VAR transformer."""

    def blocks(ours: str, published: str, layout: Layout) -> Entry:
        names = tuple(f"blocks.{i}.{published}" for i in range(config.depth))
        return Entry(ours, names, layout, stacked=True)

    layers = "blocks/layers"
    table = [
        Entry("class_embedding", ("class_emb.weight",), SAME),
        Entry("start_embedding", ("pos_start",), BATCHED),
        Entry("position_embedding", ("pos_1LC",), BATCHED),
        Entry("level_embedding", ("lvl_embed.weight",), SAME),
        *_layer("code_embedding", "word_embed", LINEAR),
        *_layer("head_adaln", "head_nm.ada_lin.1", LINEAR),
        *_layer("head", "head", LINEAR),
        blocks(f"{layers}/attention/qkv/kernel", "attn.mat_qkv.weight", LINEAR),
        blocks(f"{layers}/attention/q_bias", "attn.q_bias", SAME),
        blocks(f"{layers}/attention/v_bias", "attn.v_bias", SAME),
        blocks(f"{layers}/attention/proj/kernel", "attn.proj.weight", LINEAR),
        blocks(f"{layers}/attention/proj/bias", "attn.proj.bias", SAME),
    ]
    for fc in ("fc1", "fc2"):
        table.append(blocks(f"{layers}/mlp/{fc}/kernel", f"ffn.{fc}.weight", LINEAR))
        table.append(blocks(f"{layers}/mlp/{fc}/bias", f"ffn.{fc}.bias", SAME))
    if config.normalized_attention:
        table.append(blocks(f"{layers}/attention/log_temperature", "attn.scale_mul_1H11", PER_HEAD))
    if config.shared_adaln:
        table += _layer("shared_adaln", "shared_ada_lin.1", LINEAR)
        return [*table, blocks("adaln_offset", "ada_gss", OFFSETS)]
    table.append(blocks("adaln/adaln/kernel", "ada_lin.1.weight", LINEAR))
    return [*table, blocks("adaln/adaln/bias", "ada_lin.1.bias", SAME)]


def next_scale_buffers(config: NextScaleConfig) -> dict[str, np.ndarray]:
    """Constants that the published network stores beside its parameters."""
    scales = config.schedule
    return {
        "lvl_1L": scales.levels[None].astype(np.int64),
        "attn_bias_for_masking": np.where(scales.mask, 0, -np.inf).astype(np.float32)[None, None],
        **{f"blocks.{i}.attn.zero_k_bias": np.zeros(config.width, np.float32) for i in range(config.depth)},
    }


def next_scale_config(tensors: Tensors, scales=None) -> NextScaleConfig:
    """The architecture that the shapes of a published transformer imply.

    Args:
      tensors: the published state dict.
      scales: sides of the token maps, those of its tokenizer; by default what `lvl_1L` says, or the published
        ones of that length.

    Raises:
      ValueError: if this is no published transformer, or one of other scales.
    """
    require(tensors, ("pos_1LC", "word_embed.weight", "class_emb.weight", "head.weight"), "VAR transformer")
    classes, width = tensors["class_emb.weight"].shape
    temperature = tensors.get("blocks.0.attn.scale_mul_1H11")
    scales = _scales_of(tensors) if scales is None else scales
    length = Scales(scales).length
    if tensors["pos_1LC"].shape[1] != length:
        raise ValueError(
            f"pos_1LC has shape {tensors['pos_1LC'].shape}, but the tokenizer's scales {tuple(scales)} make "
            f"{length} positions: expected {(1, length, width)}; pass the right scales= to load_tokenizer"
        )
    return NextScaleConfig(
        depth=count(tensors, r"blocks\.(\d+)\."),
        width=width,
        num_heads=0 if temperature is None else temperature.shape[1],
        num_classes=classes - 1,
        num_codes=tensors["head.weight"].shape[0],
        code_dim=tensors["word_embed.weight"].shape[1],
        scales=tuple(scales),
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        normalized_attention=temperature is not None,
    )


def _scales_of(tensors: Tensors) -> tuple[int, ...]:
    """Sides of the token maps of a transformer: by the level of every position, or else by their number."""
    if (levels := tensors.get("lvl_1L")) is not None:
        return tuple(math.isqrt(count) for count in np.bincount(levels[0]))
    known = {Scales(sides).length: sides for sides in (SCALES_256, SCALES_512)}
    if (scales := known.get(tensors["pos_1LC"].shape[1])) is None:
        raise ValueError(
            f"pos_1LC has shape {tensors['pos_1LC'].shape}, not the {' or '.join(map(str, known))} "
            "positions of the published 256 or 512 pixels; give scales, the sides of its token maps"
        )
    return scales


# --- both -----------------------------------------------------------------------------------------


def published_shapes(table: list[Entry], shapes: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a network has in the published layout.

    Args:
      table: of the network.
      shapes: our tree of parameters, as anything with a shape.
    """
    ours, found = flatten_dict(shapes, sep="/"), {}
    for entry in table:
        shape = ours[entry.path].shape[1:] if entry.stacked else ours[entry.path].shape
        layout = entry.layout.published(np.broadcast_to(np.float32(0), shape))
        found |= dict.fromkeys(entry.names, layout.shape)
    return found


def check_tensors(tensors: Tensors, table: list[Entry], shapes: dict, buffers: Tensors | None = None) -> None:
    """Raises ValueError naming every tensor that is missing, unknown, or of another shape or value.

    Arguments as for `to_ours`.
    """
    buffers, expected = buffers or {}, published_shapes(table, shapes)
    problems = [f"missing: {name}" for name in sorted(set(expected) - set(tensors))]
    unknown = set(tensors) - set(expected) - set(buffers)
    problems += [f"unknown: {name} {tensors[name].shape}" for name in sorted(unknown)]
    for name in sorted(set(buffers) & set(tensors)):
        if not np.array_equal(buffers[name], tensors[name]):
            problems.append(f"{name} {tensors[name].shape} holds other values than this architecture implies")
    problems += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise ValueError("the tensors do not fit the architecture:\n  " + "\n  ".join(problems))


def to_ours(tensors: Tensors, table: list[Entry], shapes: dict, buffers: Tensors | None = None) -> dict:
    """Published tensors -> our tree of parameters (float32), every tensor accounted for.

    Takes the memory of the result alone: a tensor that is mapped from a file is let go once it is copied.

    Args:
      tensors: the published state dict.
      table: of the network.
      shapes: our tree of parameters, as anything with a shape.
      buffers: constants that the file must hold with these very values, or may lack.

    Raises:
      ValueError: naming every tensor that is missing, unknown, or of another shape or value.
    """
    check_tensors(tensors, table, shapes, buffers)
    flat, ours = flatten_dict(shapes, sep="/"), {}
    for entry in table:
        ours[entry.path] = np.empty(flat[entry.path].shape, np.float32)
        for i, name in enumerate(entry.names):
            part = ours[entry.path][i] if entry.stacked else ours[entry.path]
            part[...] = entry.layout.ours(tensors[name])
            release(tensors[name])
    return unflatten_dict(ours, sep="/")


def to_published(params: dict, table: list[Entry], buffers: Tensors | None = None) -> dict[str, np.ndarray]:
    """Our tree of parameters -> the published state dict, with its buffers."""
    flat = flatten_dict(params, sep="/")
    return dict(published_tensors(lambda path: np.asarray(jax.device_get(flat[path])), table, buffers))


def published_tensors(
    read: Callable[[str], np.ndarray], table: list[Entry], buffers: Tensors | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of the published state dict, one parameter of ours at a time.

    Args:
      read: path of a parameter of ours -> the parameter.
      table: of the network.
      buffers: constants that the published network stores beside its parameters.
    """
    yield from (buffers or {}).items()
    for entry in table:
        leaf = read(entry.path)
        for i, name in enumerate(entry.names):
            part = leaf[i] if entry.stacked else leaf
            yield name, np.ascontiguousarray(entry.layout.published(part))


def count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number that the names hold at the group of the pattern, or 0."""
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def require(tensors: Tensors, names: tuple[str, ...], what: str) -> None:
    """Raises ValueError naming those tensors that a published network of that kind must have and lacks."""
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"no published {what}: it has no tensor {', '.join(missing)}")
