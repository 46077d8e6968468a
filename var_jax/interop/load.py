"""Networks with their parameters, from a run of ours or a file in the published layout."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from var_jax.interop import published
from var_jax.interop.published import Tensors
from var_jax.interop.tensor_files import SUFFIXES, read_tensors
from var_jax.paths import as_path
from var_jax.sampling.options import SamplingOptions
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.checkpoint import CHECKPOINT_DIR, SavedArrays, load_config, load_params
from var_jax.training.task import compute_dtype
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig
from var_jax.transformer.model import ARTransformer
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

CONFIGS = {"tokenizer": TokenizerConfig, "next_scale": NextScaleConfig, "next_token": NextTokenConfig}
TRANSFORMER_CLASSES = {"next_scale": NextScale, "next_token": NextToken}  # kind of stage -> network


def load_tokenizer(
    path: str | Path, scales=None, step: int | str = "latest", dtype: str = "auto"
) -> tuple[Tokenizer, dict]:
    """A tokenizer and its parameters, as float32 arrays on the host.

    Args:
      path: of a run (its --workdir), or of a published .pth or .safetensors file.  A run that was trained
        on a tokenizer from elsewhere leads to that.
      scales: sides of the token maps, where a file's are not those of 256px.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: of the convolutions: float32 or bfloat16; auto is float32 in the encoder, so that tokens are the
        same on every platform, and in the decoder bfloat16 on accelerators.

    Raises:
      FileNotFoundError: where there is nothing of the kind.
      ValueError: where the tensors do not fit, naming them.
    """
    path, computed = as_path(path), _tokenizer_dtypes(dtype)
    if not _is_weights(path):
        if not (path / "tokenizer").exists() and (path / _transformer_of(path) / CHECKPOINT_DIR).exists():
            stage = load_config(path / _transformer_of(path) / CHECKPOINT_DIR)[1]["stage"]
            if stage["tokenizer"]:
                return load_tokenizer(stage["tokenizer"], scales or stage["scales"] or None, "latest", dtype)
        params, record = load_params(path / "tokenizer" / CHECKPOINT_DIR, step)
        config = TokenizerConfig(**record["model"])
        if scales is not None and tuple(scales) != config.scales:
            raise ValueError(
                f"the tokenizer under {path} has scales {config.scales}, asked for {tuple(scales)}"
            )
        return Tokenizer(config, **computed), params
    config, params = _from_file(path, "tokenizer", read_tensors(path, "tokenizer"), scales)
    return Tokenizer(config, **computed), params


def _tokenizer_dtypes(name: str) -> dict:
    """The fields of a `Tokenizer` that an argument `dtype` stands for."""
    decoder = compute_dtype(name)
    return {"dtype": decoder, "encoder_dtype": jnp.dtype(jnp.float32) if name == "auto" else decoder}


def load_transformer(
    path: str | Path, tokenizer: TokenizerConfig, step: int | str = "latest", dtype: str = "auto"
) -> tuple[ARTransformer, dict, SamplingOptions]:
    """A transformer for a tokenizer, its float32 parameters on the host, and how its run samples.

    Args:
      path: of a run (its --workdir), whose next-scale or else next-token stage is meant, or of a published
        .pth or .safetensors file.
      tokenizer: what it predicts the tokens of.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: of the matrix products: float32 or bfloat16; auto is bfloat16 on accelerators, float32 on CPU.

    Raises:
      FileNotFoundError: where there is nothing of the kind.
      ValueError: where the tensors do not fit each other or the tokenizer, naming them.
    """
    path, computed = as_path(path), compute_dtype(dtype)
    if not _is_weights(path):
        kind = _transformer_of(path)
        params, record = load_params(path / kind / CHECKPOINT_DIR, step)
        config = CONFIGS[kind](**record["model"])
        _check_fit(path, config, tokenizer)
        return (
            TRANSFORMER_CLASSES[kind](config, computed),
            params,
            SamplingOptions(**record["stage"]["sampling"]),
        )
    config, params = _from_file(path, "next_scale", read_tensors(path, "next_scale"), tokenizer.scales)
    _check_fit(path, config, tokenizer)
    return NextScale(config, computed), params, SamplingOptions()


def _transformer_of(run: Path) -> str:
    """The kind of transformer that a run has; next_scale where it has none, or both."""
    return next(
        (kind for kind in TRANSFORMER_CLASSES if (run / kind / CHECKPOINT_DIR).exists()), "next_scale"
    )


def read_network(path: str | Path, kind: str) -> tuple[TokenizerConfig | TransformerConfig, dict]:
    """Architecture and parameters of a network as they are, whatever they are wanted for.

    The scales of a published tokenizer mean nothing but their number: its file does not hold them, and no
    parameter depends on them.

    Args:
      path: of a run (its --workdir), whose latest checkpoint is read, or of a published file.
      kind: `tokenizer`, `next_scale` or `next_token` (which no published file is).

    Returns:
      Architecture, and float32 arrays on the host.

    Raises:
      FileNotFoundError: where there is nothing of the kind.
      ValueError: where the tensors do not fit each other, naming them.
    """
    path = as_path(path)
    if _is_weights(path):
        if kind == "next_token":
            raise ValueError(f"{path}: a published file holds no next-token transformer; give a run")
        tensors = read_tensors(path, kind)
        hits = tensors.get("quantize.ema_vocab_hit_SV")
        known = hits is not None and hits.ndim == 2 and len(hits) <= published.MAX_SCALES
        return _from_file(path, kind, tensors, (1,) * len(hits) if known else None)
    folder = path / kind / CHECKPOINT_DIR
    step, record = load_config(folder)
    saved = SavedArrays(folder, step, "params")
    params = unflatten_dict({name: saved.read(name) for name in saved}, sep="/")
    return CONFIGS[kind](**record["model"]), params


def _from_file(
    path: Path, kind: str, tensors: Tensors, scales
) -> tuple[TokenizerConfig | NextScaleConfig, dict]:
    """Architecture and parameters (host arrays) of a file in the published layout."""
    read = published_tokenizer if kind == "tokenizer" else published_next_scale
    config, *layout = read(path, tensors, scales)
    params = published.to_ours(tensors, *layout)
    params.pop("code_hits", None)
    return config, params


def published_tokenizer(path: Path, tensors: Tensors, scales=None) -> tuple[TokenizerConfig, list, dict]:
    """Architecture of a published tokenizer, its table, and the shapes of our parameters.

    Raises:
      ValueError: naming the file and the tensors that do not fit.
    """
    config = with_path(path, published.tokenizer_config, tensors, scales)
    table, shapes = published.tokenizer_table(config), tokenizer_shapes(config)
    with_path(path, published.check_tensors, tensors, table, shapes)
    return config, table, shapes


def published_next_scale(path: Path, tensors: Tensors, scales=None) -> tuple[NextScaleConfig, list, dict]:
    """Architecture of a published transformer, its table, and the shapes of our parameters.

    Raises:
      ValueError: naming the file and the tensors that do not fit.
    """
    config = with_path(path, published.next_scale_config, tensors, scales)
    table, shapes = published.next_scale_table(config), next_scale_shapes(config)
    with_path(path, published.check_tensors, tensors, table, shapes, published.next_scale_constants(config))
    return config, table, shapes


def tokenizer_shapes(config: TokenizerConfig) -> dict:
    """Our parameters, and the counts of code uses that a published file holds beside them, as shapes."""
    shapes = _init_shapes(Tokenizer(config), _abstract((1, config.image_size, config.image_size, 3)))
    hits = jax.ShapeDtypeStruct((len(config.scales), config.num_codes), jnp.float32)
    return {**shapes, "code_hits": hits}


def next_scale_shapes(config: NextScaleConfig) -> dict:
    """Our parameters as shapes."""
    scales = config.schedule
    inputs = _abstract((1, scales.length - scales.ends[0], config.code_dim))
    return _init_shapes(NextScale(config), _abstract((1,), jnp.int32), inputs)


def _is_weights(path: Path) -> bool:
    """Whether a path means a file of weights (be it missing) and not the directory of a run."""
    return path.is_file() or path.suffix in SUFFIXES


def _abstract(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _init_shapes(model: nn.Module, *inputs) -> dict:
    variables = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args), *inputs)
    return nn.meta.unbox(variables)["params"]


def with_path(path: Path, function, *args):
    """Calls a function; a ValueError of it says which file it is about."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fit(path: Path, config: TransformerConfig, tokenizer: TokenizerConfig) -> None:
    """Raises ValueError where a transformer was made for another tokenizer."""
    for field in ("scales", "num_codes", "code_dim"):
        have, need = getattr(config, field), getattr(tokenizer, field)
        if have != need:
            raise ValueError(f"the transformer {path} has {field} {have}, but the tokenizer has {need}")
