"""Convert parameters between the published PyTorch state dicts and our parameter trees.

One table per network lists, for each of our parameters, the published tensors that it is made of and their
layout.  The same table is used to read and to write, so that a round trip is the identity.
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

# Limits on the architecture that a file implies, so that crafted names or shapes cannot cost memory or time.
MAX_DEPTH = 256  # blocks of a transformer
_MAX_LEVELS = 7  # of a tokenizer: downsampling by 64
_MAX_BLOCKS = 8  # of a tokenizer level
_MAX_PHIS = 64
MAX_SCALES = 64
_MAX_LENGTH = 10_000  # tokens of an image; the maps of 1024px have 9451
_MAX_PROBLEMS = 20  # listed in a message, per kind


@dataclasses.dataclass(frozen=True)
class Layout:
    """Pair of functions that convert a tensor from the published layout to ours and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    published: Callable[[np.ndarray], np.ndarray]


IDENTITY = Layout(lambda t: t, lambda a: a)
LINEAR = Layout(lambda t: t.T, lambda a: a.T)
CONV = Layout(lambda t: t.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
BATCHED = Layout(lambda t: t[0], lambda a: a[None])  # a leading axis of 1
PER_HEAD = Layout(lambda t: t.reshape(-1), lambda a: a.reshape(1, -1, 1, 1))
OFFSETS = Layout(lambda t: t[0, 0], lambda a: a[None, None])


@dataclasses.dataclass(frozen=True)
class Constant:
    """Non-trainable tensor, determined by the architecture, that published state dicts also hold."""

    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]  # computed on demand: a mask has L x L numbers


@dataclasses.dataclass(frozen=True)
class Entry:
    """Table row: path of our parameter, and names of its published tensors (one, unless stacked)."""

    path: str
    names: tuple[str, ...]
    layout: Layout
    stacked: bool = False


def _layer(ours: str, published: str, layout: Layout, norm: bool = False) -> list[Entry]:
    """Return the entries of the weight and bias of one layer."""
    weight = "scale" if norm else "kernel"
    return [
        Entry(f"{ours}/{weight}", (f"{published}.weight",), IDENTITY if norm else layout),
        Entry(f"{ours}/bias", (f"{published}.bias",), IDENTITY),
    ]


# --- tokenizer ------------------------------------------------------------------------------------


def _residual(ours: str, published: str, shortcut: bool) -> list[Entry]:
    entries = []
    for i in (1, 2):
        entries += _layer(f"{ours}/norm{i}", f"{published}.norm{i}", IDENTITY, norm=True)
        entries += _layer(f"{ours}/conv{i}", f"{published}.conv{i}", CONV)
    return entries + (_layer(f"{ours}/shortcut", f"{published}.nin_shortcut", CONV) if shortcut else [])


def _attention(ours: str, published: str) -> list[Entry]:
    return [
        *_layer(f"{ours}/norm", f"{published}.norm", IDENTITY, norm=True),
        *_layer(f"{ours}/qkv", f"{published}.qkv", CONV),
        *_layer(f"{ours}/proj", f"{published}.proj_out", CONV),
    ]


def _pyramid(config: TokenizerConfig, part: str) -> list[Entry]:
    """Return the entries of the encoder ("down") or decoder ("up"); `part` is `encoder` or `decoder`."""
    encoder = part == "encoder"
    side, resample = ("down", "downsample") if encoder else ("up", "upsample")
    mults = config.ch_mult
    last = len(mults) - 1
    entries = _layer(f"{part}/conv_in", f"{part}.conv_in", CONV)
    for level, mult in enumerate(mults):
        previous_mult = mults[max(level - 1, 0)] if encoder else mults[min(level + 1, last)]
        if encoder and level == 0:
            previous_mult = 1
        for i in range(config.num_blocks + (not encoder)):
            name = f"{part}.{side}.{level}.block.{i}"
            entries += _residual(f"{part}/level{level}_block{i}", name, i == 0 and previous_mult != mult)
            if level == last:
                name = f"{part}.{side}.{level}.attn.{i}"
                entries += _attention(f"{part}/level{level}_attention{i}", name)
        if level != (last if encoder else 0):
            name = f"{part}.{side}.{level}.{resample}.conv"
            entries += _layer(f"{part}/level{level}_{resample}/conv", name, CONV)
    for ours, published in (("block1", "block_1"), ("block2", "block_2")):
        entries += _residual(f"{part}/middle/{ours}", f"{part}.mid.{published}", False)
    entries += _attention(f"{part}/middle/attention", f"{part}.mid.attn_1")
    entries += _layer(f"{part}/norm_out", f"{part}.norm_out", IDENTITY, norm=True)
    return entries + _layer(f"{part}/conv_out", f"{part}.conv_out", CONV)


def tokenizer_table(config: TokenizerConfig) -> list[Entry]:
    """Return the table of a tokenizer: all parameters, and the per-scale code counts `code_hits`."""
    table = _pyramid(config, "encoder") + _pyramid(config, "decoder")
    table += _layer("quant_conv", "quant_conv", CONV) + _layer("post_quant_conv", "post_quant_conv", CONV)
    table.append(Entry("quantizer/codebook", ("quantize.embedding.weight",), IDENTITY))
    if n := config.num_phis:
        root = "quantize.quant_resi"
        phis = [f"{root}.qresi"] if n == 1 else [f"{root}.qresi_ls.{i}" for i in range(n)]
        weights, biases = tuple(f"{p}.weight" for p in phis), tuple(f"{p}.bias" for p in phis)
        table.append(Entry("quantizer/phi_kernel", weights, CONV, stacked=True))
        table.append(Entry("quantizer/phi_bias", biases, IDENTITY, stacked=True))
    return [*table, Entry("code_hits", ("quantize.ema_vocab_hit_SV",), IDENTITY)]


_PHI = r"quantize\.quant_resi\.qresi_ls\.(\d{1,4})\."


def tokenizer_config(tensors: Tensors, scales=None) -> TokenizerConfig:
    """Derive the config of a published tokenizer from the shapes of its tensors.

    Args:
      tensors: the published state dict.
      scales: sides of the token maps; by default those of 256px, if the file has K = 10.

    Raises:
      ValueError: if this is not a published tokenizer, or its K is not that of the scales.
    """
    required = {"encoder.conv_in.weight": 4, "quantize.embedding.weight": 2, "quant_conv.weight": 4}
    required["encoder.down.0.block.0.conv1.weight"] = 4
    require_tensors(tensors, required, "tokenizer")
    levels = count_layers(tensors, r"encoder\.down\.(\d{1,4})\.", _MAX_LEVELS)
    first_convs = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    require_tensors(tensors, dict.fromkeys(first_convs, 4), "tokenizer")
    num_codes, code_dim = tensors["quantize.embedding.weight"].shape
    ch = tensors["encoder.conv_in.weight"].shape[0]
    level_channels = [tensors[name].shape[0] for name in first_convs]
    if not ch or any(channels % ch for channels in level_channels):
        raise ValueError(
            f"the levels of the encoder have {level_channels} channels, no multiples of the first {ch}"
        )
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    if hits is not None and (hits.ndim != 2 or len(hits) > MAX_SCALES):
        raise ValueError(
            f"quantize.ema_vocab_hit_SV has shape {hits.shape}, expected (K, V), K at most {MAX_SCALES}"
        )
    if scales is None:
        if hits is not None and len(hits) != len(SCALES_256):
            raise ValueError(
                f"quantize.ema_vocab_hit_SV has shape {hits.shape}: a tokenizer of {len(hits)} scales, not "
                f"the published {len(SCALES_256)}; give the sides of its token maps, "
                "--scales=1,2,... (scales= in Python); to train on it, convert it to a run first "
                "(var_jax.tools.convert)"
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
        ch_mult=tuple(channels // ch for channels in level_channels),
        num_blocks=count_layers(tensors, r"encoder\.down\.0\.block\.(\d{1,4})\.", _MAX_BLOCKS),
        num_phis=1 if single else count_layers(tensors, _PHI, _MAX_PHIS),
    )


# --- transformer ----------------------------------------------------------------------------------


def next_scale_table(config: NextScaleConfig) -> list[Entry]:
    """Return the table of a VAR transformer: all parameters."""

    def blocks(ours: str, published: str, layout: Layout) -> Entry:
        names = tuple(f"blocks.{i}.{published}" for i in range(config.depth))
        return Entry(ours, names, layout, stacked=True)

    layers = "blocks/layers"
    table = [
        Entry("class_embedding", ("class_emb.weight",), IDENTITY),
        Entry("start_embedding", ("pos_start",), BATCHED),
        Entry("position_embedding", ("pos_1LC",), BATCHED),
        Entry("level_embedding", ("lvl_embed.weight",), IDENTITY),
        *_layer("code_embedding", "word_embed", LINEAR),
        *_layer("head_adaln", "head_nm.ada_lin.1", LINEAR),
        *_layer("head", "head", LINEAR),
        blocks(f"{layers}/attention/qkv/kernel", "attn.mat_qkv.weight", LINEAR),
        blocks(f"{layers}/attention/q_bias", "attn.q_bias", IDENTITY),
        blocks(f"{layers}/attention/v_bias", "attn.v_bias", IDENTITY),
        blocks(f"{layers}/attention/proj/kernel", "attn.proj.weight", LINEAR),
        blocks(f"{layers}/attention/proj/bias", "attn.proj.bias", IDENTITY),
    ]
    for fc in ("fc1", "fc2"):
        table.append(blocks(f"{layers}/mlp/{fc}/kernel", f"ffn.{fc}.weight", LINEAR))
        table.append(blocks(f"{layers}/mlp/{fc}/bias", f"ffn.{fc}.bias", IDENTITY))
    if config.normalized_attention:
        table.append(blocks(f"{layers}/attention/log_temperature", "attn.scale_mul_1H11", PER_HEAD))
    if config.shared_adaln:
        table += _layer("shared_adaln", "shared_ada_lin.1", LINEAR)
        return [*table, blocks("adaln_offset", "ada_gss", OFFSETS)]
    table.append(blocks("adaln/adaln/kernel", "ada_lin.1.weight", LINEAR))
    return [*table, blocks("adaln/adaln/bias", "ada_lin.1.bias", IDENTITY)]


def next_scale_constants(config: NextScaleConfig) -> dict[str, Constant]:
    """Return the constants of a published transformer (level indices, mask, zero biases), by name."""
    scales = config.schedule
    length, width = config.length, config.width
    float32 = np.dtype(np.float32)
    levels = Constant((1, length), np.dtype(np.int64), lambda: scales.levels[None].astype(np.int64))
    mask = Constant(
        (1, 1, length, length),
        float32,
        lambda: np.where(scales.mask, float32.type(0), float32.type(-np.inf))[None, None],
    )
    zeros = Constant((width,), float32, lambda: np.zeros(width, float32))
    biases = {f"blocks.{i}.attn.zero_k_bias": zeros for i in range(config.depth)}
    return {"lvl_1L": levels, "attn_bias_for_masking": mask, **biases}


def next_scale_config(tensors: Tensors, scales=None) -> NextScaleConfig:
    """Derive the config of a published transformer from the shapes of its tensors.

    Args:
      tensors: the published state dict.
      scales: sides of the token maps of its tokenizer; by default from `lvl_1L`, or the published scales of
        that length.

    Raises:
      ValueError: if this is not a published transformer, or one of other scales.
    """
    required = {"pos_1LC": 3, "word_embed.weight": 2, "class_emb.weight": 2, "head.weight": 2}
    require_tensors(tensors, required, "VAR transformer")
    classes, width = tensors["class_emb.weight"].shape
    temperature = tensors.get("blocks.0.attn.scale_mul_1H11")
    if temperature is not None:
        require_tensors(tensors, {"blocks.0.attn.scale_mul_1H11": 4}, "VAR transformer")
    scales = _scales_of(tensors) if scales is None else scales
    length = Scales(scales).length
    if tensors["pos_1LC"].shape[1] != length:
        raise ValueError(
            f"pos_1LC has shape {tensors['pos_1LC'].shape}, but the tokenizer's scales {tuple(scales)} make "
            f"{length} positions: expected {(1, length, width)}; pass the right scales= to load_tokenizer"
        )
    return NextScaleConfig(
        depth=count_layers(tensors, r"blocks\.(\d{1,4})\.", MAX_DEPTH),
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
    """Return the scales of a transformer from its level indices, or else from its number of positions."""
    length = tensors["pos_1LC"].shape[1]
    if length > _MAX_LENGTH:
        raise ValueError(f"pos_1LC has {length} positions; without scales, at most {_MAX_LENGTH} are read")
    if (levels := tensors.get("lvl_1L")) is not None:
        if levels.shape != (1, length) or levels.dtype.kind not in "iu":
            raise ValueError(f"lvl_1L is {levels.dtype} {levels.shape}, expected ints (1, {length})")
        _, counts = np.unique(levels[0], return_counts=True)
        sides = tuple(math.isqrt(count) for count in counts)
        if len(sides) > MAX_SCALES or sum(side * side for side in sides) != length:
            raise ValueError(f"lvl_1L has {len(sides)} levels that are not up to {MAX_SCALES} square maps")
        return sides
    scales_by_length = {Scales(sides).length: sides for sides in (SCALES_256, SCALES_512)}
    if (scales := scales_by_length.get(length)) is None:
        raise ValueError(
            f"pos_1LC has shape {tensors['pos_1LC'].shape}, not the "
            f"{' or '.join(map(str, scales_by_length))} positions of the published 256 or 512 pixels; "
            "give scales, the sides of its token maps"
        )
    return scales


# --- both -----------------------------------------------------------------------------------------


def published_shapes(table: list[Entry], shapes: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of every published tensor of a network, by name.

    Args:
      table: table of the network.
      shapes: our parameter tree, with leaves that have a shape.
    """
    ours = flatten_dict(shapes, sep="/")
    published = {}
    for entry in table:
        shape = ours[entry.path].shape[1:] if entry.stacked else ours[entry.path].shape
        tensor = entry.layout.published(np.broadcast_to(np.float32(0), shape))
        published |= dict.fromkeys(entry.names, tensor.shape)
    return published


def check_tensors(
    tensors: Tensors, table: list[Entry], shapes: dict, constants: Mapping[str, Constant] | None = None
) -> None:
    """Check that a published state dict has exactly the tensors of a network.

    Args:
      tensors: the published state dict.
      table: table of the network.
      shapes: our parameter tree, with leaves that have a shape.
      constants: constants of the network; the file may lack them, but not hold other values.

    Raises:
      ValueError: naming the tensors that are missing, unknown, or of another shape or value.
    """
    constants = constants or {}
    expected = published_shapes(table, shapes)
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected) - set(constants))
    problems = _truncate([f"missing: {name}" for name in missing])
    problems += _truncate([f"unknown: {name} {tensors[name].shape}" for name in unknown])
    for name in sorted(set(constants) & set(tensors)):
        constant, tensor = constants[name], tensors[name]
        if constant.shape != tensor.shape or not np.array_equal(constant.value(), tensor):
            problems.append(f"{name} {tensor.shape} holds other values than this architecture implies")
    problems += _truncate(
        [
            f"{name} has shape {tensors[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ]
    )
    if problems:
        raise ValueError("the tensors do not fit the architecture:\n  " + "\n  ".join(problems))


def _truncate(problems: list[str]) -> list[str]:
    """Return the first _MAX_PROBLEMS problems, and a line with the number of the others."""
    num_more = len(problems) - _MAX_PROBLEMS
    return problems[:_MAX_PROBLEMS] + ([f"... and {num_more} more"] if num_more > 0 else [])


def to_ours(tensors: Tensors, table: list[Entry], shapes: dict) -> dict:
    """Convert a published state dict to our parameter tree (float32).

    Peak memory is that of the result: the pages of a memory-mapped tensor are freed once it is copied.

    Args:
      tensors: the published state dict, checked by `check_tensors`.
      table: table of the network.
      shapes: our parameter tree, with leaves that have a shape.
    """
    flat_shapes = flatten_dict(shapes, sep="/")
    ours = {}
    for entry in table:
        ours[entry.path] = np.empty(flat_shapes[entry.path].shape, np.float32)
        for i, name in enumerate(entry.names):
            part = ours[entry.path][i] if entry.stacked else ours[entry.path]
            part[...] = entry.layout.ours(tensors[name])
            release(tensors[name])
    return unflatten_dict(ours, sep="/")


def to_published(
    params: dict, table: list[Entry], constants: Mapping[str, Constant] | None = None
) -> dict[str, np.ndarray]:
    """Convert our parameter tree to a published state dict, including its constants."""
    flat = flatten_dict(params, sep="/")
    return dict(published_tensors(lambda path: np.asarray(jax.device_get(flat[path])), table, constants))


def published_tensors(
    read: Callable[[str], np.ndarray], table: list[Entry], constants: Mapping[str, Constant] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and tensors of a published state dict, reading our parameters one at a time.

    Args:
      read: function that returns our parameter of a path.
      table: table of the network.
      constants: constants of the network.
    """
    for name, constant in (constants or {}).items():
        yield name, constant.value()
    for entry in table:
        leaf = read(entry.path)
        for i, name in enumerate(entry.names):
            part = leaf[i] if entry.stacked else leaf
            yield name, np.ascontiguousarray(entry.layout.published(part))


def count_layers(tensors: Tensors, pattern: str, max_count: int) -> int:
    """Return the number of layers whose tensor names match a pattern; its group is the layer's index.

    Raises:
      ValueError: if an index is missing, or there are more than `max_count` layers.
    """
    names = {int(match[1]): name for name in tensors if (match := re.match(pattern, name))}
    missing = next(i for i in range(len(names) + 1) if i not in names)
    if missing < len(names):
        raise ValueError(f"{names[max(names)]} is in the file, but nothing of number {missing}")
    if missing > max_count:
        raise ValueError(f"{names[max(names)]} is in the file; at most {max_count} such layers are read")
    return missing


TOKENIZER_ADVICE = "convert the tokenizer's file to the same run, too, or give the file as --tokenizer"
# A tensor that only the file of a network has, and what takes the file.
SIGNATURES = {
    "tokenizer": ("quantize.embedding.weight", "as --tokenizer, in Python to load_tokenizer"),
    "VAR transformer": ("word_embed.weight", "as --checkpoint, in Python to load_var with tokenizer="),
}


def require_tensors(tensors: Tensors, ranks: Mapping[str, int | None], kind: str) -> None:
    """Check that a state dict has tensors of given names and ranks.

    Args:
      tensors: the state dict.
      ranks: number of dimensions by name; None for any.
      kind: kind of network, for the message.

    Raises:
      ValueError: naming the tensors that are missing, or one of another rank.
    """
    if missing := [name for name in ranks if name not in tensors]:
        for other, (name, how) in SIGNATURES.items():
            if other != kind and name in tensors:
                raise ValueError(f"no published {kind}: this is the file of a {other}, give it {how}")
        raise ValueError(f"no published {kind}: it has no tensor {', '.join(missing)}")
    for name, rank in ranks.items():
        if rank is not None and tensors[name].ndim != rank:
            raise ValueError(f"{name} has shape {tensors[name].shape}, expected {rank} dimensions")
